"""What a log's partitions are at its end, and the first checkpoints of those that they become."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiokafka import ConsumerRecord

from tollway.connectors.errors import Refused
from tollway.connectors.kafka import CurrentLog, read_newest
from tollway.schemas.topics import TICK_KEY
from tollway.streams import checkpoint
from tollway.streams.accounts import PARTS as ACCOUNTS_PARTS
from tollway.streams.audit_fold import PARTS as AUDIT_PARTS
from tollway.streams.child import child_state
from tollway.streams.judge import judge_block
from tollway.streams.owned import as_records
from tollway.streams.seal import day_of, sealed
from tollway.streams.settings import Settings
from tollway.streams.state import FOLD_VERSION, PartitionState
from tollway.streams.status import checkpoints_of

PARTS: dict[str, dict[str, Any]] = {"accounts": ACCOUNTS_PARTS, "audit": AUDIT_PARTS}


@dataclass(frozen=True)
class Parent:
    """One group's state of one partition at the end of the old log."""

    state: PartitionState
    written_ms: int
    """When its checkpoint was written: it dates the children's, so that every run writes the same bytes."""


async def tail_of(settings: Settings, log: CurrentLog, *, solid: bool) -> dict[str, int]:
    """group → partitions whose newest checkpoint is not at the log's end; empty where all are.

    `solid`: ticks behind a checkpoint do not count. Else group accounts has to be at the very end, and group audit, which stands
    between blocks only, behind the last record that is no tick.
    """
    found = await checkpoints_of(settings, log.epoch, log.partitions, list(PARTS))
    left: dict[str, int] = {}
    for group in PARTS:
        starts = {number: loaded.next_offset for (name, number), loaded in found.items() if name == group}
        ticks_count = not solid and group == "accounts"
        behind = await _behind(settings, log, starts, ticks=ticks_count)
        if count := sum(1 for records in behind.values() if records):
            left[group] = count
    return left


async def _behind(settings: Settings, log: CurrentLog, starts: dict[int, int], *, ticks: bool) -> dict[int, list[Any]]:
    where = settings.kafka_bootstrap, settings.kafka_security()
    numbers = range(log.partitions)
    return await read_newest(
        *where, log.topic, numbers, None, starts=starts, keep=lambda record: ticks or not _is_tick(record)
    )


def _is_tick(record: ConsumerRecord) -> bool:
    return record.value is None and record.key == TICK_KEY


async def parents_at(settings: Settings, log: CurrentLog) -> dict[tuple[str, int], Parent]:
    """Every state at the end of a log that takes nothing any more. Raises Refused where one is not there.

    Ticks behind a block are folded here: both groups go on from the same log time.
    """
    found = await checkpoints_of(settings, log.epoch, log.partitions, list(PARTS))
    parents: dict[tuple[str, int], Parent] = {}
    for group, parts in PARTS.items():
        starts = {number: loaded.next_offset for (name, number), loaded in found.items() if name == group}
        behind = await _behind(settings, log, starts, ticks=True)
        for number in range(log.partitions):
            loaded = found[group, number]
            state = PartitionState.load(number, log.partitions, log.epoch, loaded.state, parts)
            if any(group == "accounts" or not _is_tick(record) for record in behind[number]):
                raise Refused(f"group {group}, partition {number} is not at the log's end: say the same command again")
            if behind[number]:
                judge_block(state, as_records(behind[number]))
            parents[group, number] = Parent(state, loaded.written_ms)
    return parents


def children_of(
    parents: dict[tuple[str, int], Parent], before: int, number: int, partitions: int, epoch: str
) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) records of one new partition: each group's first checkpoint, and the snapshot that a rebuild begins at."""
    for group, parts in PARTS.items():
        parent = parents[group, number % before]
        state = child_state(parent.state, group, number, partitions, epoch, parts)
        yield from checkpoint.encode(
            group=group,
            epoch=epoch,
            partition=number,
            slot=0,
            next_offset=0,
            turn=0,
            written_ms=parent.written_ms,
            fold_version=FOLD_VERSION,
            stats={},
            state=state.dump(),
        )
        seal = sealed(group, state, day_of(state, state.log_time_ms) or 0)
        yield from ((key, value) for _, _, key, value, _ in seal.messages() if key and value)
