"""`audit verify` is green over every kind of record, and red after any one change to either table, the manifest or the tail."""

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from tests.audit_batches import EPOCH, Log, store_of, varied
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.streams.audit import CHAIN_START, EVENTS_SCHEMA, LOG_SCHEMA
from tollway.streams.audit_verify import Report, verify

KEYS = {"epoch", "kafka_partition", "kafka_offset"}
LOG_COLUMNS = [name for name in LOG_SCHEMA.names if name not in KEYS | {"append_time"}]
EVENT_COLUMNS = [name for name in EVENTS_SCHEMA.names if name not in KEYS | {"append_time", "record_key"}]
MANIFEST_COLUMNS = ["last_offset", "records", "block_hash", "chain_hash", "first_append", "last_append"]
OFFSET = 20
"""Where the changes are made: usage of the second block."""


class Proven:
    """A database with three blocks of one partition, and what Kafka's checkpoint knows of them."""

    def __init__(self, store: AuditStore, log: Log) -> None:
        self.store = store
        self.blocks = list(log.blocks(16, 30))
        self.checkpoint = (self.blocks[-1].last + 1, self.blocks[-1].manifest["chain_hash"])
        store._insert(self.blocks)

    def report(self, checkpoint: tuple[int, bytes] | None = None) -> Report:
        """Verify as of now."""
        return verify(self.store, EPOCH, {0: checkpoint or self.checkpoint}, partitions=1)

    def change(self, statement: str) -> None:
        """A change that somebody makes in the database, in force when this returns."""
        self.store.command(statement + " SETTINGS mutations_sync = 2")

    def update(self, table: str, column: str, where: str) -> None:
        """Change one column to another value of its type."""
        [row] = self.store.rows(f"SELECT toTypeName({column}) AS kind FROM {table} LIMIT 1")
        self.change(f"ALTER TABLE {table} UPDATE {column} = {other(column, row['kind'])} WHERE {where}")


def other(column: str, kind: str) -> str:
    """An expression for another value of a column's type."""
    if kind.startswith("Map") and "Int64" in kind:
        return "map('calls', toInt64(99))"
    if kind.startswith("Map"):
        return "map('added', 'x')"
    if kind.startswith("Array"):
        return f"arrayPushBack({column}, 'x')"
    if kind == "Bool":
        return f"NOT {column}"
    if kind.startswith("FixedString"):
        return "toFixedString('x', 32)"
    if "String" in kind:
        return f"concat(ifNull({column}, ''), 'x')"
    if "DateTime64" in kind:
        return f"{column} + INTERVAL 1 SECOND"
    return f"ifNull({column}, 0) + 1"


@pytest.fixture
def proven(clickhouse: ClickHouseServer) -> Iterator[Proven]:
    store = store_of(clickhouse, f"verify_{uuid.uuid4().hex}")
    store.migrate()
    log = Log()
    varied(log, 40)
    log.tick()
    log.append(None, b"\xff\x00raw", (("h", b"\x00\xff"),))
    log.append(b"acme", b"")
    log.usage("acme", principal="not an id")
    varied(log, 20, seed=2)
    with contextlib.closing(store):
        yield Proven(store, log)
        store.command(f"DROP DATABASE {store.database}")


def test_green_over_usage_commands_ticks_and_poison(proven: Proven) -> None:
    """Untouched, every record of every kind is proven; a second insert of the same blocks changes nothing."""
    report = proven.report()
    assert (report.faults, report.ok, report.blocks, report.unsealed) == ([], True, 3, 0)
    assert report.records == proven.checkpoint[0]
    proven.store._insert(proven.blocks)
    assert proven.report().ok


def test_an_older_checkpoint_is_no_fault(proven: Proven) -> None:
    """A worker may have stored blocks behind its last checkpoint."""
    middle = proven.blocks[1]
    assert proven.report((middle.last + 1, middle.manifest["chain_hash"])).ok
    assert proven.report((0, CHAIN_START)).ok


