"""Prove the audit log: no gap, no double, no change, in either table (design §7).

(a) The log: record, block and chain hashes computed again in SQL from what `usage_log` holds, its newest chain value held
against the audit checkpoint in Kafka, so that a cut tail shows. (b) `usage_events`, and what the hashes do not cover of
`usage_log`: the raw bytes decoded and judged again, every column of every row compared.

A running worker adds while this reads: what has no manifest row yet is counted as `unsealed`, and proven next time.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.compute as pc

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import Fatal
from tollway.streams.audit import CHAIN_START, EVENTS_SCHEMA, LOG_SCHEMA, Audit, next_chain, records_of
from tollway.streams.audit_fold import judge_block
from tollway.streams.state import PartitionState

FAULTS_MAX = 100
"""Most faults that are told one by one; the rest are counted."""
CHUNK_RECORDS = 131_072
"""Records read back at once, at least one block."""

# The layout of `streams.audit`. reinterpretAsFixedString keeps the zero bytes that other conversions drop.
RECORD_HASH = """
SHA256(concat(
    reinterpretAsFixedString(toInt64(kafka_offset)), reinterpretAsFixedString(toUnixTimestamp64Milli(append_time)),
    reinterpretAsFixedString(toInt32(if(record_key IS NULL, -1, length(record_key)))),
    reinterpretAsFixedString(toInt32(length(headers))),
    reinterpretAsFixedString(toInt32(if(raw IS NULL, -1, length(raw)))),
    ifNull(toString(record_key), ''), headers, ifNull(raw, '')))
"""
BLOCKS = f"""
SELECT first_offset, count() AS records, uniqExact(kafka_offset) AS offsets, min(kafka_offset) AS first,
    max(kafka_offset) AS last, min(append_time) AS first_append, max(append_time) AS last_append,
    hex(SHA256(arrayStringConcat(arrayMap(pair -> unhex(pair.2), arraySort(groupArray((kafka_offset, hash))))))) AS block_hash
FROM
(
    SELECT kafka_offset, append_time, hex({RECORD_HASH}) AS hash,
        arrayElement({{firsts:Array(UInt64)}}, toUInt32(arrayCount(first -> first <= kafka_offset, {{firsts:Array(UInt64)}})))
            AS first_offset
    FROM usage_log FINAL
    WHERE epoch = {{epoch:String}} AND kafka_partition = {{number:UInt16}}
        AND kafka_offset >= {{low:UInt64}} AND kafka_offset <= {{high:UInt64}}
)
GROUP BY first_offset
ORDER BY first_offset
"""
MANIFEST = """
SELECT first_offset, last_offset, records, hex(block_hash) AS block_hash, hex(chain_hash) AS chain_hash,
    toUnixTimestamp64Milli(first_append) AS first_append, toUnixTimestamp64Milli(last_append) AS last_append
FROM audit_manifest FINAL
WHERE epoch = {epoch:String} AND kafka_partition = {number:UInt16}
ORDER BY first_offset
"""
COUNTS = """
SELECT count() AS records, uniqExact(kafka_offset) AS offsets
FROM {table} FINAL
WHERE epoch = {{epoch:String}} AND kafka_partition = {{number:UInt16}} AND kafka_offset <= {{high:UInt64}}
"""

Progress = Callable[[str], None]
Manifest = list[dict[str, Any]]


@dataclass
class Report:
    """What was proven. `faults` says where, one sentence each; `ok` only where there is none."""

    records: int = 0
    blocks: int = 0
    partitions: int = 0
    unsealed: int = 0
    fault_count: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.fault_count

    def fault(self, sentence: str) -> None:
        """Note a fault; only the first FAULTS_MAX keep their words."""
        self.fault_count += 1
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(sentence)

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    store: AuditStore,
    epoch: str,
    checkpoints: dict[int, tuple[int, bytes]],
    *,
    partitions: int,
    progress: Progress = lambda _: None,
) -> Report:
    """Prove every partition. `checkpoints`: partition → (next offset, chain) of group audit, read before this is called."""
    report = Report()
    for number in range(partitions):
        manifest = store.rows(MANIFEST, epoch=epoch, number=number)
        report.partitions += 1
        _prove_chain(report, number, manifest, checkpoints.get(number, (0, CHAIN_START)))
        if not manifest:
            _prove_nothing(report, store, epoch, number)
            continue
        _prove_counts(report, store, epoch, number, manifest[-1]["last_offset"])
        _prove_rows(report, store, epoch, number, partitions, manifest)
        report.blocks += len(manifest)
        report.records += sum(row["records"] for row in manifest)
        progress(f"partition {number}: {report.records} records, {report.fault_count} faults")
    return report


def _prove_chain(report: Report, number: int, manifest: Manifest, checkpoint: tuple[int, bytes]) -> None:
    """Blocks follow each other from offset 0, each chain value from the one before, one of them the checkpoint's."""
    chain, at = CHAIN_START, 0
    values = {0: CHAIN_START}
    for row in manifest:
        first, last = row["first_offset"], row["last_offset"]
        if first != at:
            report.fault(f"partition {number}: manifest jumps from offset {at} to {first}")
        if row["records"] != last - first + 1:
            report.fault(
                f"partition {number}, block {first}: manifest counts {row['records']} records to offset {last}"
            )
        chain = next_chain(chain, bytes.fromhex(row["block_hash"]))
        if chain.hex() != row["chain_hash"].lower():
            report.fault(f"partition {number}, block {first}: chain value is not what follows from the block before")
            chain = bytes.fromhex(row["chain_hash"])
        at = last + 1
        values[at] = bytes.fromhex(row["chain_hash"])
    next_offset, known = checkpoint
    if next_offset > at:
        report.fault(
            f"partition {number}: the log ends at offset {at}, its checkpoint in Kafka at {next_offset}: cut tail"
        )
    elif values.get(next_offset) != known:
        report.fault(f"partition {number}: chain value at offset {next_offset} is not the checkpoint's in Kafka")


