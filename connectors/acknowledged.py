"""Where in the log the newest acknowledged events stand."""

from collections import defaultdict, deque

REMEMBERED_MAX = 100_000
"""Sequences; older ones are forgotten first."""


class Acknowledged:
    """(source, lane, sequence) → offset, kept by batch: remembering costs a list a batch, asking a scan from the newest."""

    def __init__(self, remembered_max: int = REMEMBERED_MAX) -> None:
        self._max = remembered_max
        self._count = 0
        self._partitions = 1
        self._batches: dict[int, deque[tuple[str, int, list[int]]]] = defaultdict(deque)
        self._order: deque[int] = deque()

    def remember(self, source: str, partition: int, partitions: int, offset: int, marks: list[int]) -> None:
        """A batch, by its marks, stands in the log from `offset` on."""
        if partitions != self._partitions:
            self._batches.clear()
            self._order.clear()
            self._count, self._partitions = 0, partitions
        self._batches[partition].append((source, offset, marks))
        self._order.append(partition)
        self._count += len(marks)
        while self._count > self._max:
            self._count -= len(self._batches[self._order.popleft()].popleft()[2])

    def offset(self, source: str, lane: int, sequence: int) -> int | None:
        """None where it is not acknowledged, or no longer remembered."""
        mark = sequence << 8 | lane
        for of_source, first, marks in reversed(list(self._batches.get(lane % self._partitions, ()))):
            if of_source == source and mark in marks:
                return first + marks.index(mark)
        return None
