"""Holes of the design's review, planted in the product's own code while a world runs, and the invariants that must name them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from aiokafka import TopicPartition

from tests.simulation.fold_opening import packed, unpacked
from tests.simulation.fold_traffic import Emitter
from tests.simulation.fold_workers import replaced
from tollway.connectors.errors import Unavailable
from tollway.streams import (
    accounts,
    billing,
    bounds,
    checkpoint_log,
    counting,
    decode,
    dedupe,
    engine,
    judge,
    owned,
    quota,
    quota_jobs,
    seal,
    stripe_sender,
)
from tollway.streams.audit_fold import AuditFold
from tollway.streams.batch import ACCEPTED, DUPLICATE, Records
from tollway.streams.engine import Engine
from tollway.streams.hand import Hand, Work
from tollway.streams.judge_command import is_command
from tollway.streams.quota_lane import LaneView, Phase
from tollway.streams.quota_lots import Lot
from tollway.streams.same_log import SameLog

Change = tuple[Any, str, Any]
FOREVER = 10**9


@dataclass(frozen=True)
class Mutant:
    """`hole` of the review; `kind` of worlds that kill it soonest, `worlds` in which one must; `seed` of one that did, where known."""

    name: str
    hole: str
    what: str
    killers: str
    changes: Callable[[], list[Change]]
    kind: str = "mixed"
    seed: int | None = None
    worlds: int = 40
    bugs: frozenset[str] = frozenset()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """For as long as the block runs."""
        with replaced(*self.changes()):
            yield


def constant(owner: Any, name: str, value: Any) -> Callable[[], list[Change]]:
    return lambda: [(owner, name, value)]


def high_water_mark() -> list[Change]:
    def see(self: dedupe.Seen, sequence: int) -> int:
        if sequence <= self.high:
            return DUPLICATE
        self.high = sequence
        return ACCEPTED

    return [(dedupe.Seen, "see", see)]


def commands_first() -> list[Change]:
    """Usage and commands of one fetch as if they came from two topics."""
    real = accounts.AccountsFold.take

    async def take(self: Any, state: Any, records: Records) -> Any:
        order = sorted(range(len(records)), key=lambda row: not is_command(records.values[row]))
        mixed = [[column[row] for row in order] for column in (records.keys, records.values, records.headers)]
        return await real(self, state, Records(records.offsets, records.append_ms, *mixed))  # type: ignore[arg-type]

    return [(accounts.AccountsFold, "take", take)]


def torn_checkpoint() -> list[Change]:
    """The quota in a record of its own: the last that was written counts, whoever wrote it."""
    real, known = owned.Owned.checkpoint, checkpoint_log.checkpoint

    def checkpoint(self: Any, group: str, epoch: str, number: int, written_ms: int, stats: Any) -> Any:
        records = real(self, group, epoch, number, written_ms, stats)
        if group != "accounts":
            return records
        return [*records, (f"{group}|{epoch}|{number}|q".encode(), packed(self.state.dump()["parts"]["quota"]))]

    class Torn:
        """A checkpoint whose quota is another one's."""

        def __init__(self, found: Any, part: bytes) -> None:
            self._found = found
            self.state = {**found.state, "parts": {**found.state["parts"], "quota": unpacked(part)}}

        def __getattr__(self, name: str) -> Any:
            return getattr(self._found, name)

    def newest(records: Any, group: str, epoch: str, number: int, *, by_turn: bool = False) -> Any:
        found = known.newest(records, group, epoch, number, by_turn=by_turn)
        parts = [value for key, value in records if key == f"{group}|{epoch}|{number}|q".encode()]
        return Torn(found, parts[-1]) if found and parts else found

    return [
        (owned.Owned, "checkpoint", checkpoint),
        (checkpoint_log, "checkpoint", SimpleNamespace(newest=newest, epochs=known.epochs)),
    ]


