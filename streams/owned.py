"""A partition that a worker holds: its state, and what has been fetched and not yet folded."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiokafka import ConsumerRecord

from tollway.streams import checkpoint
from tollway.streams.batch import Records
from tollway.streams.state import FOLD_VERSION

STASH_RECORDS_MAX = 40_000
STASH_BYTES_MAX = 24 * 1024 * 1024
"""A partition with more fetched and not yet folded than this is paused until it is below again."""
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 60.0
"""A stopped partition is loaded and tried again after this long, four times longer each time."""


@dataclass
class Owned:
    """Times `_at` are the engine's monotonic clock, in seconds."""

    state: Any
    slot: int
    """Of the next checkpoint."""
    turn: int
    generation: int
    """Of the checkpoint that was loaded: of its rebuilds."""
    due_at: float
    """When the next checkpoint is."""
    fetch_next: int
    """Offset that the stash continues at."""
    checkpointed: int
    """Offset of the newest checkpoint."""
    heard_at: float
    size: int
    """Bytes of the newest checkpoint."""
    stash: list[ConsumerRecord] = field(default_factory=list)
    stash_bytes: int = 0
    since: int = 0
    """Records folded since the newest checkpoint."""
    unsettled: bool = False
    """The state is ahead of what its effects' sinks have acknowledged: it must not be checkpointed."""
    stopped: str | None = None
    """Why this partition does not go on."""
    final: bool = False
    """It is not tried again."""
    retry_at: float = 0.0
    retry_s: float = RETRY_FIRST_S
    paused: bool = False

    @classmethod
    def loaded(cls, state: Any, found: checkpoint.Checkpoint, now: float, due_at: float) -> "Owned":
        """As its newest checkpoint left it."""
        return cls(
            state=state,
            slot=(found.slot + 1) % checkpoint.SLOTS,
            turn=found.turn,
            generation=found.generation,
            due_at=due_at,
            fetch_next=state.next_offset,
            checkpointed=state.next_offset,
            heard_at=now,
            size=found.size,
        )

    @property
    def settled(self) -> bool:
        """Whether the state is sound and effects have followed it: it may be saved. A turn that was given up leaves others."""
        return not (self.stopped or self.unsettled)

    @property
    def full(self) -> bool:
        """Whether fetching must wait."""
        return len(self.stash) > STASH_RECORDS_MAX or self.stash_bytes > STASH_BYTES_MAX

    def put(self, records: list[ConsumerRecord], now: float) -> bool:
        """Keep contiguous records; False where they are not the next ones, as after a rebalance: seek to `fetch_next`."""
        fresh = records
        if records and records[0].offset < self.fetch_next:
            fresh = [record for record in records if record.offset >= self.fetch_next]
        if not fresh or fresh[0].offset != self.fetch_next:
            return False
        self.stash.extend(fresh)
        self.stash_bytes += _bytes(fresh)
        self.fetch_next = fresh[-1].offset + 1
        self.heard_at = now
        return True

    def drop(self, count: int) -> None:
        """The first `count` records are folded."""
        self.stash_bytes = self.stash_bytes - _bytes(self.stash[:count]) if count < len(self.stash) else 0
        del self.stash[:count]
        self.since += count
        self.retry_s = RETRY_FIRST_S

    def checkpoint(
        self, group: str, epoch: str, number: int, written_ms: int, stats: dict[str, Any]
    ) -> list[tuple[bytes, bytes]]:
        """The state's records, for the slot that is next."""
        return checkpoint.encode(
            group=group,
            epoch=epoch,
            partition=number,
            slot=self.slot,
            next_offset=self.state.next_offset,
            turn=self.turn,
            written_ms=written_ms,
            fold_version=FOLD_VERSION,
            stats=stats,
            state=self.state.dump(),
            generation=self.generation,
        )

    def stop(self, reason: str, now: float, *, final: bool) -> None:
        """Go on no more; what was fetched is fetched again after a retry."""
        self.stopped, self.final = reason, final
        self.stash.clear()
        self.stash_bytes = 0
        self.retry_at = now + self.retry_s
        self.retry_s = min(self.retry_s * 4, RETRY_MAX_S)


def _bytes(records: list[ConsumerRecord]) -> int:
    """Of their values."""
    return sum(len(record.value) for record in records if record.value)


def as_records(records: list[ConsumerRecord]) -> Records:
    """The broker's records as columns."""
    return Records(
        offsets=np.array([record.offset for record in records], np.int64),
        append_ms=np.array([record.timestamp for record in records], np.int64),
        keys=[record.key for record in records],
        values=[record.value for record in records],
        headers=[tuple(record.headers) for record in records],
    )