@pytest.mark.parametrize("column", LOG_COLUMNS)
def test_red_after_a_change_of_the_log(proven: Proven, column: str) -> None:
    """Any column of one row of usage_log."""
    proven.update("usage_log", column, f"kafka_offset = {OFFSET}")
    assert not proven.report().ok


@pytest.mark.parametrize("column", EVENT_COLUMNS)
def test_red_after_a_change_of_the_columns(proven: Proven, column: str) -> None:
    """Any column of one row of usage_events, named with its offset."""
    proven.update("usage_events", column, f"kafka_offset = {OFFSET}")
    [fault] = proven.report().faults
    assert f"offset {OFFSET}: usage_events.{column} was changed (1 rows)" in fault


@pytest.mark.parametrize("column", MANIFEST_COLUMNS)
def test_red_after_a_change_of_the_manifest(proven: Proven, column: str) -> None:
    """Any column of one manifest row."""
    proven.update("audit_manifest", column, "first_offset = 16")
    assert not proven.report().ok


@pytest.mark.parametrize("table", ["usage_log", "usage_events", "audit_manifest"])
def test_red_after_a_row_is_gone(proven: Proven, table: str) -> None:
    """One row less of any table."""
    where = "first_offset = 16" if table == "audit_manifest" else f"kafka_offset = {OFFSET}"
    proven.change(f"ALTER TABLE {table} DELETE WHERE {where}")
    assert not proven.report().ok


@pytest.mark.parametrize(
    ("table", "replaced"),
    [
        ("usage_log", "'other' AS raw"),
        ("usage_log", "append_time + INTERVAL 1 MILLISECOND AS append_time"),
        ("usage_log", "kafka_offset + 7 AS kafka_offset"),
        ("usage_events", "'other' AS record_key"),
        ("usage_events", "append_time + INTERVAL 1 MONTH AS append_time"),
        ("usage_events", "kafka_offset + 7 AS kafka_offset"),
    ],
)
def test_red_after_a_row_is_added(proven: Proven, table: str, replaced: str) -> None:
    """A second row for an offset, in any place where it would lie; or a row over another one."""
    proven.change(f"INSERT INTO {table} SELECT * REPLACE ({replaced}) FROM {table} WHERE kafka_offset = {OFFSET}")
    assert not proven.report().ok


def test_red_after_the_tail_is_cut(proven: Proven) -> None:
    """The last block gone from all three tables, as if it had never been: Kafka's checkpoint knows."""
    first = proven.blocks[-1].first
    for table in ("usage_log", "usage_events"):
        proven.change(f"ALTER TABLE {table} DELETE WHERE kafka_offset >= {first}")
    proven.change(f"ALTER TABLE audit_manifest DELETE WHERE first_offset = {first}")
    [fault] = proven.report().faults
    assert "cut tail" in fault


def test_red_where_the_whole_log_was_made_again(proven: Proven) -> None:
    """Another history, consistent in itself, does not end in the checkpoint's chain value."""
    for table in ("usage_log", "usage_events", "audit_manifest"):
        proven.change(f"TRUNCATE TABLE {table}")
    forged = Log()
    varied(forged, 100, seed=9)
    proven.store._insert(list(forged.blocks(16, 30)))
    assert any("checkpoint" in fault for fault in proven.report().faults)


def test_a_flipped_byte_is_found_in_every_block(proven: Proven) -> None:
    """One bit of one value, wherever it lies."""
    for block in proven.blocks:
        at = block.first + block.count // 2
        proven.change(
            f"ALTER TABLE usage_log UPDATE raw = concat(substring(raw, 1, 7), char(bitXor(ascii(substring(raw, 8, 1)), 1)), "
            f"substring(raw, 9)) WHERE kafka_offset = {at}"
        )
    faults = proven.report().faults
    for block in proven.blocks:
        assert any(f"block {block.first}: its records do not give the block's hash" in fault for fault in faults)
