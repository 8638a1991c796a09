"""Days of Stripe away in seconds: what nobody knows the outcome of, on both sides of 20 and 24 hours, is billed once."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.sender_process import Sender, SharedClock
from tests.sinks_site import DEADLINE_S, PARTITIONS, Site, log_of, running, site_of, until
from tests.stripe_standin import Standin
from tollway.connectors.kafka import read_newest
from tollway.connectors.stripe import StripePort
from tollway.schemas import codec
from tollway.schemas.meter_event import identifier
from tollway.schemas.topics import METER_EVENTS
from tollway.streams.settings import Settings
from tollway.streams.status import status

HOUR_S = 3600
RATE = 60
"""Both clocks run so much faster than the machine's, and hop over the hours in which nothing but waiting happens."""
HOP_S = 0.3
"""Shortest real time between hops of an hour: no call is under way for four of them, and 20 + 4 = 24."""
ACCOUNTS = 8
KILLED = -9
TROUBLES = ("drop", "accept_drop", "500", "accept_500", "429", "accept_cut")


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("standin")) as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, standin: Standin) -> Iterator[Settings]:
    with log_of(tmp_path_factory.mktemp("log"), stripe_url=standin.url, stripe_key=standin.key) as found:
        yield found


class Days:
    """A seeded stretch of a sender's life between the log and the stand-in."""

    def __init__(self, site: Site, standin: Standin, seed: int, folder: Path) -> None:
        self.site, self.standin, self.rng = site, standin, random.Random(seed)
        self.clock = SharedClock(folder / "clock")
        self.sender = Sender(site.settings, site.epoch, self.clock)
        self.names = [site.account(n % PARTITIONS, seed * ACCOUNTS + n // PARTITIONS) for n in range(ACCOUNTS)]
        self.customers: dict[str, str] = {}
        self._hopped = 0.0
        self._faults = 0
        self.at(int(time.time()))

    def at(self, now_s: int) -> None:
        """Set both clocks; the sender's first, so that it never thinks an attempt younger than Stripe does."""
        self.clock.set(now_s, RATE)
        self.standin.admin("clock", {"set_s": now_s, "rate": RATE})

    async def open(self) -> None:
        """Customers of this seed's own, and a meter."""
        port = StripePort(self.standin.key, self.standin.url)
        await port.ensure_meter("calls")
        self.customers = {name: await port.ensure_customer(name) for name in self.names}
        await port.close()
        await self.site.open(self.names, self.customers.__getitem__)

    async def emit(self) -> None:
        """Some usage of every account."""
        for name in self.names:
            await self.site.emit(name, self.rng.randrange(1, 6))

    async def wave(self) -> None:
        """Some usage of every account, and its meter events in the topic."""
        await self.emit()
        await self.published()

    async def published(self) -> None:
        """Wait until the topic has all that was used."""
        async with asyncio.timeout(DEADLINE_S):
            while sum((await self.owed()).values()) < sum(self.site.sent.values()):
                await asyncio.sleep(0.1)

    async def hours(self, count: int) -> None:
        """Time passes in hops of an hour."""
        for _ in range(count):
            await until(lambda: time.monotonic() - self._hopped >= HOP_S)
            self.sender.keep()
            self.at(self.clock() + HOUR_S)
            self._hopped = time.monotonic()

    def trouble(self, count: int) -> None:
        """The next calls fare badly, some after Stripe has taken them."""
        faults = (*TROUBLES, *self.rng.choices(TROUBLES, k=count), "hang", "accept_hang")
        self._faults = self.fared() + len(faults)
        for fault in faults:
            self.standin.fault(fault)

    def fared(self) -> int:
        """How many calls have fared badly."""
        return sum(count for name, count in self.standin.admin("counters").items() if name.startswith("fault_"))

    async def trouble_over(self) -> None:
        """Wait until all of it has happened."""
        async with asyncio.timeout(DEADLINE_S):
            while self.fared() < self._faults:
                self.sender.keep()
                await asyncio.sleep(0.1)

    async def life(self, failpoint: str) -> None:
        """Processes, until one has died at the failpoint; then another."""
        self.sender.kill()
        self.sender.start(failpoint)
        while True:
            await until(self.sender.died)
            self.sender.start()
            if self.sender.deaths[-1] == KILLED:
                return

    async def owed(self) -> Counter[str]:
        """identifier → units of this seed's accounts in the topic."""
        found = await read_newest(self.site.settings.kafka_bootstrap, {}, METER_EVENTS.name, range(PARTITIONS), None)
        events = [codec.decode(record.value)[1] for records in found.values() for record in records if record.value]
        return Counter({identifier(event): event["units"] for event in events if event["account"] in self.names})

    def billed(self) -> Counter[str]:
        """identifier → units that Stripe has taken from this seed's customers; one taken twice counts twice."""
        units = Counter[str]()
        for event in self.standin.events():
            if event["customer"] in self.customers.values():
                assert event["error"] == ""
                units[event["identifier"]] += int(event["value"])
        return units

    def units(self) -> dict[str, int]:
        """Account → units that Stripe counts."""
        billed = Counter[str]()
        for event in self.standin.events():
            billed[event["customer"]] += int(event["value"])
        return {name: billed[customer] for name, customer in self.customers.items()}

    async def settled(self) -> None:
        """Let time pass until Stripe has as many meter events as the topic, and the sender nothing pending."""
        await self.published()
        owed = await self.owed()
        async with asyncio.timeout(DEADLINE_S):
            while len(self.billed()) < len(owed) or await self.pending():
                await self.hours(1)

    async def pending(self) -> int:
        """What the sender's checkpoints still hold, and what it has not read."""
        group = (await status(self.site.settings))["groups"]["stripe"]
        return int(group["lag"]) + sum(row.get("pending", 0) for row in group["partitions"])


@asynccontextmanager
async def days_of(settings: Settings, standin: Standin, seed: int, folder: Path) -> AsyncIterator[Days]:
    """A world with its accounts folded; the sender is not started yet."""
    async with site_of(settings) as site, running(site.accounts()):
        if seed == 0:
            await site.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
        standin.heal()
        days = Days(site, standin, seed, folder)
        try:
            await days.open()
            yield days
        finally:
            days.sender.kill()


@pytest.mark.parametrize("seed", range(int(os.environ.get("DAYS", "2"))))
async def test_in_compressed_days_without_stripe_each_unit_is_billed_once(
    settings: Settings, standin: Standin, tmp_path: Path, seed: int
) -> None:
    """Lost answers, storms of 429 and 5xx, two outages of 18 to 27 hours, the sender killed between record and call, after
    calls and in mid-outage: Stripe's own list is the topic's, unit for unit, and no identifier was taken twice."""
    async with days_of(settings, standin, seed, tmp_path) as days:
        before = Counter(standin.admin("counters"))
        for away_hours in days.rng.choice([(18, 25), (19, 27), (21, 24), (23, 19), (25, 20)]):
            days.sender.kill()
            days.trouble(6)
            await days.wave()
            await days.life("stripe.after_attempts:1")
            await days.life(f"stripe.after_calls:{days.rng.randrange(1, PARTITIONS)}")
            await days.trouble_over()
            await days.emit()
            standin.admin("away", {"for_s": away_hours * HOUR_S})
            first = days.rng.randrange(2, 9)
            await days.hours(first)
            await days.emit()
            days.sender.kill()
            days.sender.start()
            await days.hours(away_hours - first)
            standin.fault("429", 8)
            standin.fault("500", 2)
            standin.fault("accept_500", 2)
        await days.settled()
        assert days.billed() == await days.owed()
        assert days.units() == days.site.sent
        after = Counter(standin.admin("counters"))
        assert {name for name in ("refused_400", "summaries") if after[name] > before[name]} == {
            "refused_400",
            "summaries",
        }
        assert days.sender.deaths.count(KILLED) >= 9
