"""One partition's proof: its manifest chained from 0, its log hashed by the database, its columns judged again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import TollwayError
from tollway.streams.audit import CHAIN_START, EVENTS_SCHEMA, LOG_SCHEMA, Audit, next_chain, records_of
from tollway.streams.audit_compare import DOUBLE, FOREIGN, MISSING, NAMED_MAX, differences
from tollway.streams.audit_report import Place, Report
from tollway.streams.batch import Batch, Records
from tollway.streams.state import PartitionState

MANIFEST_ROWS = 100_000
HASHED_ROWS = 1_000_000
"""Whole blocks up to this many rows are hashed by one statement."""
COMPARED_ROWS = 65_536

Rejudge = Callable[[PartitionState, Records], list[Batch]]

# FixedString would lose trailing zero bytes on its way through arrayStringConcat: concat makes it a String.
_RECORD_HASH = """concat(SHA256(concat(
    reinterpretAsFixedString(toInt64(kafka_offset)),
    reinterpretAsFixedString(toUnixTimestamp64Milli(append_time)),
    reinterpretAsFixedString(toInt32(ifNull(length(record_key), -1))),
    reinterpretAsFixedString(toInt32(length(headers))),
    reinterpretAsFixedString(toInt32(ifNull(length(raw), -1))),
    ifNull(record_key, ''), headers, ifNull(raw, ''))), '')"""
_IN_PARTITION = "epoch = {epoch:String} AND kafka_partition = {partition:UInt16}"
_BETWEEN = "BETWEEN {first:UInt64} AND {last:UInt64}"
_HASHED = f"""
WITH (
    SELECT groupArray(first_offset) FROM (
        SELECT first_offset FROM audit_manifest FINAL
        WHERE {_IN_PARTITION} AND first_offset {_BETWEEN} ORDER BY first_offset
    )
) AS firsts
SELECT
    first,
    count() AS records,
    toInt64(toUnixTimestamp64Milli(min(append_time))) AS first_append,
    toInt64(toUnixTimestamp64Milli(max(append_time))) AS last_append,
    SHA256(arrayStringConcat(arrayMap(x -> x.2, arraySort(x -> x.1, groupArray((kafka_offset, hash)))))) AS block_hash
FROM (
    SELECT kafka_offset, append_time, roundDown(kafka_offset, firsts) AS first, {_RECORD_HASH} AS hash
    FROM usage_log FINAL
    WHERE {_IN_PARTITION} AND kafka_offset {_BETWEEN}
)
GROUP BY first
"""
_MANIFEST = f"""
SELECT first_offset, last_offset, records, block_hash, chain_hash,
    toUnixTimestamp64Milli(first_append) AS first_append, toUnixTimestamp64Milli(last_append) AS last_append
FROM audit_manifest FINAL WHERE {_IN_PARTITION} AND first_offset >= {{after:UInt64}}
ORDER BY first_offset LIMIT {{rows:UInt32}}
"""
_LOG_ROWS = f"""
SELECT {", ".join(LOG_SCHEMA.names)} FROM usage_log FINAL WHERE {_IN_PARTITION} AND kafka_offset {_BETWEEN}
ORDER BY kafka_offset
"""
# Everything tested here is in the sort key, so that the test may stand before FINAL.
_EVENT_ROWS = f"""
SELECT {", ".join(EVENTS_SCHEMA.names)} FROM usage_events FINAL
PREWHERE {_IN_PARTITION} AND kafka_offset {_BETWEEN} AND append_time BETWEEN
    fromUnixTimestamp64Milli({{first_append:Int64}}, 'UTC') AND fromUnixTimestamp64Milli({{last_append:Int64}}, 'UTC')