def block_is_a_fetch() -> list[Change]:
    def ready(self: Any, state: Any, stash: Any) -> int:
        count = len(stash) if state.directory.config else min(1, len(stash))
        self._cutters[state.partition] = (state.next_offset, len(stash), None, [count])
        return count

    real = AuditFold.take

    async def take(self: Any, state: Any, records: Records) -> Any:
        found = await real(self, state, records)
        self._cutters.pop(state.partition, None)
        return found

    return [(AuditFold, "ready", ready), (AuditFold, "take", take)]


def not_on_record() -> list[Change]:
    async def put(self: Any, attempts: Any) -> None:
        self.outbox.changed = False

    return [(stripe_sender.Sender, "_put_on_record", put)]


def failures_are_skipped() -> list[Change]:
    def halt(self: Any, number: int, reason: str, *, final: bool = False) -> None:
        mine = self.owned[number]
        if mine.stash:
            mine.state.next_offset = mine.stash[-1].offset + 1
        mine.drop(len(mine.stash))
        mine.unsettled = False

    return [(Engine, "_halt", halt)]


def doubtful_state() -> list[Change]:
    async def retry(self: Any) -> None:
        for number, mine in self.owned.items():
            if mine.stopped and not mine.final:
                mine.stopped, mine.unsettled, mine.fetch_next = None, False, mine.state.next_offset
                self.consumer.seek(TopicPartition(self.fold.topic, number), mine.fetch_next)

    return [(Engine, "_retry_stopped", retry)]


def sealed_without_dedupe() -> list[Change]:
    real = seal.dump_of

    def dump_of(plain: dict[str, Any]) -> dict[str, Any]:
        return real({**plain, "dedupe": {**plain["dedupe"], "sources": {}}})

    return [(seal, "dump_of", dump_of)]


def prices_are_believed() -> list[Change]:
    return [(judge, "_prices", lambda state, usage, refused: None)]


def any_asset() -> list[Change]:
    real = judge._prices

    def prices(state: Any, usage: pa.RecordBatch, refused: Any) -> None:
        at = usage.schema.get_field_index("revenue_asset")
        assets = ["USD" if asset is not None else None for asset in usage.column(at).to_pylist()]
        real(state, usage.set_column(at, "revenue_asset", pa.array(assets, pa.string())), refused)

    return [(judge, "_prices", prices)]


def keys_twice() -> list[Change]:
    return [(bounds, "_quantities", lambda found: iter(()))]


def utf8_unchecked() -> list[Change]:
    def decode_id(schema_id: int, bodies: list[bytes]) -> Any:
        return decode.pyruhvro.deserialize_array(bodies, decode.codec.schema_text(schema_id))

    return [(decode, "decode_id", decode_id)]


def misrouted_counts() -> list[Change]:
    return [(judge, "_misrouted", lambda state, batch, lanes: np.zeros(len(lanes), np.bool_))]


def any_log() -> list[Change]:
    async def confirm(self: Any) -> None:
        return None

    return [(SameLog, "confirm", confirm)]


def jumps() -> list[Change]:
    real = Engine._halt

    def halt(self: Any, number: int, reason: str, *, final: bool = False) -> None:
        if not final:
            real(self, number, reason)
            return
        log = self.consumer._log(TopicPartition(self.fold.topic, number))
        self.owned[number].fetch_next = self.owned[number].state.next_offset = log.start
        self.consumer.seek(TopicPartition(self.fold.topic, number), log.start)

    return [(Engine, "_halt", halt)]


def paid_and_invoiced() -> list[Change]:
    real = billing.sums

    def sums(batch: Any, meters: set[str], window_s: int) -> Any:
        at = batch.usage.schema.get_field_index("rail")
        usage = batch.usage.set_column(at, "rail", pa.nulls(len(batch.usage), pa.string()))
        return real(dataclasses.replace(batch, usage=usage), meters, window_s)

    return [(billing, "sums", sums)]


def n_is_forgotten() -> list[Change]:
    real = billing.Billing.load.__func__  # type: ignore[attr-defined]

    def load(cls: Any, state: Any) -> Any:
        return real(cls, {**state, "n": {}})

    return [(billing.Billing, "load", classmethod(load))]


