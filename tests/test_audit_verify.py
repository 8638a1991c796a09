"""`audit verify` is green over what was written, and red, naming the place, after any one change."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from tests.audit_batches import EPOCH, Log, judge_block, store_of, varied
from tollway.connectors.clickhouse import MANIFEST_SCHEMA, AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.streams import audit_partition
from tollway.streams.audit import CHAIN_START, EVENTS_SCHEMA, LOG_SCHEMA, Block
from tollway.streams.audit_compare import differences
from tollway.streams.audit_report import Fault, Report
from tollway.streams.audit_verify import verify

TABLES = ("usage_log", "usage_events", "audit_manifest")
HIT = 37
"""Offset of the row that most tests change: in the second block of partition 0, accepted, no field of it null."""
BLOCKS = (20, 30, 30)


def written() -> dict[int, list[Block]]:
    """partition → blocks, of every kind of record."""
    logs = {}
    for partition in (0, 1):
        log = Log(partition=partition)
        varied(log, HIT - 2 if partition == 0 else 40, seed=partition)
        log.usage(
            agent="a", session="s", run="r", parent="q", path=["q"], hold="h", rail="x402", revenue_nano=5,
            revenue_asset="USD", cost_nano=1, cost_asset="USD", payment_ref="p", provider="v", model="m",
            trace_id="t", attributes={"k": "v"},
        )  # fmt: skip
        log.records.append(log.records[-1])
        log.usage(quantities={"calls": -1})
        log.append(b"acme", b"\x00")
        log.append(b"acme", b"")
        log.tick()
        varied(log, 60, seed=9)
        logs[partition] = list(log.blocks(*BLOCKS))
    return logs


@pytest.fixture(scope="module")
def blocks() -> dict[int, list[Block]]:
    return written()


@pytest.fixture(scope="module")
def pristine(clickhouse: ClickHouseServer, blocks: dict[int, list[Block]]) -> Iterator[AuditStore]:
    """A database as the workers leave it."""
    store = store_of(clickhouse, f"verify_{uuid.uuid4().hex}")
    store.migrate()
    for each in blocks.values():
        asyncio.run(store.insert(each))
    with contextlib.closing(store):
        yield store
        store.command(f"DROP DATABASE {store.database}")


@pytest.fixture(scope="module")
def copy(clickhouse: ClickHouseServer) -> Iterator[AuditStore]:
    store = store_of(clickhouse, f"verify_{uuid.uuid4().hex}")
    store.migrate()
    with contextlib.closing(store):
        yield store
        store.command(f"DROP DATABASE {store.database}")


@pytest.fixture
def store(copy: AuditStore, pristine: AuditStore) -> AuditStore:
    """The same rows in tables that a test may change."""
    for table in TABLES:
        copy.command(f"TRUNCATE TABLE {table}")
        # the emptied table remembers the blocks it had
        rows = f"SELECT * FROM {pristine.database}.{table} FINAL"
        copy.command(f"INSERT INTO {table} SETTINGS insert_deduplicate = 0 {rows}")
    return copy


def checkpoints(blocks: dict[int, list[Block]]) -> dict[tuple[str, int], tuple[int, bytes]]:
    return {
        (EPOCH, partition): (each[-1].last + 1, each[-1].manifest["chain_hash"]) for partition, each in blocks.items()
    }


def verified(store: AuditStore, blocks: dict[int, list[Block]], **options: Any) -> Report:
    given: dict[str, Any] = {"rejudge": judge_block, "partitions": 1, "settle_s": 0.0, **options}
    return verify(store, given.pop("checkpoints", checkpoints(blocks)), **given)


def red(report: Report, table: str, offset: int | None = HIT, partition: int = 0) -> list[Fault]:
    """The faults, once they name the table, the partition and the place."""
    assert not report.ok
    assert {(fault.epoch, fault.partition) for fault in report.faults} == {(EPOCH, partition)}, report.faults
    assert any(
        fault.table == table and (offset is None or fault.first <= offset <= fault.last) for fault in report.faults
    ), report.faults
    return report.faults


PLACE = ("epoch", "kafka_partition", "kafka_offset")
OTHERWISE = {
    "clock_ahead": "NOT clock_ahead",
    "occurred_at": "occurred_at + toIntervalMicrosecond(1)",
    "quantities": "mapConcat(quantities, map('calls', 2))",
    "path": "arrayConcat(path, ['z'])",
    "attributes": "mapConcat(attributes, map('k', 'w'))",
    **{name: f"{name} + 1" for name in ("schema_id", "sequence", "latency_us")},
    **{name: f"ifNull({name}, -1) + 1" for name in ("revenue_nano", "cost_nano")},
}
KEYS = {
    "epoch": ("'other'", f"epoch = '{EPOCH}'"),
    "kafka_partition": ("toUInt16(7)", "kafka_partition = 0"),
    "kafka_offset": ("toUInt64(1000000)", f"kafka_offset = {HIT}"),
    "append_time": ("append_time + toIntervalMillisecond(1)", ""),
    "record_key": ("concat(record_key, 'x')", "record_key NOT LIKE '%x'"),
}
"""Sort key columns: another value, and what the old row is told by. No UPDATE changes them."""


def update(store: AuditStore, table: str, changes: dict[tuple[str, int], int]) -> None:
    """Change (column, partition) of one row each: the one at that offset."""
    sets = ", ".join(
        f"{column} = if(kafka_partition = {partition} AND kafka_offset = {at}, {another(column)}, {column})"
        for (column, partition), at in changes.items()
    )
    store.command(f"ALTER TABLE {table} UPDATE {sets} WHERE 1 SETTINGS mutations_sync = 1")


def another(column: str) -> str:
    """SQL of a value that is not the column's."""
    return OTHERWISE.get(column, f"concat({column}, 'x')")