ORDER BY kafka_offset
"""
_EVENT_COUNT = f"""
SELECT count() AS n FROM usage_events FINAL PREWHERE {_IN_PARTITION} AND kafka_offset <= {{last:UInt64}}
"""
_DOUBLES = f"""
SELECT kafka_offset, count() AS n FROM usage_events FINAL PREWHERE {_IN_PARTITION} AND kafka_offset <= {{last:UInt64}}
GROUP BY kafka_offset HAVING n > 1 ORDER BY kafka_offset LIMIT 10
"""


@dataclass
class _Block:
    """A manifest row."""

    first: int
    last: int
    records: int
    block_hash: bytes
    chain_hash: bytes
    first_append: int
    last_append: int


class PartitionProof:
    """Adds one partition's faults and counts to a report. `checkpoint` = (next offset, chain hash) that Kafka has."""

    def __init__(self, store: AuditStore, report: Report, place: Place, checkpoint: tuple[int, bytes] | None) -> None:
        self._store, self._report = store, report
        self._epoch, self._partition = place
        self._where = {"epoch": place[0], "partition": place[1]}
        self._checkpoint = checkpoint
        self._next, self._chain = 0, CHAIN_START
        """Offset behind the newest block checked, and its chain hash."""

    def run(self, rejudge: Rejudge | None, state: PartitionState) -> None:
        """(a), and (b) where (a) is green: what is not proven is no measure for the columns. `state`: before the first record."""
        before = len(self._report.faults) + self._report.more_faults
        reached = self._checkpoint is None or self._checkpoint == (0, CHAIN_START)
        for page in self._pages():
            reached = self._check_chain(page) or reached
            for stretch in _stretches(page, HASHED_ROWS):
                self._check_hashes(stretch)
        if not reached:
            self._tail_cut()
        self._report.tails += self._checkpoint is not None
        self._report.chains[self._epoch, self._partition] = self._next, self._chain
        if rejudge is None:
            return
        if len(self._report.faults) + self._report.more_faults > before:
            self._report.unproven.append(f"usage_events of partition {self._partition}: its log is not proven")
            return
        self._compare(rejudge, state)

    def _fault(self, table: str, first: int, last: int, what: str) -> None:
        self._report.add(table, self._epoch, self._partition, first, last, what)

    def _pages(self) -> Iterator[list[_Block]]:
        """The manifest in order, MANIFEST_ROWS rows at a time."""
        after = 0
        while True:
            rows = self._store.arrow(_MANIFEST, **self._where, after=after, rows=MANIFEST_ROWS).to_pylist()
            if not rows:
                return
            page = [_Block(row.pop("first_offset"), row.pop("last_offset"), **row) for row in rows]
            yield page
            if len(page) < MANIFEST_ROWS:
                return
            after = page[-1].first + 1

    def _check_chain(self, page: list[_Block]) -> bool:
        """Gapless from 0, each row chained to the one before; True where the checkpoint's value was met."""
        met = False
        for block in page:
            if block.first != self._next:
                self._fault(
                    "audit_manifest", min(self._next, block.first), max(self._next, block.first) - 1, "gap or overlap"
                )
            if block.records != block.last - block.first + 1:
                self._fault("audit_manifest", block.first, block.last, f"names {block.records} records")
            if block.chain_hash != next_chain(self._chain, block.block_hash):
                self._fault("audit_manifest", block.first, block.last, "chain hash does not follow from the one before")
            self._next, self._chain = block.last + 1, block.chain_hash
            if self._checkpoint is not None and self._checkpoint[0] == self._next:
                met = True
                if self._checkpoint[1] != self._chain:
                    self._fault(
                        "checkpoint", block.first, block.last, "chain hash is not the one Kafka's checkpoint has"
                    )
        self._report.blocks += len(page)
        return met

    def _tail_cut(self) -> None:
        assert self._checkpoint is not None
        due = self._checkpoint[0]
        first, last = min(due, self._next), max(due, self._next, 1) - 1
        self._fault(
            "checkpoint",
            first,
            last,
            f"Kafka's checkpoint stands at {due}, the manifest ends at {self._next}: the tail is cut"
            if self._next < due
            else f"Kafka's checkpoint stands at {due}, where no block ends",
        )

    def _check_hashes(self, stretch: list[_Block]) -> None:
        """usage_log's rows hash to what the manifest says, block by block."""
        bounds = {"first": stretch[0].first, "last": stretch[-1].last}
        found = {row["first"]: row for row in self._store.arrow(_HASHED, **self._where, **bounds).to_pylist()}
        for block in stretch:
            row = found.get(block.first)
            count = row["records"] if row else 0
            self._report.records += count
            if row is None or count != block.last - block.first + 1:
                self._name_missing(block, count)
            elif row["block_hash"] != block.block_hash:
                self._fault("usage_log", block.first, block.last, "a record was changed: the block's hash is another")
            elif (row["first_append"], row["last_append"]) != (block.first_append, block.last_append):
                self._fault("audit_manifest", block.first, block.last, "append times are not those of its records")

    def _name_missing(self, block: _Block, count: int) -> None:
        sql = f"SELECT kafka_offset FROM usage_log FINAL WHERE {_IN_PARTITION} AND kafka_offset {_BETWEEN}"
        there = self._store.arrow(sql, **self._where, first=block.first, last=block.last)["kafka_offset"].to_numpy()
        missing = np.setdiff1d(np.arange(block.first, block.last + 1), there)[:NAMED_MAX].tolist()
        what = f"{count} rows, the block has {block.last - block.first + 1}; missing offsets {missing}"
        self._fault("usage_log", block.first, block.last, what)

    def _compare(self, rejudge: Rejudge, state: PartitionState) -> None:
        """Every row of usage_events, and usage_log's derived columns, against what judging again makes of the raw bytes."""
        for page in self._pages():
            for stretch in _stretches(page, COMPARED_ROWS):
                if stretch[0].first >= self._next:
                    return  # written since (a) looked
                bounds = {"first": stretch[0].first, "last": stretch[-1].last}
                log = self._store.arrow(_LOG_ROWS, **self._where, **bounds)
                try:
                    block = Audit().block(rejudge(state, records_of(log)), self._epoch)
                except TollwayError as error:
                    self._report.unproven.append(f"usage_events of partition {self._partition}: {error}")
                    return
                self._differ("usage_log", differences(pa.Table.from_batches([block.log]), log))
                times = {
                    "first_append": min(each.first_append for each in stretch),
                    "last_append": max(each.last_append for each in stretch),
                }
                events = self._store.arrow(_EVENT_ROWS, **self._where, **bounds, **times)
                self._differ("usage_events", differences(pa.Table.from_batches([block.events]), events))
                self._report.compared += len(block.events)
        self._check_strays()

    def _differ(self, table: str, found: dict[str, list[int]]) -> None:
        words = {MISSING: "rows are missing", FOREIGN: "rows of no record", DOUBLE: "more than one row an offset"}
        for name, offsets in found.items():
            what = words.get(name, f"column {name} is not what the record says")
            self._fault(table, offsets[0], offsets[-1], f"{what}: {offsets}")

    def _check_strays(self) -> None:
        """Copies of a row under another key or time lie elsewhere in the sort order: counted, and named where there are any."""
        if not self._next:
            return
        where = {**self._where, "last": self._next - 1}
        if self._store.rows(_EVENT_COUNT, **where)[0]["n"] > self._next:
            for row in self._store.rows(_DOUBLES, **where):
                at = row["kafka_offset"]
                self._fault("usage_events", at, at, f"{row['n']} rows of one record, under other keys or times")


def _stretches(blocks: list[_Block], rows_max: int) -> Iterator[list[_Block]]:
    """Consecutive blocks, together at most `rows_max` rows; a larger one alone."""
    stretch: list[_Block] = []
    rows = 0
    for block in blocks:
        if stretch and rows + block.records > rows_max:
            yield stretch
            stretch, rows = [], 0
        stretch.append(block)
        rows += block.records
    if stretch:
        yield stretch
