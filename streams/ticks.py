"""Which idle partitions get a tick: where nothing arrives, log time moves on and windows close all the same."""

from collections.abc import Iterable

from tollway.streams.fold import Fold
from tollway.streams.owned import Owned


class Ticks:
    """Times are the engine's monotonic clock, in seconds."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._last: dict[int, float] = {}

    def due(self, fold: Fold, owned: dict[int, Owned], now: float) -> list[int]:
        """Partitions that have heard of nothing for so long, behind their `log.open`."""
        if not fold.ticks:
            return []
        return [
            number
            for number, each in owned.items()
            if not each.stopped
            and not each.paused
            and now - max(each.heard_at, self._last.get(number, 0.0)) >= self._idle_s
            and (each.stash or fold.may_tick(each.state))
        ]

    def sent(self, partitions: Iterable[int], now: float) -> None:
        """The broker has them."""
        self._last.update(dict.fromkeys(partitions, now))
