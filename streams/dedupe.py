"""Has this call been seen? (source, lane) → (high, holes) for sequenced usage, event ids of an hour for the rest (design §4)."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tollway.schemas.ids import born_ms
from tollway.schemas.lane import LANES
from tollway.schemas.usage import AHEAD_S, SOURCE_LIFE_S, UNSEQUENCED_S
from tollway.streams.batch import ACCEPTED, DUPLICATE, REFUSED

_RADIX = 1 << 16
"""Below it numpy sorts by radix, ten times faster."""
HOLES_MAX = 1_000
"""Hole ranges a (source, lane); one more closes the oldest, whose late ones are dead-lettered `hole_closed`."""


class Seen:
    """Sequences 1 … high have been accepted, except those in `holes`; what lies at or below `floor` is closed."""

    __slots__ = ("floor", "high", "holes")

    def __init__(self, high: int = 0, floor: int = 0, holes: list[list[int]] | None = None) -> None:
        self.high, self.floor = high, floor
        self.holes: list[list[int]] = holes or []
        """Ascending, disjoint [first, last] ranges below `high`."""

    def see(self, sequence: int) -> int:
        """ACCEPTED the first time, DUPLICATE after; REFUSED = at or below a hole that had to be closed."""
        if sequence > self.high:
            if sequence > self.high + 1:
                self.holes.append([self.high + 1, sequence - 1])
                if len(self.holes) > HOLES_MAX:
                    self.floor = self.holes.pop(0)[1]
            self.high = sequence
            return ACCEPTED
        if sequence <= self.floor:
            return REFUSED
        at = bisect_left(self.holes, sequence, key=lambda hole: hole[1])
        if at == len(self.holes) or self.holes[at][0] > sequence:
            return DUPLICATE
        first, last = self.holes[at]
        self.holes[at : at + 1] = [edge for edge in ([first, sequence - 1], [sequence + 1, last]) if edge[0] <= edge[1]]
        return ACCEPTED


class Dedupe:
    """What one partition has accepted. Only accepted records change it: a dead letter does not fill its hole."""

    def __init__(self) -> None:
        self.sources: dict[str, dict[int, Seen]] = {}
        self.event_ids: dict[str, tuple[int, int]] = {}
        """event_id of unsequenced usage → (append ms, lane)."""
        self.duplicates = 0

    def sequenced(
        self,
        sources: Sequence[str],
        codes: npt.NDArray[np.int64],
        lanes: npt.NDArray[np.int64],
        sequences: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint8]:
        """Verdicts of k rows in offset order; `codes` index into the distinct `sources`."""
        verdicts = np.zeros(len(sequences), np.uint8)
        if not len(sequences):
            return verdicts
        pair = codes * LANES + lanes
        small = len(sources) * LANES <= _RADIX
        order = np.argsort(pair.astype(np.uint16) if small else pair, kind="stable")
        pairs, ordered = pair[order], sequences[order]
        starts = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])
        ends = np.r_[starts[1:], len(pairs)]
        gaps = np.r_[0, np.cumsum(np.diff(ordered) != 1)]
        firsts, lasts = ordered[starts].tolist(), ordered[ends - 1].tolist()
        dense = (gaps[ends - 1] == gaps[starts]).tolist()
        for start, end, first, last, is_dense in zip(starts.tolist(), ends.tolist(), firsts, lasts, dense, strict=True):
            key = int(pairs[start])
            lanes_seen = self.sources.setdefault(sources[key // LANES], {})
            seen = lanes_seen.get(key % LANES)
            if seen is None:
                seen = lanes_seen[key % LANES] = Seen()
            if is_dense and first == seen.high + 1:
                seen.high = last
            else:
                verdicts[order[start:end]] = [seen.see(sequence) for sequence in ordered[start:end].tolist()]
        self.duplicates += int(np.count_nonzero(verdicts == DUPLICATE))
        return verdicts

    def unsequenced(self, event_id: str, append_ms: int, lane: int) -> int:
        """ACCEPTED the first time within the hour that admission allows, DUPLICATE after."""
        if event_id in self.event_ids:
            self.duplicates += 1
            return DUPLICATE
        self.event_ids[event_id] = (append_ms, lane)
        return ACCEPTED

    def forget(self, step_time_ms: int, step_s: int) -> None:
        """Drop sources 5 days after birth and event ids past their hour: admission refuses both by then."""
        born_before = step_time_ms - SOURCE_LIFE_S * 1000
        for source in [known for known in self.sources if born_ms(known) < born_before]:
            del self.sources[source]
        old = step_time_ms - (UNSEQUENCED_S + AHEAD_S + step_s) * 1000
        for event_id in [known for known, (at, _) in self.event_ids.items() if at < old]:
            del self.event_ids[event_id]

    def missing(self) -> int:
        """Sequences that a later one has passed: together with dead letters that name them, loss before the log."""
        return sum(
            last - first + 1 for lanes in self.sources.values() for seen in lanes.values() for first, last in seen.holes
        )

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it."""
        return {
            "sources": {
                source: {lane: [seen.high, seen.floor, seen.holes] for lane, seen in lanes.items()}
                for source, lanes in self.sources.items()
            },
            "event_ids": {event_id: list(at) for event_id, at in self.event_ids.items()},
            "duplicates": self.duplicates,
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Dedupe":
        """The inverse of `dump`."""
        dedupe = cls()
        dedupe.sources = {
            source: {lane: Seen(*fields) for lane, fields in lanes.items()}
            for source, lanes in state["sources"].items()
        }
        dedupe.event_ids = {event_id: (at, lane) for event_id, (at, lane) in state["event_ids"].items()}
        dedupe.duplicates = state["duplicates"]
        return dedupe
