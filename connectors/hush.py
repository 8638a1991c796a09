"""aiokafka says the same thing some fifty times a second while no broker answers: once a minute is enough."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

EVERY_S = 60.0
KINDS_MAX = 256
"""Kinds of line remembered by one logger; the longest unheard is forgotten, and then said again."""


class OnceAMinute(logging.Filter):
    """Lets each kind of line (level and text without its values) pass once in `every_s`, then says how many it left out."""

    def __init__(self, every_s: float = EVERY_S, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every_s, self._clock_s = every_s, clock_s
        self._said: OrderedDict[tuple[int, str], list[float]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """False where this kind was said less than `every_s` ago."""
        kind, now = (record.levelno, str(record.msg)), self._clock_s()
        said = self._said.get(kind)
        if said is not None and now - said[0] < self._every_s:
            said[1] += 1
            return False
        if said is not None and said[1]:
            record.msg = f"{record.msg} (and {said[1]:.0f} lines like it)"
        self._said[kind] = [now, 0]
        self._said.move_to_end(kind)
        while len(self._said) > KINDS_MAX:
            self._said.popitem(last=False)
        return True

    def left_out(self) -> int:
        """Lines left out since their kinds last passed."""
        return int(sum(count for _, count in self._said.values()))


def hush(prefix: str = "aiokafka") -> None:
    """Put the filter on the loggers of a package that is imported; those that have it keep theirs."""
    for name in [name for name in logging.root.manager.loggerDict if name == prefix or name.startswith(f"{prefix}.")]:
        found = logging.getLogger(name)
        if not any(isinstance(known, OnceAMinute) for known in found.filters):
            found.addFilter(OnceAMinute())
