"""The sender against the Stripe stand-in as a process of its own: its list of accepted events is the judge."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stripe_standin import Standin
from tests.stripe_world import HOUR_S, NOW, T0, Clock, Process, Topic, owed
from tollway.connectors.stripe import StripePort
from tollway.schemas.meter_event import MeterEvent
from tollway.streams.stripe_sender import BACKOFF_MAX_S


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("standin")) as server:
        yield server


class Rails:
    """A partition whose sender talks to the stand-in; both clocks are moved together."""

    def __init__(self, standin: Standin, port: StripePort, customers: dict[str, str]) -> None:
        self.standin, self.port, self.customers = standin, port, customers
        self.topic, self.saved, self.clock = Topic(), list[bytes](), Clock()
        self.clock.now_s = standin.now_s()

    def publish(self, units: int, account: str, **fields: Any) -> MeterEvent:
        fields.setdefault("at_s", self.clock.now_s - 60)
        return self.topic.publish(units, account=account, customer=self.customers[account], **fields)

    def start(self, **hooks: Any) -> Process:
        return Process(self.topic, self.port, self.saved, self.clock, **hooks)

    def pass_time(self, seconds: int) -> None:
        if seconds:
            self.clock.now_s = self.standin.advance(seconds)

    async def finish(self, process: Process) -> None:
        while (wait_s := await process.sender.drive()) is not None:
            self.pass_time(wait_s)

    def billed(self) -> Counter[str]:
        """identifier → units that the stand-in lists for our customers."""
        units = Counter[str]()
        for event in self.standin.events():
            if event["customer"] in self.customers.values():
                assert event["error"] == ""
                units[event["identifier"]] += int(event["value"])
        return units


@pytest.fixture
async def rails(running: Standin, request: pytest.FixtureRequest) -> AsyncIterator[Rails]:
    running.set_clock(max(T0, running.now_s()) // HOUR_S * HOUR_S + 2 * HOUR_S)
    port = StripePort(running.key, running.url, timeout_s=2)
    for name in ("calls", "tokens"):
        await port.ensure_meter(name)
    accounts = [f"a{number}" for number in range(12)]
    made = {account: await port.ensure_customer(f"{request.node.name}-{account}") for account in accounts}
    yield Rails(running, port, made)
    running.heal()
    await port.close()


async def test_through_http_faults_of_every_kind_bill_once(rails: Rails) -> None:
    """With refusals, hangs, dropped connections and lost answers ordered at the stand-in, its list equals the topic."""
    for number in range(60):
        rails.publish(number + 1, f"a{number % 12}", event_name=["calls", "tokens"][number % 2], flush=number)
    for fault in ("500", "accept_500", "429", "drop", "accept_drop", "accept_cut", "hang", "accept_hang"):
        rails.standin.fault(fault, count=3 if "hang" not in fault else 1)
    await rails.finish(process := rails.start())
    assert rails.billed() == owed(rails.topic)
    assert process.sender.status()["alarms"] == []
    assert sum(count for name, count in rails.standin.admin("counters").items() if name.startswith("fault_")) >= 20


@pytest.mark.parametrize("hours", [19, 21, 25, 49])
@pytest.mark.parametrize("fault", ["drop", "accept_drop"])
async def test_through_http_an_answer_lost_for_a_day_bills_once(rails: Rails, fault: str, hours: int) -> None:
    """Both clocks jump past 20 and 24 hours after a lost answer: once billed, whether or not Stripe had taken it."""
    rails.publish(2, "a1")
    await rails.finish(process := rails.start())
    rails.publish(5, "a1", flush=1)
    process.catch_up()
    rails.standin.fault(fault)
    await process.sender.drive()
    rails.pass_time(hours * HOUR_S)
    process = rails.start()
    rails.publish(7, "a1", at_s=rails.topic.events[0]["last_occurred_at"] // 1_000_000, flush=2)
    process.catch_up()
    await rails.finish(process)
    assert rails.billed() == owed(rails.topic)
    assert process.sender.status()["alarms"] == []


async def test_one_customer_of_two_partitions_is_told_to_wait_and_billed_once(rails: Rails) -> None:
    """Two senders that call for one pair at once: one gets 429, comes back, and both deltas are billed."""
    rails.customers["a2"] = rails.customers["a1"]
    partitions = [Topic(), Topic()]
    for number, topic in enumerate(partitions):
        topic.publish(5 + number, account=f"a{number + 1}", customer=rails.customers["a1"], at_s=rails.clock.now_s)
    rails.standin.admin("settings", {"latency_ms": 300})
    senders = [Process(topic, rails.port, [], rails.clock).sender for topic in partitions]
    await asyncio.gather(*(sender.drive() for sender in senders))
    assert sorted(len(sender.status()["pending"]) for sender in senders) == [0, 1]
    rails.pass_time(BACKOFF_MAX_S)
    await asyncio.gather(*(sender.drive() for sender in senders))
    assert rails.billed() == owed(partitions[0]) + owed(partitions[1])


async def test_the_stand_in_killed_in_mid_run_has_every_unit_once(tmp_path: Path) -> None:
    """kill -9 of Stripe's stand-in while rounds are in flight, three times, and of the sender once: sums stay exact."""
    with Standin(tmp_path) as standin:
        standin.set_clock(NOW)
        port = StripePort(standin.key, standin.url, timeout_s=2)
        await port.ensure_meter("calls")
        customers = {f"a{number}": await port.ensure_customer(f"a{number}") for number in range(40)}
        rails = Rails(standin, port, customers)
        for number in range(400):
            rails.publish(number + 1, f"a{number % 40}", flush=number)
        process = rails.start()
        for kill_after in (60, 150, 280):
            task = asyncio.create_task(process.sender.drive())
            while task.done() or len(standin.events()) < kill_after:
                if task.done():
                    task = asyncio.create_task(process.sender.drive())
                await asyncio.sleep(0.001)
            standin.kill()
            await task
            standin.start()
            standin.wait_ready()
            rails.clock.now_s = standin.now_s()
            if kill_after == 150:
                process = rails.start()  # our own crash: outcomes since the last save are forgotten
            rails.pass_time(BACKOFF_MAX_S)
        await rails.finish(process)
        assert rails.billed() == owed(rails.topic)
        assert process.sender.status()["dead"] == []
        await port.close()
