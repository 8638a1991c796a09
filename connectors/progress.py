"""What became of a spool's sequences: in each lane the first ones are acknowledged, and ranges behind them are given up."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tollway.schemas.lane import LANES


class GivenUp:
    """Sequences that will not be sent, by lane. Ranges are added ascending; acknowledged ones are forgotten."""

    def __init__(self) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def add(self, lane: int, first: int, last: int, settled: int) -> None:
        """`first` to `last` (none where it is smaller); all up to `settled` is done with."""
        if last < first:
            return
        ranges = self._ranges[lane]
        while ranges and ranges[0][1] <= settled:
            del ranges[0]
        if ranges and ranges[-1][1] + 1 == first:
            first = ranges.pop()[0]
        ranges.append((first, last))

    def holds(self, lane: int, sequence: int) -> bool:
        ranges = self._ranges.get(lane)
        if not ranges:
            return False
        at = bisect_left(ranges, sequence, key=lambda each: each[1])
        return at < len(ranges) and ranges[at][0] <= sequence

    def between(self, lane: int, after: int, to: int) -> int:
        """How many of `after` + 1 … `to`."""
        return sum(max(0, min(last, to) - max(first - 1, after)) for first, last in self._ranges.get(lane, ()))


class Progress:
    """Of one spool. Dropped ones are known by their count in the lane, expired ones by their own number."""

    def __init__(self) -> None:
        self._settled = [0] * LANES
        self._expired, self._dropped = GivenUp(), GivenUp()
        self._passed = [0] * LANES
        """Events a lane in segments that are deleted."""

    def settle(self, sequences: Mapping[int, int]) -> None:
        """lane → the sequence up to which all is acknowledged."""
        for lane, sequence in sequences.items():
            self._settled[lane] = sequence

    def expire(self, frames: Iterable[tuple[int, int, int, bytes, bytes]]) -> None:
        """Taken, and too old to be sent; what was taken before them may still be in flight."""
        for _, sequence, lane, _, _ in frames:
            self._expired.add(lane, sequence, sequence, self._settled[lane])

    def drop(self, earlier: Iterable[Sequence[int]], dropped: Sequence[int]) -> None:
        """Events a lane: in the segments that are there before it, and in the one that is dropped."""
        before = [sum(counts) for counts in zip(self._passed, *earlier, strict=True)]
        for lane, count in enumerate(dropped):
            self._dropped.add(lane, before[lane] + 1, before[lane] + count, self._settled[lane])

    def delete(self, by_lane: Sequence[int]) -> None:
        """The events of a segment that is deleted, acknowledged or dropped."""
        self._passed = [passed + count for passed, count in zip(self._passed, by_lane, strict=True)]

    def done(self, lane: int, sequence: int) -> bool:
        """Whether it need not be sent again."""
        return sequence <= self._settled[lane] or self._expired.holds(lane, sequence)

    def outstanding(self, sequences: Sequence[int]) -> dict[int, int]:
        """lane → how many up to its sequence are neither acknowledged nor given up."""
        found = {}
        for lane, (last, settled) in enumerate(zip(sequences, self._settled, strict=True)):
            if last > settled:
                given_up = self._dropped.between(lane, settled, last) + self._expired.between(lane, settled, last)
                if last - settled > given_up:
                    found[lane] = last - settled - given_up
        return found
