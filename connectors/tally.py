"""What was emitted and what became of it: counts, and who waits for them."""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from tollway.schemas.lane import LANES


class Tally:
    """`emitted` = `acknowledged` + `expired` + `dropped` + `lost` + what still waits.

    Events of dead processes were emitted elsewhere: they count as `resumed` here. `too_old` counts both kinds, of which
    `expired` are our own; `corrupt` counts stretches of a spool that were set aside, `lost` our own events in them;
    `torn` is what a crash cut short before emit() returned.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.emitted = self.acknowledged = self.resumed = 0
        self.too_old = self.expired = self.dropped = self.lost = self.corrupt = self.torn = 0
        self.emitted_by_lane = [0] * LANES
        self._settled_by_lane = [0] * LANES
        self._lock = threading.Lock()
        self._waiters: list[tuple[Sequence[int], Future[None]]] = []

    def counts(self) -> dict[str, Any]:
        """JSON-able."""
        names = ("emitted", "acknowledged", "resumed", "too_old", "expired", "dropped", "lost", "corrupt", "torn")
        return {**{name: getattr(self, name) for name in names}, "refused": dict(self.refused)}

    @property
    def waiting(self) -> int:
        """Own events whose fate is open."""
        return self.emitted - self.acknowledged - self.expired - self.dropped - self.lost

    def append(self, lane: int) -> None:
        """Under the emitter's lock."""
        self.emitted += 1
        self.emitted_by_lane[lane] += 1

    def take_back(self, lane: int) -> None:
        """It was refused after all. Under the emitter's lock."""
        self.emitted -= 1
        self.emitted_by_lane[lane] -= 1

    def acknowledge(self, by_lane: Mapping[int, int], *, own: bool) -> None:
        """The broker has them."""
        with self._lock:
            if own:
                self.acknowledged += self._settle(by_lane)
            else:
                self.resumed += sum(by_lane.values())

    def expire(self, by_lane: Mapping[int, int], *, own: bool) -> None:
        """Too old to be sent."""
        with self._lock:
            self.too_old += sum(by_lane.values())
            if own:
                self.expired += self._settle(by_lane)

    def drop(self, by_lane: Iterable[int]) -> None:
        """Given up to make room."""
        with self._lock:
            self.dropped += self._settle(dict(enumerate(by_lane)))

    def lose(self, by_lane: Iterable[int]) -> None:
        """Cannot be read any more."""
        with self._lock:
            self.lost += self._settle(dict(enumerate(by_lane)))

    def _settle(self, by_lane: Mapping[int, int]) -> int:
        for lane, count in by_lane.items():
            self._settled_by_lane[lane] += count
        return sum(by_lane.values())

    def outstanding(self, target: Sequence[int]) -> dict[int, int]:
        """lane → how many of the first `target[lane]` events emitted in it are not settled."""
        with self._lock:
            settled = self._settled_by_lane
            return {n: target[n] - settled[n] for n in range(LANES) if target[n] > settled[n]}

    def wait(self, target: Sequence[int]) -> Future[None]:
        """Resolved, by `notify`, once nothing up to the target is outstanding."""
        waiter: Future[None] = Future()
        with self._lock:
            self._waiters.append((target, waiter))
        self.notify()
        return waiter

    def notify(self) -> None:
        """Wake those whose target is reached; forget those who gave up."""
        if not self._waiters:
            return
        reached = [waiter for target, waiter in list(self._waiters) if not self.outstanding(target)]
        with self._lock:
            self._waiters = [
                (target, waiter) for target, waiter in self._waiters if waiter not in reached and not waiter.done()
            ]
        for waiter in reached:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
