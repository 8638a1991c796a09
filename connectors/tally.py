"""What was emitted and what became of it, counted."""

from collections import Counter
from typing import Any


class Tally:
    """`emitted` = `acknowledged` + `expired` + `dropped` + `lost` + what still waits.

    Events of dead processes were emitted elsewhere: they count as `resumed` here. `too_old` counts both kinds, of which
    `expired` are our own; `corrupt` counts stretches of a spool that were set aside, `lost` our own events in them;
    `torn` is what a crash cut short before emit() returned. Each counter is changed by one thread at a time: those of
    emit() under the emitter's lock, the others by the sender.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.emitted = self.acknowledged = self.resumed = 0
        self.too_old = self.expired = self.dropped = self.lost = self.corrupt = self.torn = 0

    def counts(self) -> dict[str, Any]:
        """JSON-able."""
        names = ("emitted", "acknowledged", "resumed", "too_old", "expired", "dropped", "lost", "corrupt", "torn")
        return {**{name: getattr(self, name) for name in names}, "refused": dict(self.refused)}

    @property
    def waiting(self) -> int:
        """Own events whose fate is open."""
        return self.emitted - self.acknowledged - self.expired - self.dropped - self.lost

    def acknowledge(self, count: int, *, own: bool) -> None:
        """The broker has them."""
        if own:
            self.acknowledged += count
        else:
            self.resumed += count

    def expire(self, count: int, *, own: bool) -> None:
        """Too old to be sent."""
        self.too_old += count
        if own:
            self.expired += count

    def drop(self, count: int) -> None:
        """Given up to make room."""
        self.dropped += count

    def lose(self, count: int) -> None:
        """Cannot be read any more."""
        self.lost += count
