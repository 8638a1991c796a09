"""Strikes of a crash campaign: kill −9, and SIGSTOP for longer than the session with SIGCONT after it, at random moments.

A group's next strike waits until the last one is over, or, with a stated probability, comes before that.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from tests.crash_effects import Recoveries, Strike
from tests.crash_targets import SERVERS, SERVES, Target

POLL_S, BUSY_POLL_S = 0.05, 0.1
BUSY_WAIT_S = 20.0
"""So long a strike waits for its process to have work; one that has none by then is passed over, and nothing is spent."""
AGAIN_S = (0.2, 2.5)
"""Behind a strike, where the next one does not wait for its end."""
SIGKILL, SIGSTOP = "SIGKILL", "SIGSTOP"
Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Cards in random order, each as often as it is in the deck."""

    def __init__(self, random: Random, cards: Sequence[Card]) -> None:
        self._random, self._cards = random, list(cards)
        self._left: list[Card] = []

    def draw(self) -> Card:
        if not self._left:
            self._left = self._random.sample(self._cards, len(self._cards))
        return self._left.pop()


@dataclass(frozen=True)
class Plan:
    """How one group of processes is struck."""

    group: str
    names: tuple[str, ...]
    """A name that stands twice is struck twice as often."""
    gap_s: float
    """Mean time between two strikes."""
    stops: float = 0.5
    """Share of strikes that stop and continue."""
    again: float = 0.3
    """Probability that the next strike does not wait until this one is over."""
    stop_s: tuple[float, float] = (2.0, 5.0)
    share: float = 1.0
    """Most of all strikes that may fall on it: who comes back at once would else take them from those who need seconds."""
    least: int = 0
    """So many are kept for it, while it can be struck: who needs seconds before its first work would else get none."""
    apart: bool = False
    """Each of them has work of its own: one does not wait for another's recovery."""


class Budget:
    """How many strikes there are to be, all groups together."""

    def __init__(self, strikes: int, plans: Sequence[Plan]) -> None:
        self._strikes, self._left, self._lock = strikes, strikes, threading.Lock()
        self._taken: Counter[str] = Counter()
        self._kept = Counter({plan.group: plan.least for plan in plans})

    def take(self, plan: Plan) -> bool:
        """Whether one is left, for this group too."""
        with self._lock:
            free = self._left > self._kept.total() or (self._left > 0 and self._kept[plan.group] > 0)
            if not free or self._taken[plan.group] >= plan.share * self._strikes:
                return False
            self._left -= 1
            self._taken[plan.group] += 1
            self._kept[plan.group] = max(0, self._kept[plan.group] - 1)
            return True

    def release(self, plan: Plan) -> None:
        """It cannot be struck any more: nothing is kept for it."""
        with self._lock:
            self._kept[plan.group] = 0

    @property
    def spent(self) -> bool:
        return self._left <= 0


class Striker(threading.Thread):
    """Strikes one group until the budget is spent or `close`; `failure` says why it could not."""

    def __init__(
        self, plan: Plan, targets: dict[str, Target], seed: int, budget: Budget, recoveries: Recoveries
    ) -> None:
        super().__init__(name=f"striker.{plan.group}", daemon=True)
        self.plan, self.targets, self.budget, self.recoveries = plan, targets, budget, recoveries
        self.random = Random(f"{seed}/strikes/{plan.group}")
        self.names = Deck(self.random, plan.names)
        self.ways = Deck(self.random, [SIGSTOP] * round(10 * plan.stops) + [SIGKILL] * (10 - round(10 * plan.stops)))
        self.failure: str | None = None
        self._stopped: dict[str, tuple[int, float, Strike]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: it becomes a fault of the report
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.budget.release(self.plan)
            self._wake(all_of_them=True)

    def _work(self) -> None:
        next_at, again = time.monotonic() + self.random.uniform(0.2, 1.0) * self.plan.gap_s, False
        while not self._ended.is_set() and not self.budget.spent:
            self._wake()
            name = self._next(again) if time.monotonic() >= next_at else None
            if name is not None:
                self._strike(name, again)
                again = self.random.random() < self.plan.again
                rest_s = self.random.uniform(*AGAIN_S) if again else self.random.uniform(0.5, 1.5) * self.plan.gap_s
                next_at = time.monotonic() + rest_s
            self._ended.wait(POLL_S)
        while self._stopped and not self._ended.wait(POLL_S):
            self._wake()

    def _next(self, again: bool) -> str | None:
        """Who is struck now; None while what it would hit is still on its way back."""
        if again:
            return self.names.draw()
        away = {strike.process for strike in self.recoveries.open_in(self.plan.group)}
        if away and not self.plan.apart:
            return None
        return next((name for name in (self.names.draw() for _ in self.plan.names) if name not in away), None)

    def _recovering(self, name: str) -> bool:
        """Whether something that this strike would hit is on its way back."""
        if self.plan.group == SERVERS:
            return bool(self.recoveries.open_in(SERVERS, *SERVES[name]))
        away = self.recoveries.open_in(self.plan.group)
        mine = any(strike.process == name for strike in away) if self.plan.apart else bool(away)
        return mine or bool(self.recoveries.open_in(SERVERS))

    def _strike(self, name: str, again: bool) -> None:
        how = SIGKILL if name in self._stopped else self.ways.draw()
        target = self.targets[name]
        partitions, lag = self._await_work(target, again)
        pid, recovering = target.pid(), self._recovering(name)
        if pid is None or self._ended.is_set() or not (lag or recovering) or not self.budget.take(self.plan):
            return
        kept = Strike(
            name,
            self.plan.group,
            how,
            round(self.recoveries.now_s(), 2),
            lag,
            partitions,
            in_recovery=recovering,
            busy=bool(lag) or recovering,
        )
        if how == SIGKILL:
            self._stopped.pop(name, None)
            target.kill()
        else:
            kept.stopped_s = round(self.random.uniform(*self.plan.stop_s), 2)
            os.kill(pid, signal.SIGSTOP)
            self._stopped[name] = (pid, time.monotonic() + kept.stopped_s, kept)
        self.recoveries.add(kept, target.watch(partitions))

    def _await_work(self, target: Target, again: bool) -> tuple[list[int], int]:
        """At a random moment with work before it; one that is on its way back has work of another kind."""
        until = time.monotonic() + BUSY_WAIT_S
        while True:
            self._wake()
            partitions, lag = target.work()
            started = target.pid() is not None
            if started and (lag or (again and self._recovering(target.name))):
                return partitions, lag
            if time.monotonic() > until or self._ended.is_set():
                return partitions, lag
            self._ended.wait(BUSY_POLL_S)

    def _wake(self, all_of_them: bool = False) -> None:
        """SIGCONT to those whose time has come; the groups have gone on without them."""
        for name, (pid, at, strike) in list(self._stopped.items()):
            if not all_of_them and time.monotonic() < at:
                continue
            del self._stopped[name]
            if self.targets[name].pid() == pid:
                strike.overtaken = strike.recovered_s is not None
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends, and wakes whom it has stopped."""
        self._ended.set()
        self.join()


def over(strikers: list[Striker]) -> bool:
    """Whether all have done their part."""
    return not any(striker.is_alive() for striker in strikers)
