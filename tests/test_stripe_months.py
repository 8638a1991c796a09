"""Simulated months of a sender's life: crashes, zombies, outages of hours and days, lost answers, late summaries."""

import asyncio
import random
from typing import Any

import pytest

from tests.stripe_world import HOUR_S, Clock, Crash, Process, Rail, Topic, owed, turns

DAY_S = 86_400
STEPS, CALM_STEPS = 50, 10
TROUBLES = ("", "lost", "accepted, lost", "busy", "crash", "accepted, crash")


class Month:
    """One seeded world. `calm`: no more faults, so that all must come to rest."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock, self.topic, self.saved = Clock(), Topic(), list[bytes]()
        self.calm = False
        self.weights = self.rng.choice([(80, 5, 5, 5, 3, 2), (40, 15, 15, 20, 5, 5), (90, 0, 8, 0, 1, 1)])
        self.rail = Rail(self.clock, self.trouble)
        self.rail.open("calls", "tokens", customers=("cus_a1", "cus_a2", "cus_a3"))
        self.rail.delay_s = self.rng.choice([0, 60, 290])
        self.sleepers: list[asyncio.Task[Any]] = []
        self.owner = self.live()

    def trouble(self, call: str) -> str:
        if self.calm:
            return ""
        return self.rng.choices(TROUBLES, self.weights)[0] if call == "send" else self.rng.choice(["", "", "away"])

    def live(self) -> Process:
        """A new process takes the partition over, from the last save."""
        self.owner = Process(
            self.topic,
            self.rail,
            self.saved,
            self.clock,
            self.rng.randrange(2**32),
            owner=lambda: self.owner,
            before_save=self.perhaps_crash,
            after_save=self.perhaps_freeze,
        )
        return self.owner

    async def perhaps_crash(self) -> None:
        await asyncio.sleep(0)
        if not self.calm and self.rng.random() < 0.05:
            raise Crash

    async def perhaps_freeze(self) -> None:
        """Crash, or sleep between save and call while another process takes over."""
        await self.perhaps_crash()
        if not self.calm and self.rng.random() < 0.03:
            woken_s = self.clock.now_s + self.rng.choice([5, 50, 70, 4_000, 90_000])
            self.live()
            await turns(lambda: self.clock.now_s >= woken_s)

    async def round(self) -> int | None:
        """One round of the owner; a frozen one is left to its sleep, a crashed one followed by the next."""
        process = self.owner
        task = asyncio.create_task(process.sender.drive())
        await turns(lambda: task.done() or self.owner is not process)
        if not task.done():
            self.sleepers.append(task)
            return 0
        try:
            return task.result()
        except Crash:
            self.clock.now_s += self.rng.choice([0, 1, 30, 3600, 21 * HOUR_S, 26 * HOUR_S])
            self.live()
            return 0

    def publish(self) -> None:
        """Some usage, some of it late."""
        for _ in range(self.rng.randrange(4)):
            account, event_name = f"a{self.rng.randrange(1, 4)}", self.rng.choice(["calls", "tokens"])
            at_s = self.clock.now_s - self.rng.choice([0, 60, 3600, 3 * DAY_S])
            self.topic.publish(self.rng.randrange(1, 10), account=account, event_name=event_name, at_s=at_s)
        self.owner.catch_up()

    async def drive(self, rounds: int) -> None:
        for _ in range(rounds):
            wait_s = await self.round()
            if wait_s is None:
                break
            self.clock.now_s += wait_s
        self.clock.now_s += self.rng.choice([0, 5, 600, 3600, 19 * HOUR_S, 25 * HOUR_S])

    async def run(self) -> None:
        for _ in range(STEPS):
            self.publish()
            await self.drive(self.rng.randrange(1, 6))
        self.calm = True
        for _ in range(CALM_STEPS):
            await self.drive(200)
        self.clock.now_s += DAY_S * 2
        for task in self.sleepers:
            await turns(task.done)
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("block", range(10))
async def test_in_every_simulated_month_each_unit_is_billed_once(block: int) -> None:
    """Over seeded worlds with every fault at once: Stripe's own list holds each delta exactly once, nothing is left over."""
    for seed in range(block * 30, block * 30 + 30):
        month = Month(seed)
        await month.run()
        assert month.rail.billed() == owed(month.topic), f"seed {seed}"
        status = month.owner.sender.status()
        assert (status["pending"], status["dead"]) == ([], []), f"seed {seed}"
