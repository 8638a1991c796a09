"""Refused calls, folded: one event per principal, operation, status and second, so that a flood of them is no flood of usage."""

from typing import Any

SECOND_US = 1_000_000
_KEY = ("account", "principal_kind", "principal", "surface", "operation", "status")
_Key = tuple[object, ...]


class Refusals:
    """Folds still open. At most `open_max`: beyond, the oldest is closed early, so nothing is lost. Not thread-safe."""

    def __init__(self, open_max: int) -> None:
        self.open_max = open_max
        self.joined = 0
        """Refusals that went into another one's event."""
        self.closed_early = 0
        self._open: dict[_Key, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a refusal in (with occurred_at and quantities); returns events that made room for it."""
        key = (fields["occurred_at"] // SECOND_US, *(fields.get(name) for name in _KEY))
        known = self._open.get(key)
        if known is not None:
            _join(known, fields)
            self.joined += 1
            return []
        made_room = []
        if len(self._open) >= self.open_max:
            made_room.append(self._open.pop(next(iter(self._open))))
            self.closed_early += 1
        self._open[key] = fields
        return made_room

    def due(self, now_us: int) -> list[dict[str, Any]]:
        """Events whose second is over (or lies ahead: the clock was set back)."""
        second = now_us // SECOND_US
        over = [key for key in self._open if key[0] != second]
        return [self._open.pop(key) for key in over]

    def close(self) -> list[dict[str, Any]]:
        """All of them."""
        left, self._open = list(self._open.values()), {}
        return left


def _join(into: dict[str, Any], one: dict[str, Any]) -> None:
    """Quantities are summed, the earliest time and the longest latency kept; what is not the same in all is left out."""
    into["occurred_at"] = min(into["occurred_at"], one["occurred_at"])
    into["latency_us"] = max(into["latency_us"], one["latency_us"])
    quantities = into["quantities"]
    for meter, units in one["quantities"].items():
        quantities[meter] = quantities.get(meter, 0) + units
    summed = ("occurred_at", "latency_us", "quantities")
    for name in [name for name in into if name not in summed and into[name] != one.get(name)]:
        del into[name]