def _prove_nothing(report: Report, store: AuditStore, epoch: str, number: int) -> None:
    for table in ("usage_log", "usage_events"):
        [found] = store.rows(COUNTS.format(table=table), epoch=epoch, number=number, high=2**63)
        report.unsealed += found["records"] if table == "usage_log" else 0


def _prove_counts(report: Report, store: AuditStore, epoch: str, number: int, high: int) -> None:
    """Each offset once in either table; also where no block of the manifest would look."""
    for table in ("usage_log", "usage_events"):
        [found] = store.rows(COUNTS.format(table=table), epoch=epoch, number=number, high=high)
        if (found["records"], found["offsets"]) != (high + 1, high + 1):
            report.fault(
                f"partition {number}: {table} holds {found['records']} rows of {found['offsets']} offsets up to {high}"
            )
    [whole] = store.rows(COUNTS.format(table="usage_log"), epoch=epoch, number=number, high=2**63)
    report.unsealed += max(0, whole["records"] - high - 1)


def _prove_rows(
    report: Report, store: AuditStore, epoch: str, number: int, partitions: int, manifest: Manifest
) -> None:
    state, audit = PartitionState(number, partitions, epoch), Audit()
    for blocks in _chunks(manifest):
        low, high = blocks[0]["first_offset"], blocks[-1]["last_offset"]
        place = {"epoch": epoch, "number": number, "low": low, "high": high}
        _prove_hashes(report, store, place, blocks)
        log = _read(store, "usage_log", LOG_SCHEMA, place)
        try:
            records = records_of(log)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            report.fault(f"partition {number}, offsets {low} to {high}: headers cannot be read: {error}")
            return
        if records.offsets.tolist() != list(range(low, high + 1)):
            return  # told by the counts and hashes; what follows cannot be judged without what is missing
        try:
            made = audit.block(judge_block(state, records), epoch)
        except Fatal as error:
            report.fault(f"partition {number}, offsets {low} to {high}: cannot be judged again: {error}")
            return
        for table, expected, found in (
            ("usage_log", made.log, log),
            ("usage_events", made.events, _read(store, "usage_events", EVENTS_SCHEMA, place)),
        ):
            for column, rows in differences(pa.Table.from_batches([expected]), found).items():
                report.fault(
                    f"partition {number}, offset {low + rows[0]}: {table}.{column} was changed ({len(rows)} rows)"
                )


def _chunks(manifest: Manifest) -> Iterator[Manifest]:
    chunk: Manifest = []
    for row in manifest:
        chunk.append(row)
        if sum(each["records"] for each in chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _prove_hashes(report: Report, store: AuditStore, place: dict[str, Any], blocks: Manifest) -> None:
    firsts = [row["first_offset"] for row in blocks]
    found = {row["first_offset"]: row for row in store.rows(BLOCKS, **place, firsts=firsts)}
    for row in blocks:
        name = f"partition {place['number']}, block {row['first_offset']}"
        mine = found.get(row["first_offset"])
        if mine is None:
            report.fault(f"{name}: no record of it is in usage_log")
            continue
        if (mine["records"], mine["last"]) != (row["records"], row["last_offset"]):
            report.fault(f"{name}: {mine['records']} records to offset {mine['last']}, manifest says {row['records']}")
        if mine["block_hash"] != row["block_hash"]:
            report.fault(
                f"{name}: its records do not give the block's hash: a key, header, value, time or row was changed"
            )
        times = tuple(int(mine[side].timestamp() * 1000 + 0.5) for side in ("first_append", "last_append"))
        if times != (row["first_append"], row["last_append"]):
            report.fault(f"{name}: append times are {times}, manifest says {row['first_append'], row['last_append']}")


def _read(store: AuditStore, table: str, schema: pa.Schema, place: dict[str, Any]) -> pa.Table:
    """Rows of a table in offset order. The tables are named here, never by a caller."""
    return store.arrow(
        f"SELECT {', '.join(schema.names)} FROM {table} FINAL WHERE epoch = {{epoch:String}}"
        " AND kafka_partition = {number:UInt16} AND kafka_offset >= {low:UInt64} AND kafka_offset <= {high:UInt64}"
        " ORDER BY kafka_offset",
        **place,
    )


def differences(expected: pa.Table, found: pa.Table) -> dict[str, list[int]]:
    """column → rows that differ, {} where both tables are the same; `rows` where they are not of one length."""
    if len(expected) != len(found):
        return {"rows": [min(len(expected), len(found))]}
    differ: dict[str, list[int]] = {}
    for name in expected.column_names:
        mine, theirs = _plain(expected.column(name)), _plain(found.column(name))
        if not mine.equals(theirs):
            rows = [
                at
                for at, pair in enumerate(zip(mine.to_pylist(), theirs.to_pylist(), strict=True))
                if pair[0] != pair[1]
            ]
            if rows:
                differ[name] = rows
    return differ


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """A column in one form, whichever way it came: words and texts as bytes, times as whole numbers."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_map(kind):
        keys, items = _plain(pa.chunked_array([array.keys])), _plain(pa.chunked_array([array.items]))
        return pa.MapArray.from_arrays(array.offsets, keys, items)
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(array.offsets, _plain(pa.chunked_array([array.values])))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return array.cast(pa.binary())
    if pa.types.is_timestamp(kind):
        return pc.cast(array, pa.timestamp(kind.unit)).cast(pa.int64())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.int64())
    return array
