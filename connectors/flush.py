"""Waiting until all that was emitted before is acknowledged, and counting what is not."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from tollway.connectors.spool import End


class Flushes:
    """Who waits, and for what: the ends that an emitter's spools had when it was asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: list[tuple[Sequence[End], Future[None]]] = []

    def wait(self, ends: Sequence[End]) -> Future[None]:
        """Resolved, by `notify`, once nothing before the ends is outstanding."""
        waiter: Future[None] = Future()
        with self._lock:
            self._waiters.append((ends, waiter))
        self.notify()
        return waiter

    def notify(self) -> None:
        """Wake those whose ends are reached; forget those who gave up."""
        if not self._waiters:
            return
        with self._lock:
            reached = [waiter for ends, waiter in self._waiters if all(map(_is_reached, ends))]
            self._waiters = [each for each in self._waiters if each[1] not in reached and not each[1].done()]
        for waiter in reached:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)


def _is_reached(end: End) -> bool:
    return end.spool.settled_to(end.position)


def outstanding(ends: Sequence[End]) -> dict[int, int]:
    """lane → events before the ends that are neither acknowledged nor given up."""
    found: Counter[int] = Counter()
    for end in ends:
        if not _is_reached(end):
            found.update(end.spool.progress.outstanding(end.sequences))
    return dict(found)
