"""Stripe away for longer than max.poll.interval, or not to be trusted with units: senders wait, all else goes on."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.sinks_site import MAX_POLL_S, Site, Watch, caught_up, log_of, running, site_of, until, used
from tests.stripe_standin import Standin, post
from tests.stripe_world import Topic, owed
from tollway.connectors.stripe import StripePort
from tollway.schemas import codec
from tollway.schemas.topics import METER_EVENTS
from tollway.streams import engine as engine_module
from tollway.streams import owned, stripe_fold, stripe_outbox
from tollway.streams.engine import Engine
from tollway.streams.settings import Settings
from tollway.streams.status import status

RATE = 60
"""The sender's clock and the stand-in's run so fast: back-off of minutes takes seconds."""
CUSTOMERS = 20
EVENTS = 400
PENDING_MAX, STASH_MAX, FETCH_MAX = 60, 100, 40
"""The bounds of this module's engines: small enough for EVENTS not to fit."""


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("standin")) as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, standin: Standin) -> Iterator[Settings]:
    with log_of(tmp_path_factory.mktemp("log"), stripe_url=standin.url, stripe_key=standin.key) as found:
        yield found


@pytest.fixture
async def site(settings: Settings) -> AsyncIterator[Site]:
    async with site_of(settings) as found:
        yield found


class Bill:
    """Meter events in the topic, as the fold of billing would put them there, and what Stripe has of them."""

    def __init__(self, site: Site, standin: Standin) -> None:
        self.site, self.standin, self.topic = site, standin, Topic()
        self.customers: dict[str, str] = {}
        self.start_s = int(time.time())
        self._began = time.monotonic()
        standin.admin("clock", {"set_s": self.start_s, "rate": RATE})

    def now_s(self) -> int:
        return self.start_s + int((time.monotonic() - self._began) * RATE)

    async def open(self, port: StripePort, count: int = CUSTOMERS) -> None:
        self.customers |= {f"acct-{n}": await port.ensure_customer(f"acct-{n}") for n in range(count)}

    async def publish(self, count: int, event_name: str, partition: int = 0) -> None:
        """Deltas of the customers in turn, all in one partition."""
        names = list(self.customers)
        sent = []
        for number in range(count):
            name = names[number % len(names)]
            event = self.topic.publish(
                number + 1,
                account=name,
                customer=self.customers[name],
                event_name=event_name,
                at_s=self.start_s,
                epoch=self.site.epoch,
            )
            value = codec.encode("MeterEvent", dict(event))
            sent.append(await self.site.producer.send(METER_EVENTS.name, value, key=name.encode(), partition=partition))
        await asyncio.gather(*sent)

    def billed(self) -> Counter[str]:
        """identifier → units that Stripe has taken; one taken twice counts twice."""
        units, ours = Counter[str](), owed(self.topic)
        for event in self.standin.events():
            if event["identifier"] in ours:
                units[event["identifier"]] += int(event["value"])
        return units

    async def complete(self) -> None:
        """Wait until Stripe has every delta, and see that it has each once."""
        async with asyncio.timeout(120):
            while len(self.billed()) < len(self.topic.events):
                await asyncio.sleep(0.2)
        assert self.billed() == owed(self.topic)


@asynccontextmanager
async def billing(site: Site, standin: Standin, *engines: Engine) -> AsyncIterator[tuple[Bill, Engine]]:
    """Group stripe at work on a fast clock."""
    bill, port = Bill(site, standin), StripePort(standin.key, standin.url, timeout_s=1)
    await bill.open(port)
    engine = site.stripe(port, bill.now_s)
    async with running(engine, *engines):
        yield bill, engine
    await port.close()


async def test_stripe_away_holds_back_its_own_group_alone(
    site: Site, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away for three of max.poll.interval, with more deltas than fit: the sender's list and the partition's stash stay at
    their bounds, the partition is paused and kept, usage is folded on; afterwards each delta is at Stripe once."""
    for module in (stripe_fold, stripe_outbox):
        monkeypatch.setattr(module, "PENDING_MAX", PENDING_MAX)
    monkeypatch.setattr(owned, "STASH_RECORDS_MAX", STASH_MAX)
    monkeypatch.setattr(engine_module, "FETCH_RECORDS_MAX", FETCH_MAX)
    accounts = site.accounts()
    async with billing(site, standin, accounts) as (bill, sender):
        await site.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
        await site.open([site.account(0)])
        port = StripePort(standin.key, standin.url)
        await port.ensure_meter("calls")
        await port.close()
        await bill.publish(1, "calls")
        await bill.complete()
        watches = [Watch(sender), Watch(accounts)]
        standin.kill()
        began, pending = time.monotonic(), 0
        await bill.publish(EVENTS, "calls")
        while time.monotonic() < began + 3 * MAX_POLL_S:
            await site.emit(site.account(0), 5)
            await caught_up(site, accounts, watches)
            pending = max(pending, sender.owned[0].state.sender.outbox.pending)
        assert pending == PENDING_MAX
        assert STASH_MAX < watches[0].stash <= STASH_MAX + FETCH_MAX
        assert watches[0].paused == {0}
        assert not watches[1].paused
        assert used(accounts, site.account(0)) == site.sent[site.account(0)]
        assert "in doubt for" in sender.health()["reasons"]["0"]
        group = (await status(site.settings))["groups"]["stripe"]
        assert group["lag"] > 0
        row = group["partitions"][0]
        assert row["in_doubt"] == CUSTOMERS
        assert bill.start_s <= row["in_doubt_since_s"] <= bill.now_s()
        standin.start()
        await asyncio.to_thread(standin.wait_ready)
        await bill.complete()
        assert all(watch.kept() for watch in watches)
        assert sender.health()["healthy"]


async def test_a_worker_starts_while_stripe_is_away(site: Site, standin: Standin) -> None:
    """A Stripe that cannot be asked about its meters stops no partition: health says why nothing is sent, until it can."""
    async with billing(site, standin) as (bill, sender):
        port = StripePort(standin.key, standin.url)
        await port.ensure_meter("tokens")
        await port.close()
        standin.kill()
        await bill.publish(30, "tokens", partition=1)
        await until(lambda: "no answer" in sender.health()["reasons"].get("1", ""))
        assert not any(owned.stopped for owned in sender.owned.values())
        standin.start()
        await asyncio.to_thread(standin.wait_ready)
        await bill.complete()
        await until(lambda: sender.health()["healthy"])


async def test_no_unit_goes_into_a_meter_that_would_not_add_up(site: Site, standin: Standin) -> None:
    """A meter that counts instead of adding holds its partition's deltas back, red and by name, across a restart; the others
    are billed, and it goes on once the meter is put right."""
    meter = {"event_name": "odd", "display_name": "odd", "default_aggregation[formula]": "count"}
    _, made, _ = post(standin, "/v1/billing/meters", meter)
    async with billing(site, standin) as (bill, sender):
        await bill.publish(10, "odd", partition=2)
        await until(lambda: "formula is count" in sender.health()["reasons"].get("2", ""))
        assert list(sender.health()["reasons"]) == ["2"]
    async with billing(site, standin) as (again, sender):
        await until(lambda: "formula is count" in sender.health()["reasons"].get("2", ""))
        await again.publish(10, "tokens", partition=3)
        await again.complete()
        assert bill.billed() == {}
        post(standin, f"/v1/billing/meters/{made['id']}/deactivate", {})
        port = StripePort(standin.key, standin.url)
        await port.ensure_meter("odd")
        await port.close()
        await bill.complete()
