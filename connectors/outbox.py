"""What was taken from spools and is not yet acknowledged: batches for each partition, one of them in flight at a time."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from tollway.connectors.frame import Frame
from tollway.connectors.spool import Position, Spool

AHEAD_BYTES, AHEAD_EVENTS = 1 << 20, 1 << 14
"""Taken ahead of the acknowledgements while all partitions flow."""
HELD_BYTES_MAX = 32 << 20
"""Held in all: a partition that stands still does not stop the others until its share reaches this."""
STUCK_S = 2.0


class Batch:
    """Frames of one spool for one partition, as a batch that is being built for the broker.

    The frames themselves are not kept: after a failure they are taken from the spool again.
    """

    __slots__ = ("builder", "in_flight_since_s", "marks", "partition", "position", "size", "spool")

    def __init__(self, spool: Spool, partition: int, position: Position, builder: Any) -> None:
        self.spool, self.partition, self.position, self.builder = spool, partition, position, builder
        self.marks: list[int] = []
        """sequence << 8 | lane, in the batch's order"""
        self.size = 0
        """In bytes, once it is in flight."""
        self.in_flight_since_s = 0.0


class Outbox:
    """Order holds in each lane: frames of a lane are put in order, and its partition has one batch in flight."""

    def __init__(self, ahead_bytes: int = AHEAD_BYTES, ahead_events: int = AHEAD_EVENTS) -> None:
        self._ahead_bytes = min(ahead_bytes, AHEAD_BYTES)
        self._event_bytes = -(-self._ahead_bytes // min(ahead_events, AHEAD_EVENTS))
        self.open(1, lambda: None)

    def open(self, partitions: int, new_builder: Callable[[], Any]) -> None:
        """Empty, for a new producer: spools are rewound."""
        self.partitions, self._new_builder = partitions, new_builder
        self._queues: dict[int, deque[Batch]] = defaultdict(deque)
        self._in_flight: dict[int, Batch] = {}
        self._filling: dict[Spool, dict[int, Batch]] = defaultdict(dict)
        self._outstanding: dict[Spool, set[Batch]] = defaultdict(set)

    def put(self, spool: Spool, frames: list[Frame], position: Position) -> None:
        """Frames taken from `position` of a spool, behind all that were put before."""
        in_partitions, filling = self.partitions - 1, self._filling[spool]  # a power of two
        for appended_ms, sequence, lane, key, value in frames:
            partition = lane & in_partitions
            batch = filling.get(partition)
            if batch is None or batch.builder.append(timestamp=appended_ms, key=key, value=value) is None:
                batch = filling[partition] = self._new_batch(spool, partition, position)
                batch.builder.append(timestamp=appended_ms, key=key, value=value)
            batch.marks.append(sequence << 8 | lane)

    def _new_batch(self, spool: Spool, partition: int, position: Position) -> Batch:
        batch = Batch(spool, partition, position, self._new_builder())
        self._queues[partition].append(batch)
        self._outstanding[spool].add(batch)
        return batch

    def has_room(self, now_s: float) -> bool:
        """Whether more should be taken: what partitions without an answer hold counts only against HELD_BYTES_MAX."""
        held = stuck = 0
        for partition in self._queues.keys() | self._in_flight.keys():
            size, batch = sum(map(self._weigh, self._queues[partition])), self._in_flight.get(partition)
            if batch is not None:
                size += batch.size
                stuck += size if now_s - batch.in_flight_since_s > STUCK_S else 0
            held += size
        return held < HELD_BYTES_MAX and held - stuck < self._ahead_bytes

    def _weigh(self, batch: Batch) -> int:
        """Its bytes, or what its events weigh where events are the narrower limit."""
        return int(max(batch.builder.size(), len(batch.marks) * self._event_bytes))

    def to_send(self, now_s: float, *, full_only: bool = False) -> Iterator[Batch]:
        """The next batch of each partition that has none in flight; each is in flight from here on."""
        for partition in [p for p, queue in self._queues.items() if queue and p not in self._in_flight]:
            queue = self._queues[partition]
            filling = self._filling[queue[0].spool]
            if filling.get(partition) is queue[0]:
                if full_only:
                    continue
                del filling[partition]
            batch = self._in_flight[partition] = queue.popleft()
            batch.in_flight_since_s, batch.size = now_s, self._weigh(batch)
            yield batch

    def done(self, batch: Batch) -> None:
        """The broker has it."""
        batch.spool.progress.settle({mark & 255: mark >> 8 for mark in batch.marks})
        del self._in_flight[batch.partition]
        self._outstanding[batch.spool].discard(batch)

    @property
    def flying(self) -> bool:
        return bool(self._in_flight)

    @property
    def sendable(self) -> bool:
        """Whether a batch waits for a partition that is free."""
        return any(queue and partition not in self._in_flight for partition, queue in self._queues.items())

    def settled(self, spool: Spool) -> Position:
        """The place of a spool before which everything is acknowledged."""
        outstanding = self._outstanding.get(spool)
        return min(batch.position for batch in outstanding) if outstanding else spool.position

    def forget(self, spool: Spool) -> None:
        """A spool that is sent and gone."""
        self._outstanding.pop(spool, None)
        self._filling.pop(spool, None)
