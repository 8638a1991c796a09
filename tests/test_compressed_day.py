"""A day of Stripe away in seconds: what nobody knows the outcome of, on both sides of 20 and 24 hours, is billed once."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.sender_process import Sender, SharedClock
from tests.sinks_site import DEADLINE_S, PARTITIONS, Site, log_of, running, site_of, until
from tests.stripe_line import Fate, Line, serving
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
KILLED = -9
TROUBLES = ("drop", "accept_drop", "500", "accept_500", "429", "accept_cut")
WAVES: tuple[tuple[tuple[int, int], tuple[Fate, ...]], ...] = (
    ((25, 27), ("taken", "not taken", "foreign", "killed")),
    ((21, 22), ("taken", "not taken")),
    ((12, 18), ("taken", "not taken")),
)
"""(hours before Stripe is back, a range; what becomes of one account's meter event each). Sent again at 25 to 28 hours, an
event that was taken is billed twice; at 21 to 23 it would not be, and one taken for delivered is lost at both."""
ACCOUNTS = sum(len(fates) for _, fates in WAVES)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("standin")) as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, standin: Standin) -> Iterator[Settings]:
    with log_of(tmp_path_factory.mktemp("log"), stripe_url=standin.url, stripe_key=standin.key) as found:
        asyncio.run(declare(found))
        yield found


async def declare(settings: Settings) -> None:
    """The meter of all seeds."""
    async with site_of(settings) as site:
        await site.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})


class Day:
    """A seeded day of a sender's life between the log and the stand-in."""

    def __init__(self, site: Site, standin: Standin, seed: int, folder: Path) -> None:
        self.site, self.standin, self.rng = site, standin, random.Random(seed)
        self.clock = SharedClock(folder / "clock")
        self.names = [site.account(n % PARTITIONS, seed * ACCOUNTS + n // PARTITIONS) for n in range(ACCOUNTS)]
        self.rng.shuffle(self.names)
        self.customers: dict[str, str] = {}
        self.line: Line
        self.sender: Sender
        self._hopped = 0.0
        self._faults = 0
        self.at(int(time.time()))

    def at(self, now_s: int) -> None:
        """Set both clocks; the sender's first, so that it never thinks an attempt younger than Stripe does."""
        self.clock.set(now_s, RATE)
        self.standin.admin("clock", {"set_s": now_s, "rate": RATE})

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """A line, customers of this day's own, and a sender that has not started yet."""
        port = StripePort(self.standin.key, self.standin.url)
        await port.ensure_meter("calls")
        self.customers = {name: await port.ensure_customer(name) for name in self.names}
        stranger = await port.ensure_customer("stranger")
        await port.close()
        await self.site.open(self.names, self.customers.__getitem__)
        self.line = Line(self.standin, stranger, self.clock, lambda: self.sender.kill())
        async with serving(self.line):
            settings = self.site.settings.model_copy(update={"stripe_url": self.line.url})
            self.sender = Sender(settings, self.site.epoch, self.clock)
            try:
                yield
            finally:
                self.sender.kill()

    async def emit(self, names: list[str]) -> None:
        """Some usage of each account."""
        for name in names:
            await self.site.emit(name, self.rng.randrange(1, 6))

    async def published(self) -> None:
        """Wait until the topic has all that was used."""
        async with asyncio.timeout(DEADLINE_S):
            while sum((await self.owed()).values()) < sum(self.site.sent.values()):
                await asyncio.sleep(0.1)

    async def until_hour(self, then_s: int) -> None:
        """Time passes in hops of an hour at most, none while a call is under way."""
        while (left_s := then_s - self.clock()) > 0:
            await until(lambda: time.monotonic() - self._hopped >= HOP_S and not self.line.under_way)
            self.sender.keep()
            self.at(self.clock() + min(HOUR_S, left_s))
            self._hopped = time.monotonic()

    async def bad_hour(self) -> None:
        """Before the day: calls that fare badly, some after Stripe has taken them; the sender killed round its calls."""
        faults = (*TROUBLES, *self.rng.choices(TROUBLES, k=2), "hang", "accept_hang")
        before = self.fared()
        for fault in faults:
            self.standin.fault(fault)
        await self.emit(self.names)
        await self.published()
        await self.life("stripe.after_attempts:1")
        await self.life(f"stripe.after_calls:{self.rng.randrange(1, PARTITIONS)}")
        await self.kept(lambda: self.fared() >= before + len(faults))
        await self.settled()

    def fared(self) -> int:
        """How many calls have fared badly."""
        return sum(count for name, count in self.standin.admin("counters").items() if name.startswith("fault_"))

    async def life(self, failpoint: str) -> None:
        """Processes, until one has died at the failpoint; then another."""
        self.sender.kill()
        self.sender.start(failpoint)
        while True:
            await until(self.sender.died)
            self.sender.start()
            if self.sender.deaths[-1] == KILLED:
                return

    async def kept(self, holds: Callable[[], bool]) -> None:
        """Wait, and keep a sender alive."""

        def look() -> bool:
            self.sender.keep()
            return holds()

        await until(look)

    async def away(self) -> None:
        """Stripe goes away; each wave of meter events meets its fates, and hours pass between, until it is back."""
        ages_h = [self.rng.uniform(*ages) for ages, _ in WAVES]
        back_s = self.clock() + int(ages_h[0] * HOUR_S)
        self.line.away(list(self.customers.values()))
        begun: list[str] = []
        for age_h, (_, fates) in zip(ages_h, WAVES, strict=True):
            await self.until_hour(back_s - int(age_h * HOUR_S))
            self.line.cut = False
            for killed in (False, True):  # the kill comes when all other attempts of the wave have been made
                wave = dict(
                    zip(self.names[len(begun) :], [f for f in fates if (f == "killed") is killed], strict=False)
                )
                begun += wave
                await self.meet(wave, begun)
            self.line.cut = True
        await self.until_hour(back_s)

    async def meet(self, wave: dict[str, Fate], begun: list[str]) -> None:
        """A wave: first attempts at new meter events of its accounts; others queue behind those that are in doubt."""
        if not wave:
            return
        self.line.fates |= {self.customers[name]: fate for name, fate in wave.items()}
        await self.emit(begun)
        deaths = len(self.sender.deaths)
        await self.kept(lambda: len(self.line.first_s) == len(begun))
        if "killed" in wave.values():
            assert self.sender.deaths[deaths:] == [KILLED]
            self.sender.start()

    async def back(self) -> None:
        """Stripe is back, in a storm of refusals; no hour passes until it has been asked what became of each event."""
        for fault, count in (("429", 8), ("500", 2), ("accept_500", 2)):
            self.standin.fault(fault, count)
        self.sender.kill()
        self.line.back()
        self.sender.start("stripe.after_attempts:1")
        async with asyncio.timeout(DEADLINE_S):
            while not self.line.settled.issuperset(self.customers.values()) and await self.pending():
                self.sender.keep()
                await asyncio.sleep(0.1)

    async def settled(self) -> None:
        """Let time pass until the topic has all that was used and the sender nothing pending."""
        await self.published()
        async with asyncio.timeout(DEADLINE_S):
            while await self.pending():
                await self.until_hour(self.clock() + HOUR_S)

    async def pending(self) -> int:
        """What the sender's checkpoints still hold, and what it has not read."""
        group = (await status(self.site.settings))["groups"]["stripe"]
        return int(group["lag"]) + sum(row.get("pending", 0) for row in group["partitions"])

    async def owed(self) -> Counter[str]:
        """identifier → units of this day's accounts in the topic."""
        found = await read_newest(self.site.settings.kafka_bootstrap, {}, METER_EVENTS.name, range(PARTITIONS), None)
        events = [codec.decode(record.value)[1] for records in found.values() for record in records if record.value]
        return Counter({identifier(event): event["units"] for event in events if event["account"] in self.names})

    def billed(self) -> Counter[str]:
        """identifier → units that Stripe has taken from this day's customers; one taken twice counts twice."""
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


@asynccontextmanager
async def day_of(settings: Settings, standin: Standin, seed: int, folder: Path) -> AsyncIterator[Day]:
    """A world with its accounts folded; the sender is not started yet."""
    async with site_of(settings) as site, running(site.accounts()):
        standin.heal()
        day = Day(site, standin, seed, folder)
        async with day.open():
            yield day


def band(age_s: int) -> str:
    """On which side of 20 and 24 hours."""
    return "past 24 h" if age_s > 24 * HOUR_S else "past 20 h" if age_s > 20 * HOUR_S else "younger"


@pytest.mark.parametrize("seed", range(int(os.environ.get("DAYS", "1"))))
async def test_in_a_compressed_day_without_stripe_each_unit_is_billed_once(
    settings: Settings, standin: Standin, tmp_path: Path, seed: int
) -> None:
    """Meter events taken and not taken and never answered, from 12 to 27 hours old when Stripe is back, storms of 429 and
    5xx, the sender killed round its calls: Stripe's own list is the topic's, unit for unit, no identifier taken twice."""
    async with day_of(settings, standin, seed, tmp_path) as day:
        await day.bad_hour()
        standin.heal()
        await day.away()
        ages_s = [day.clock() - day.line.first_s[day.customers[name]] for name in day.names]
        assert [band(age_s) for age_s in ages_s] == ["past 24 h"] * 4 + ["past 20 h"] * 2 + ["younger"] * 2
        assert max(day.line.tries.values()) > 1
        await day.back()
        await day.settled()
        assert day.billed() == await day.owed()
        assert day.units() == day.site.sent
        assert day.sender.deaths.count(KILLED) >= 4
