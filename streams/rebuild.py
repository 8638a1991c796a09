"""`tollway rebuild`: state from a sealed snapshot and the log, held against every hash on the way, then put in its place.

A checkpoint is written where all effects are known to be acknowledged: where the newest valid checkpoint stands, else at the
newest sealed snapshot, else at the log's first record. Workers go on from there; what they repeat, the sinks recognise.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from tollway.connectors.errors import Refused
from tollway.connectors.group import refuse_members
from tollway.connectors.kafka import CurrentLog, current_log, started_producer
from tollway.connectors.snapshots import SnapshotStore
from tollway.schemas.topics import CHECKPOINTS
from tollway.streams import checkpoint
from tollway.streams.bootstrap import first_states
from tollway.streams.checkpoint import Checkpoint
from tollway.streams.log_pages import bounds, log_pages
from tollway.streams.rebuild_plan import LOG, Boundary, Outcome, chosen, mismatch
from tollway.streams.rebuild_redis import RedisRewrite
from tollway.streams.rebuild_stripe import rebuilt_sender
from tollway.streams.refold import Row, folds, refold
from tollway.streams.seal import GROUPS, Seal, canonical
from tollway.streams.seal_sources import SealSources
from tollway.streams.settings import Settings
from tollway.streams.state import FOLD_VERSION, PartitionState
from tollway.streams.status import all_checkpoints
from tollway.streams.wiring import audit_store, kafka_admin
from tollway.streams.worker import public_key_of

TOLD_S = 2.0
"""Progress is told this often."""
WHAT = {"redis": ("accounts",), "billing": ("accounts",), "checkpoints": GROUPS}
"""What can be rebuilt → the groups whose states it takes."""

Progress = Callable[[str], None]


async def rebuild(
    settings: Settings,
    what: str,
    *,
    partitions: Sequence[int] | None,
    start: str | None,
    dry_run: bool,
    progress: Progress,
) -> dict[str, Any]:
    """`what` = redis, billing or checkpoints. `start` = a day, "log", or None (see `rebuild_plan.chosen`).

    Raises Refused where workers run, where a hash is another one (naming partition, boundary and both), or where the log has
    a gap; with `dry_run` nothing is written and what differs is in the answer.
    """
    log = await current_log(kafka_admin(settings))
    count = log.partitions
    numbers = sorted(set(partitions)) if partitions else list(range(count))
    if numbers[0] < 0 or numbers[-1] >= count:
        raise Refused(f"--partition is {numbers[-1]}: this log has partitions 0 to {count - 1}")
    if not dry_run:
        touched = [*WHAT[what], "stripe"] if what == "checkpoints" else list(WHAT[what])
        wait_s = 2 * settings.session_timeout_ms / 1000 + 2
        await refuse_members(settings.kafka_bootstrap, settings.admin_security(), touched, wait_s)
    store = audit_store(settings)
    try:
        run = Rebuild(settings, log, SnapshotStore(store), progress, dry_run=dry_run)
        run.folds = folds(log.epoch, count, public_key_of(settings), store)
        run.store = store
        await run.prepare(numbers)
        if what == "redis":
            return await run.redis(numbers, start)
        return await run.checkpoints(numbers, WHAT[what], start)
    finally:
        store.close()


class Rebuild:
    """One run over some partitions of a log."""

    def __init__(
        self, settings: Settings, log: CurrentLog, snapshots: SnapshotStore, progress: Progress, *, dry_run: bool
    ) -> None:
        self._settings, self._log, self._epoch, self._count = settings, log, log.epoch, log.partitions
        self._progress, self._dry_run = progress, dry_run
        self._kafka = settings.kafka_bootstrap, settings.kafka_security()
        self._sources = SealSources(*self._kafka, snapshots, log.epoch)
        self._bounds: dict[int, tuple[int, int]] = {}
        self._checkpoints: dict[tuple[str, int], Checkpoint] = {}
        self.folds: Any = {}
        self.store: Any = None

    async def prepare(self, numbers: Sequence[int]) -> None:
        """What stands where. The log's ends come last: workers go on in a dry run, and no checkpoint may lie behind them."""
        self._checkpoints = await all_checkpoints(self._settings, self._log)
        self._bounds = await bounds(*self._kafka, self._log.topic, numbers)

    async def checkpoints(self, numbers: Sequence[int], groups: Sequence[str], start: str | None) -> dict[str, Any]:
        """Prove, then replace what is missing or differs."""
        outcomes = []
        for number in numbers:
            found = await self._sources.of(number)
            billing: PartitionState | None = None
            for group in groups:
                seals = found.get(group, [])
                known = self._checkpoints.get((group, number))
                target = known.next_offset if known else self._target(group, number, seals)
                outcome, state = await self._refolded(group, number, seals, target, start, known)
                billing = state if group == "accounts" else billing
                outcomes.append(outcome)
                if not self._dry_run:
                    await self._replace(outcome, state, known)
            lost = number < self._log.billing_partitions and ("stripe", number) not in self._checkpoints
            if not self._dry_run and "audit" in groups and lost:
                if self._log.growth:
                    raise Refused(
                        f"group stripe has no checkpoint of partition {number}, and the log has grown since: restore it from a "
                        "copy of tollway.checkpoints"
                    )
                assert billing is not None
                outcomes[-1].wrote += await self._restore_sender(number, billing)
        return self._answer(outcomes)

    async def redis(self, numbers: Sequence[int], start: str | None) -> dict[str, Any]:
        """Fold to the log's end and write every total anew, each lane COLD until it has all of them."""
        outcomes = []
        rewrite = None if self._dry_run else await RedisRewrite.begin(self._settings, self._epoch, self._count)
        try:
            for number in numbers:
                seals = (await self._sources.of(number)).get("accounts", [])
                end = self._bounds[number][1]
                outcome, state = await self._refolded("accounts", number, seals, end, start, None)
                outcomes.append(outcome)
                if rewrite is not None:
                    if not outcome.ok:
                        raise Refused(mismatch(outcome))
                    outcome.wrote = await rewrite.write(state)
        finally:
            if rewrite is not None:
                await rewrite.close()
        return self._answer(outcomes)

    def _target(self, group: str, number: int, seals: list[Seal]) -> int:
        """Where a missing checkpoint goes: effects before it are acknowledged, and Kafka has what comes behind it."""
        newest, first = seals[-1].next_offset if seals else 0, self._bounds[number][0]
        if first > newest and group == "audit":
            raise Refused(
                f"partition {number}: Kafka's log begins at {first}, behind the newest sealed snapshot of group audit "
                f"({newest}): restore its checkpoint from a copy of the topic"
            )
        return max(newest, first)  # trimmed only behind every checkpoint: all was acknowledged up to there

    async def _refolded(
        self, group: str, number: int, seals: list[Seal], target: int, start: str | None, known: Checkpoint | None
    ) -> tuple[Outcome, PartitionState]:
        """Fold from the chosen snapshot to the target, compared at every boundary between. No further than the first fault."""
        begin = chosen(seals, target, start, number)
        begin = begin or self._birth(group, number, seals)
        dump = (
            (await self._sources.whole(begin)).state if begin else first_states(self._epoch, number, self._count)[group]
        )
        fold = self.folds[group]
        state: PartitionState = fold.load(number, dump)
        outcome = Outcome(group, number, f"sealed {begin.day}" if begin else LOG, state.next_offset)
        later = [seal for seal in seals if state.next_offset < seal.next_offset <= target]
        outcome.boundaries = [Boundary(f"sealed {seal.day}", seal.next_offset, seal.hash.hex()) for seal in later]
        if known is not None:
            mark = hashlib.sha256(canonical(known.state)).hexdigest()
            outcome.boundaries.append(Boundary("checkpoint", known.next_offset, mark))
        points = sorted({boundary.offset for boundary in outcome.boundaries} | {target})
        pages = self._told(group, number, target, self._pages(number, state.next_offset, target))
        async for point in refold(fold, state, pages, points):
            rebuilt = hashlib.sha256(canonical(state.dump())).hexdigest()
            here = [boundary for boundary in outcome.boundaries if boundary.offset == point]
            for boundary in here:
                boundary.rebuilt = rebuilt
            if any(not boundary.equal and boundary.what != "checkpoint" for boundary in here):
                outcome.boundaries = [each for each in outcome.boundaries if each.offset <= point]
                break
        outcome.end_offset = state.next_offset
        return outcome, state

    def _birth(self, group: str, number: int, seals: list[Seal]) -> Seal | None:
        """Where a log that has grown from another begins; None for a first one."""
        if not self._log.growth:
            return None
        if seals and not seals[0].next_offset:
            return seals[0]
        raise Refused(f"group {group}, partition {number}: the state it was born with is lost: restore `snapshots`")

    def _pages(self, number: int, start: int, target: int) -> AsyncIterator[Sequence[Row]]:
        first, end = self._bounds[number]
        upto = first, min(end, target + 1)  # the record behind the target closes the block that ends there
        return log_pages(*self._kafka, self.store, (self._log.topic, self._epoch), number, start, upto)

    async def _told(
        self, group: str, number: int, target: int, pages: AsyncIterator[Sequence[Row]]
    ) -> AsyncIterator[Sequence[Row]]:
        """The pages, and how far they are."""
        told = time.monotonic()
        async for page in pages:
            yield page
            if page and time.monotonic() - told >= TOLD_S:
                told = time.monotonic()
                self._progress(f"{group}, partition {number}: {page[-1].offset + 1:,} of {target:,}")

    async def _replace(self, outcome: Outcome, state: PartitionState, known: Checkpoint | None) -> None:
        """Write the rebuilt checkpoint where none is, or another. Raises Refused where a sealed hash differs."""
        sealed = [boundary for boundary in outcome.boundaries if boundary.what != "checkpoint"]
        if any(not boundary.equal for boundary in sealed):
            raise Refused(mismatch(outcome))
        if known is not None and outcome.ok:
            return
        await self._write(outcome.group, outcome.partition, state.next_offset, state.dump(), known)
        outcome.wrote = f"checkpoint at {state.next_offset}"

    async def _restore_sender(self, number: int, accounts: PartitionState) -> str:
        """The stripe group's state is no function of the log: see `rebuild_stripe`."""
        dump, again, taken = await rebuilt_sender(self._settings, self._epoch, number, accounts, int(time.time()))
        await self._write("stripe", number, dump["next_offset"], dump, None)
        return f"; stripe: {again} meter events of the last 20 h again, {taken} taken as delivered"

    async def _write(
        self, group: str, number: int, offset: int, state: dict[str, Any], known: Checkpoint | None
    ) -> None:
        """Both slots, of a generation of its own: no older checkpoint counts any more, wherever it stands."""
        producer = await started_producer(*self._kafka)
        try:
            for slot in range(checkpoint.SLOTS):
                for key, value in checkpoint.encode(
                    group=group,
                    epoch=self._epoch,
                    partition=number,
                    slot=slot,
                    next_offset=offset,
                    turn=known.turn + 1 if known else 1,
                    written_ms=time.time_ns() // 1_000_000,
                    fold_version=FOLD_VERSION,
                    stats={},
                    state=state,
                    generation=known.generation + 1 if known else 1,
                ):
                    await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=number)
        finally:
            await producer.stop()

    def _answer(self, outcomes: list[Outcome]) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "dry_run": self._dry_run,
            "ok": all(outcome.ok or outcome.wrote for outcome in outcomes),
            "compared": sum(len(outcome.boundaries) for outcome in outcomes),
            "partitions": [outcome.to_json() for outcome in outcomes],
            "unread": self._sources.missing,
        }


def run_rebuild(settings: Settings, what: str, progress: Progress, **options: Any) -> dict[str, Any]:
    """`rebuild`, run to its end."""
    return asyncio.run(rebuild(settings, what, progress=progress, **options))
