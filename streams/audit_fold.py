"""usage.events → ClickHouse: the fold of group `audit`, whole blocks at a time."""

from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiokafka import ConsumerRecord

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import Fatal, Unavailable
from tollway.schemas.topics import TICK_KEY, USAGE
from tollway.streams.accounts import check_key, judged_stats
from tollway.streams.audit import Audit, Block
from tollway.streams.batch import Batch, Records
from tollway.streams.cutter import BlockCutter
from tollway.streams.failpoint import Failpoints
from tollway.streams.fold import Send
from tollway.streams.hand import Work, take
from tollway.streams.judge import judge_block, log_times
from tollway.streams.seal import Seal, crossed, sealed_aside
from tollway.streams.snapshot_copy import SnapshotCopies
from tollway.streams.state import PartitionState

PARTS: dict[str, Any] = {"audit": Audit}
BLOCKS_MAX = 4
"""Most blocks a partition takes in one turn."""

Think = Callable[[Any], Awaitable[Any]]


@dataclass
class BlockOf:
    """The judged batches of one block."""

    state: PartitionState
    batches: list[Batch]


@dataclass
class AuditEffects:
    """What a stretch of one partition has caused."""

    blocks: list[Block] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)


def think_audit(subject: BlockOf) -> Block:
    """Agent audit: rows of both tables, the manifest and the chain of one block."""
    part: Audit = subject.state.parts["audit"]
    return part.block(subject.batches, subject.state.epoch)


async def audit(works: AsyncIterable[Work]) -> None:
    """Agent audit."""
    async for work in works:
        take(work, think_audit)


class AuditFold:
    """Every record, with its raw bytes and its verdict; a partition's state only ever stands between two blocks."""

    group, ticks, fencing = "audit", True, None

    def __init__(
        self,
        epoch: str,
        partitions: int,
        public_key: str,
        audit: Think,
        store: AuditStore,
        failpoints: Failpoints,
        copies: SnapshotCopies | None = None,
        topic: str = USAGE.name,
    ) -> None:
        """`copies`: who brings sealed snapshots to ClickHouse, beside this fold."""
        self.topic = topic
        self._epoch, self._partitions, self._public_key = epoch, partitions, public_key
        self._audit, self._store, self._fail, self._copies = audit, store, failpoints, copies
        self._cutters: dict[int, tuple[int, int, BlockCutter, list[int]]] = {}

    def load(self, partition: int, state: dict[str, Any]) -> PartitionState:
        """Raises Fatal where the log names another first key than the settings."""
        loaded = PartitionState.load(partition, self._partitions, self._epoch, state, PARTS)
        check_key(loaded, self._public_key)
        self._cutters.pop(partition, None)
        return loaded

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """Snapshots that nobody has copied yet are looked for."""
        if self._copies is not None:
            self._copies.assigned(states)

    async def revoked(self, partitions: list[int]) -> None:
        """Forget where the fetched records were cut."""
        if self._copies is not None:
            self._copies.revoked(partitions)
        for partition in partitions:
            self._cutters.pop(partition, None)

    def ready(self, state: PartitionState, stash: list[ConsumerRecord]) -> int:
        """The whole blocks among the fetched records; each record is looked at once."""
        begin, fed, cutter, blocks = self._cutters.get(state.partition) or (
            state.next_offset,
            0,
            BlockCutter(state.log_time_ms, state.step_s * 1000),
            [],
        )
        blocks += cutter.feed(
            (record.offset, record.timestamp, len(record.value or b""), record.value is None and record.key == TICK_KEY)
            for record in stash[fed:]
        )
        self._cutters[state.partition] = (begin, len(stash), cutter, blocks)
        return sum(blocks[: BLOCKS_MAX if state.directory.config else 1])

    async def take(self, state: PartitionState, records: Records) -> AuditEffects:
        """Judge and chain each of the blocks that `ready` counted."""
        begin, fed, cutter, lengths = self._cutters[state.partition]
        taken, start, step_s = AuditEffects(), 0, state.step_s
        while start < len(records):
            length = lengths.pop(0)
            block = records.part(start, start + length)
            if (day := crossed(state, int(log_times(state, block)[-1]))) is not None:
                taken.seals.append(await sealed_aside(self.group, state, day))
            batches = judge_block(state, block)
            if state.directory.config is not None:
                check_key(state, self._public_key)
            taken.blocks.append(await self._audit(BlockOf(state, batches)))
            start += length
        if state.step_s == step_s:
            self._cutters[state.partition] = (begin + start, fed - start, cutter, lengths)
        else:  # `log.open` was in this block: from here on its steps cut, as they would after a restart
            del self._cutters[state.partition]
        return taken

    async def settle(self, effects: list[AuditEffects], send: Send) -> None:
        """One insert carries all whole blocks of the turn; sealed snapshots go last."""
        blocks = [block for taken in effects for block in taken.blocks]
        try:
            await self._store.insert(blocks)
        except Fatal as error:  # no block is given up: red, and tried again until somebody has put it right
            raise Unavailable(str(error)) from error
        self._fail.hit("audit.between_effects")
        for taken in effects:
            for seal in taken.seals:
                await send(seal.messages())
            if taken.seals and self._copies is not None:
                self._copies.sealed({seal.partition for seal in taken.seals})

    def settled(self, partition: int, state: PartitionState) -> None:
        """Nothing to show."""

    async def tend(self, states: dict[int, PartitionState]) -> None:
        """Nothing that time brings: blocks are cut by the log."""

    def may_tick(self, state: PartitionState) -> bool:
        """Only behind log.open."""
        return state.is_open

    def problems(self) -> dict[int, str]:
        """None: effects that are not taken hold the turn."""
        return {}

    def stats(self, state: PartitionState) -> dict[str, Any]:
        """For `tollway status` and `audit verify`."""
        return {**judged_stats(state), "chain": state.parts["audit"].chain.hex(), "blocks": state.parts["audit"].blocks}