def closes_first() -> list[Change]:
    real = quota_jobs.parts

    def parts(lot: Lot, policies: Any, closes: Any) -> Any:
        if closes and len(lot):
            yield from real(Lot(), [], closes)
            closes = []
        yield from real(lot, policies, closes)

    return [(quota_jobs, "parts", parts)]


def ready_early() -> list[Change]:
    real = LaneView.rewrite_begun

    def begun(self: LaneView, answer: Any, now: float) -> None:
        real(self, answer, now)
        if self.phase is Phase.FILL:
            self.phase, self.end_at, self.expect = Phase.GATES, now, -1

    return [(LaneView, "rewrite_begun", begun)]


def no_refresh() -> list[Change]:
    def live(number: int, sweep_at: float) -> LaneView:
        return LaneView(number, phase=Phase.LIVE, sweep_at=sweep_at)

    return [(quota_jobs, "LaneView", live)]


def dirty_is_dropped() -> list[Change]:
    def abandoned(self: Any) -> None:
        self._quota.put_back_closes(self._lane.number, self._closes)

    return [(quota_jobs.Apply, "abandoned", abandoned)]


def window_of_arrival() -> list[Change]:
    real = accounts.judge

    def judged(state: Any, records: Records) -> Any:
        batch = real(state, records)
        hour_before_us = records.append_ms[batch.row] * 1000 - 3_600_000_000
        batch.window_us[:] = np.maximum(batch.occurred_us, hour_before_us)
        return batch

    return [(accounts, "judge", judged)]


def heartbeat_by_the_clock() -> list[Change]:
    real = quota_jobs.View.note

    def note(self: Any, state: Any) -> None:
        real(self, state)
        self.log_ms += 60_000

    return [(quota_jobs.View, "note", note)]


def redis_is_awaited() -> list[Change]:
    real = accounts.AccountsFold.settle

    async def settle(self: Any, effects: Any, send: Any) -> None:
        if not await self._view.drained(1.0) and self._view.stats()["error"]:
            raise Unavailable("Redis does not show it yet")
        await real(self, effects, send)

    return [(accounts.AccountsFold, "settle", settle)]


def undeclared_counts() -> list[Change]:
    class Everything(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            return True

    return [(quota, "counted", lambda batch, declared: counting.counted(batch, Everything()))]


def strangers() -> list[Change]:
    return [(judge, "_closed", lambda state, codes, names: np.zeros(len(names), np.bool_))]


def checkpoint_first() -> list[Change]:
    real = Engine._settle

    async def settle(self: Any, effects: Any, generation: int) -> bool:
        for number in list(self.owned):
            if self.owned[number].unsettled:
                await self.save(number)
        return await real(self, effects, generation)

    return [(Engine, "_settle", settle)]


def unsettled_is_saved() -> list[Change]:
    return [(owned.Owned, "unsettled", property(lambda self: False, lambda self, value: None))]


def given_up_turn_is_saved() -> list[Change]:
    async def checkpoint_due(self: Any) -> None:
        now = engine.time.monotonic()
        for number, held in self.owned.items():
            due = now >= held.due_at or held.since >= self.config.checkpoint_records
            if due and not held.stopped and held.state.next_offset != held.checkpointed:
                await self.save(number)

    return [(Engine, "_checkpoint_due", checkpoint_due)]


def channel_is_trusted() -> list[Change]:
    async def hand(self: Any, subject: Any) -> Any:
        work = Work(subject)
        await self._channel.send(value=work)
        return await work.done

    return [(Hand, "__call__", hand)]


def retry_forgets_pause() -> list[Change]:
    real = Engine._load

    async def unasked() -> None:
        return None

    async def load(self: Any, partitions: list[int]) -> None:
        log, self._log = self._log, SimpleNamespace(confirm=unasked)
        try:
            await real(self, partitions)
        finally:
            self._log = log
        await self._log.confirm()

    return [(Engine, "_load", load)]


def queue_in_memory() -> list[Change]:
    def killed(self: Emitter) -> list[Any]:
        self.process.kill()
        return []

    return [(Emitter, "killed", killed)]