def test_green_over_what_was_written(pristine: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Untouched tables are proven whole, judged again in every row and held against Kafka's chain values."""
    report = verified(pristine, blocks)
    records = sum(block.count for each in blocks.values() for block in each)
    assert report.faults == []
    assert report.unproven == []
    assert (report.partitions, report.blocks, report.tails) == (2, 8, 2)
    assert report.records == report.compared == records
    assert report.chains == checkpoints(blocks)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_green_while_rows_lie_twice(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Copies that a crash has left are no fault: readers see each row once."""
    store.command("SYSTEM STOP MERGES")
    try:
        store.command(
            "INSERT INTO usage_log SELECT * FROM usage_log WHERE kafka_offset > 50 SETTINGS insert_deduplicate = 0"
        )
        store.command("INSERT INTO usage_events SELECT * FROM usage_events SETTINGS insert_deduplicate = 0")
        assert verified(store, blocks).faults == []
    finally:
        store.command("SYSTEM START MERGES")


def test_a_changed_column_of_the_log_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """What the broker gave is proven block by block; what was read out of it, kind and schema id, row by row."""
    hashed = {"record_key": 5, "headers": 25, "raw": 55}
    read = {"kind": HIT, "schema_id": HIT + 1}
    update(
        store,
        "usage_log",
        {**{(name, 0): at for name, at in hashed.items()}, **{(name, 1): at for name, at in read.items()}},
    )
    report = verified(store, blocks)
    found = {(fault.partition, fault.first, fault.last) for fault in report.faults}
    assert found == {(0, 0, 19), (0, 20, 49), (0, 50, 79), *((1, at, at) for at in read.values())}
    assert {fault.table for fault in report.faults} == {"usage_log"}
    assert {*hashed, *read, *PLACE, "append_time"} == set(LOG_SCHEMA.names)


def test_a_changed_column_of_the_events_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Each value changed in one row of usage_events, null or not, is found with its column's name and its offset."""
    columns = [name for name in EVENTS_SCHEMA.names if name not in KEYS]
    changes = {name: at for at, name in enumerate(columns, 10)}
    update(store, "usage_events", {(name, 0): at for name, at in changes.items()})
    faults = red(verified(store, blocks), "usage_events", None)
    assert {fault.what for fault in faults} == {
        f"column {name} is not what the record says: [{at}]" for name, at in changes.items()
    }


@pytest.mark.parametrize(
    ("table", "column"),
    [(table, name) for table in TABLES[:2] for name in KEYS if (table, name) != ("usage_log", "record_key")],
)
def test_a_moved_row_is_red(store: AuditStore, blocks: dict[int, list[Block]], table: str, column: str) -> None:
    """A row written anew under another key, the old one deleted, is found at its old place; and at its new one."""
    value, old = KEYS[column]
    row = f"kafka_partition = 0 AND kafka_offset = {HIT}"
    at_ms = blocks[0][1].log["append_time"].cast(pa.int64())[HIT - blocks[0][1].first].as_py()
    store.command(
        f"INSERT INTO {table} SELECT * REPLACE ({value} AS {column}) FROM (SELECT * FROM {table} FINAL WHERE {row})"
    )
    store.command(f"DELETE FROM {table} WHERE {row} AND {old or f'toUnixTimestamp64Milli(append_time) = {at_ms}'}")
    report = verified(store, blocks)
    places = {(fault.epoch, fault.partition) for fault in report.faults if fault.table == table}
    assert (EPOCH, 0) in places
    assert any(fault.table == table and fault.first <= HIT <= fault.last for fault in report.faults), report.faults
    strays = [fault for fault in report.faults if "beyond the newest manifest row" in fault.what]
    assert len(strays) == (column in PLACE)


@pytest.mark.parametrize("column", MANIFEST_SCHEMA.names)
def test_a_changed_manifest_is_red(store: AuditStore, blocks: dict[int, list[Block]], column: str) -> None:
    """Any value changed in one row of the manifest is found at that block."""
    value = {
        "epoch": "'other'", "kafka_partition": "toUInt16(7)", "first_offset": "first_offset + 1",
        "last_offset": "last_offset + 1", "records": "records + 1", "block_hash": "toFixedString('x', 32)",
        "chain_hash": "toFixedString('x', 32)", "first_append": "first_append - toIntervalMillisecond(1)",
        "last_append": "last_append + toIntervalMillisecond(1)",
    }[column]  # fmt: skip
    first = blocks[0][1].first
    row = f"kafka_partition = 0 AND first_offset = {first} AND epoch = '{EPOCH}'"
    if column in ("epoch", "kafka_partition", "first_offset"):
        store.command(
            f"INSERT INTO audit_manifest SELECT * REPLACE ({value} AS {column}) FROM audit_manifest WHERE {row}"
        )
        store.command(f"DELETE FROM audit_manifest WHERE {row}")
    else:
        store.command(f"ALTER TABLE audit_manifest UPDATE {column} = {value} WHERE {row} SETTINGS mutations_sync = 1")
    report = verified(store, blocks)
    assert any(
        fault.table == "audit_manifest" and fault.partition == 0 and fault.first <= blocks[0][1].last
        for fault in report.faults
    ), report.faults


@pytest.mark.parametrize("table", ["usage_log", "usage_events", "audit_manifest"])
def test_a_deleted_row_is_red(store: AuditStore, blocks: dict[int, list[Block]], table: str) -> None:
    """A row that is gone from any table is found; from the log and the events with its own offset."""
    column = "first_offset" if table == "audit_manifest" else "kafka_offset"
    at = blocks[0][1].first if table == "audit_manifest" else HIT
    store.command(f"DELETE FROM {table} WHERE kafka_partition = 0 AND {column} = {at}")
    faults = red(verified(store, blocks), table, at)
    if table != "audit_manifest":
        assert any(str([HIT]) in fault.what for fault in faults)


def test_an_older_checkpoint_is_no_fault(pristine: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Blocks behind a worker's last checkpoint are proven too; one that stands where no block ends is not met."""
    block = blocks[0][1]
    other = {(EPOCH, 1): checkpoints(blocks)[EPOCH, 1]}
    for older in ((block.last + 1, block.manifest["chain_hash"]), (0, CHAIN_START)):
        assert verified(pristine, blocks, checkpoints={(EPOCH, 0): older, **other}).ok
    between = verified(pristine, blocks, checkpoints={(EPOCH, 0): (block.last, block.manifest["chain_hash"]), **other})
    assert ["where no block ends" in fault.what for fault in between.faults] == [True]


def test_a_flipped_bit_is_red_in_every_block(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """One bit of one raw value, wherever it lies, names its block and no other."""
    flipped = "concat(substring(raw, 1, 7), char(bitXor(ascii(substring(raw, 8, 1)), 1)), substring(raw, 9))"
    for block in blocks[0][1:]:
        where = f"kafka_partition = 0 AND kafka_offset = {block.first + 1}"
        store.command(f"ALTER TABLE usage_log UPDATE raw = {flipped} WHERE {where} SETTINGS mutations_sync = 1")
    faults = verified(store, blocks).faults
    assert [(fault.first, fault.last) for fault in faults] == [(block.first, block.last) for block in blocks[0][1:]]


def test_a_row_written_over_another_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """ReplacingMergeTree shows the newest row of a key: one inserted over the true one is found."""
    row = f"kafka_partition = 0 AND kafka_offset = {HIT}"
    store.command(f"INSERT INTO usage_log SELECT * REPLACE ('other' AS raw) FROM (SELECT * FROM usage_log WHERE {row})")
    red(verified(store, blocks), "usage_log")


@pytest.mark.parametrize("table", ["usage_log", "usage_events"])
def test_an_added_row_is_red(store: AuditStore, blocks: dict[int, list[Block]], table: str) -> None:
    """A row behind the last sealed one that no worker seals is found."""
    end = blocks[0][-1].last
    store.command(
        f"INSERT INTO {table} SELECT * REPLACE (kafka_offset + 1 AS kafka_offset)"
        f" FROM (SELECT * FROM {table} FINAL WHERE kafka_partition = 0 AND kafka_offset = {end})"
    )
    red(verified(store, blocks), table, end + 1)


def test_a_copy_under_another_key_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """A second row of a record, under another key and in another month, is found though each row it doubles is right."""
    store.command(
        "INSERT INTO usage_events SELECT * REPLACE (append_time + toIntervalMonth(3) AS append_time) FROM usage_events FINAL"
        f" WHERE kafka_partition = 0 AND kafka_offset = {HIT}"
    )
    (fault,) = red(verified(store, blocks), "usage_events")
    assert "2 rows of one record" in fault.what


def test_a_cut_tail_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """A last block taken away whole, with its manifest row, is consistent in itself and shows against Kafka only."""
    first = blocks[0][-1].first
    for table in ("usage_log", "usage_events"):
        store.command(f"DELETE FROM {table} WHERE kafka_partition = 0 AND kafka_offset >= {first}")
    store.command(f"DELETE FROM audit_manifest WHERE kafka_partition = 0 AND first_offset >= {first}")
    faults = red(verified(store, blocks), "checkpoint", first)
    assert "the tail is cut" in faults[0].what
    alone = verified(store, blocks, checkpoints=None)
    assert alone.ok
    assert alone.unproven == ["tails: no checkpoints given"]


def test_a_partition_taken_away_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """A partition of which nothing is left in ClickHouse shows against Kafka's checkpoint."""
    for table in ("usage_log", "usage_events", "audit_manifest"):
        store.command(f"DELETE FROM {table} WHERE kafka_partition = 1")
    red(verified(store, blocks), "checkpoint", 0, partition=1)


def test_a_rewritten_history_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Who rewrites records, hashes and the whole chain consistently is found by the checkpoint's chain value."""
    log = Log()
    varied(log, 200, seed=5)
    forged = list(log.blocks(*BLOCKS, sum(block.count for block in blocks[0]) - sum(BLOCKS)))[:4]
    for table in ("usage_log", "usage_events", "audit_manifest"):
        store.command(f"DELETE FROM {table} WHERE kafka_partition = 0")
    asyncio.run(store.insert(forged))
    faults = red(verified(store, blocks), "checkpoint", forged[-1].last)
    assert [fault.table for fault in faults] == ["checkpoint"]


def test_a_partition_that_kafka_has_not_is_red(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """A forged partition, consistent in itself, is found; one of a log that is gone is reported as unproven."""
    forged, older = Log(partition=5), Log(epoch="0:gone")
    asyncio.run(store.insert([*forged.blocks(), *older.blocks()]))
    report = verified(store, blocks)
    assert [(fault.table, fault.partition) for fault in report.faults] == [("checkpoint", 5)]
    assert report.unproven == ["tail of partition 0 of 0:gone: Kafka has no checkpoint of that log"]


def test_rows_of_an_insert_under_way_are_waited_for(store: AuditStore, blocks: dict[int, list[Block]]) -> None:
    """Rows without a manifest row yet are no fault when it comes in time."""
    last = blocks[0][-1]
    row = f"kafka_partition = 0 AND first_offset = {last.first}"
    store.command(f"DELETE FROM audit_manifest WHERE {row}")
    at = {(EPOCH, 0): (last.first, blocks[0][-2].manifest["chain_hash"]), (EPOCH, 1): checkpoints(blocks)[EPOCH, 1]}
    assert not verified(store, blocks, checkpoints=at).ok
    waits = []

    def seal(wait_s: float) -> None:
        waits.append(wait_s)
        store._insert_into("audit_manifest", manifest_of(last), "again")

    assert verified(store, blocks, checkpoints=at, settle_s=60.0, wait=seal).ok
    assert len(waits) == 1


def manifest_of(block: Block) -> pa.Table:
    return pa.Table.from_pylist([block.manifest], schema=MANIFEST_SCHEMA)


def test_pages_and_stretches_prove_the_same(
    pristine: AuditStore, blocks: dict[int, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in small pages and hashed in small stretches, the report is the same; progress ends at all records."""
    whole, steps = verified(pristine, blocks), []
    monkeypatch.setattr(audit_partition, "MANIFEST_ROWS", 3)
    monkeypatch.setattr(audit_partition, "HASHED_ROWS", 40)
    monkeypatch.setattr(audit_partition, "COMPARED_ROWS", 1)
    report = verified(pristine, blocks, progress=lambda done, total: steps.append((done, total)))
    assert report == whole
    assert steps[-1] == (whole.records, whole.records)


def test_differences_name_what_is_missing_foreign_double_and_changed() -> None:
    """Rows are matched by offset, so that a missing one does not make all behind it differ."""

    def table(*rows: tuple[int, str | None]) -> pa.Table:
        return pa.table(
            {"kafka_offset": pa.array([row[0] for row in rows], pa.uint64()), "v": [row[1] for row in rows]}
        )

    ours = table((1, "a"), (2, "b"), (3, "c"), (4, None))
    assert differences(ours, ours) == {}
    assert differences(ours, table((1, "a"), (3, "x"), (3, "x"), (4, ""), (9, "z"))) == {
        "missing": [2], "foreign": [9], "double": [3], "v": [3, 4]
    }  # fmt: skip
