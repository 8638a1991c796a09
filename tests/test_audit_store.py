"""The audit log's database: what goes in comes out, a second time is no time, and failures say whether to try again."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.audit_batches import Log, store_of, varied
from tollway.connectors import clickhouse as module
from tollway.connectors.clickhouse import AuditStore, inserts, statements
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.process import free_port
from tollway.connectors.errors import Fatal, Unavailable
from tollway.streams.audit import EVENTS_SCHEMA, LOG_SCHEMA, Block
from tollway.streams.audit_compare import differences

TABLES = ("usage_log", "usage_events", "audit_manifest")


@pytest.fixture
def store(clickhouse: ClickHouseServer) -> Iterator[AuditStore]:
    """A migrated database of the test's own."""
    store = store_of(clickhouse, f"audit_{uuid.uuid4().hex}")
    store.migrate()
    with contextlib.closing(store):
        yield store
        store.command(f"DROP DATABASE {store.database}")


def physical(store: AuditStore) -> dict[str, int]:
    """Rows as they lie, unmerged copies included."""
    return {table: store.rows(f"SELECT count() AS n FROM {table}")[0]["n"] for table in TABLES}


def stored(store: AuditStore, table: str, columns: list[str]) -> pa.Table:
    return store.arrow(f"SELECT {', '.join(columns)} FROM {table} FINAL ORDER BY kafka_offset")


async def test_rows_come_back_as_they_were(store: AuditStore) -> None:
    """Both tables give back every column of every row of a block, nulls, bytes, maps and far times too."""
    log = Log()
    varied(log, 500)
    log.append(None, b"\xff\x00raw", (("h", b"\x00\xff"),))
    log.append(b"", b"")
    log.tick()
    log.usage(occurred_at=2**62, sequence=0)
    (block,) = log.blocks()
    await store.insert([block])
    assert differences(pa.Table.from_batches([block.log]), stored(store, "usage_log", LOG_SCHEMA.names)) == {}
    events = pa.Table.from_batches([block.events])
    assert differences(events, stored(store, "usage_events", EVENTS_SCHEMA.names)) == {}


async def test_the_same_call_again_stores_nothing(store: AuditStore) -> None:
    """A retry of an insert leaves every table as it was: the tokens are known."""
    log = Log()
    varied(log, 100)
    blocks = list(log.blocks(40, 40))
    await store.insert(blocks)
    before = physical(store)
    await store.insert(blocks)
    assert physical(store) == before == {"usage_log": 102, "usage_events": 102, "audit_manifest": 3}


async def test_blocks_grouped_otherwise_show_once(store: AuditStore) -> None:
    """After a crash the same blocks may come in other inserts: the rows lie twice, FINAL and the view show them once."""
    log = Log()
    varied(log, 100)
    blocks = list(log.blocks(40, 40))
    await store.insert(blocks)
    await store.insert(blocks[1:])
    assert physical(store)["usage_log"] == 102 + 62
    assert store.rows("SELECT count() AS n FROM usage") == [{"n": 100}]
    assert store.rows("SELECT count() AS n FROM audit_manifest FINAL") == [{"n": 3}]


async def test_the_view_shows_accepted_usage_and_exact_money(store: AuditStore) -> None:
    """`usage` holds accepted usage only; revenue is revenue_nano / 10⁹ to the last digit; its times are those that count."""
    log = Log()
    log.usage(revenue_nano=99_999_999_999_999, revenue_asset="USD", cost_nano=1, cost_asset="EUR")
    log.records.append(log.records[-1])
    log.usage(quantities={"calls": -1})
    log.usage(occurred_at=(log.now_ms + 120_000) * 1000)
    log.usage(occurred_at=(log.now_ms - 7_200_000) * 1000)
    log.usage(occurred_at=(log.now_ms - 7_200_000) * 1000, hold="h1")
    await store.insert(list(log.blocks()))
    rows = store.rows(
        "SELECT toString(revenue) AS r, toString(cost) AS c, toUnixTimestamp64Micro(billed_at) AS billed,"
        " toUnixTimestamp64Micro(counted_at) AS counted FROM usage ORDER BY kafka_offset"
    )
    assert (rows[0]["r"], rows[0]["c"]) == ("99999.999999999", "0.000000001")
    assert rows[1]["r"] is None
    batches = [batch for batch in log.batches() if len(batch.row)]
    for name, column in (("occurred_us", "billed"), ("window_us", "counted")):
        expected = np.concatenate([getattr(batch, name)[batch.accepted] for batch in batches])
        assert [row[column] for row in rows] == expected.tolist()


def test_tables_have_the_columns_that_blocks_have(store: AuditStore) -> None:
    """No column of a table is missing in a block, and none of a block in its table."""
    for table, schema in (
        ("usage_log", LOG_SCHEMA), ("usage_events", EVENTS_SCHEMA), ("audit_manifest", module.MANIFEST_SCHEMA)
    ):  # fmt: skip
        assert [row["name"] for row in store.rows(f"DESCRIBE {table}")] == schema.names


def test_large_blocks_go_alone_and_small_ones_share() -> None:
    """8,000 rows and more are an insert of their own; smaller blocks share up to the declared limits, in order."""

    class Sized:
        def __init__(self, count: int, size: int = 0) -> None:
            self.count, self.bytes = count, size

    def sizes(*blocks: Sized) -> list[list[int]]:
        return [[block.count for block in group] for group in inserts(blocks)]  # type: ignore[arg-type]

    assert sizes(Sized(10), Sized(8_000), Sized(20)) == [[8_000], [10, 20]]
    assert sizes(*[Sized(7_999)] * 9) == [[7_999] * 8, [7_999]]
    assert sizes(Sized(1, 20 << 20), Sized(2, 20 << 20)) == [[1], [2]]
    assert sizes() == []


def test_migrations_apply_once(store: AuditStore) -> None:
    """A second run has nothing to do and changes nothing."""
    assert store.migrate() == []
    names = [row["name"] for row in store.rows("SELECT name FROM tollway_schema FINAL ORDER BY version")]
    assert names == sorted(path.name for path in module.MIGRATIONS.glob("*.sql"))


def test_a_newer_database_is_refused(store: AuditStore) -> None:
    """A database that a newer Tollway has migrated is not touched; the message says to upgrade."""
    store.command("INSERT INTO tollway_schema (version, name, digest) VALUES (9999, '9999_later.sql', '')")
    with pytest.raises(Fatal, match=r"9999_later\.sql of a newer Tollway: upgrade"):
        store.migrate()


def test_a_changed_migration_is_refused(store: AuditStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An applied file that has changed since is named, not applied again."""
    for path in module.MIGRATIONS.glob("*.sql"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8") + ("-- x" if "0001" in path.name else ""))
    monkeypatch.setattr(module, "MIGRATIONS", tmp_path)
    with pytest.raises(Fatal, match=r"0001_usage_log\.sql was changed"):
        store.migrate()


def test_statements_end_at_a_semicolon_at_a_lines_end() -> None:
    """Comments are no statements, and a semicolon inside a line ends none."""
    assert statements("-- a;\nSELECT ';' ;\n\n-- b\nSELECT 2;\n") == ["SELECT ';'", "SELECT 2"]


def some_block() -> Block:
    log = Log()
    varied(log, 5)
    return next(log.blocks())


def refusing(clickhouse: ClickHouseServer, **other: Any) -> AuditStore:
    where: dict[str, Any] = {"port": clickhouse.port, "password": clickhouse.password, "database": "tollway", **other}
    return AuditStore(clickhouse.host, where["port"], clickhouse.user, where["password"], where["database"])


async def test_a_server_that_is_away_is_tried_again(clickhouse: ClickHouseServer) -> None:
    """No server at the port is Unavailable, and names the address."""
    port = free_port()
    with pytest.raises(Unavailable, match=f"ClickHouse at 127.0.0.1:{port} does not answer"):
        await refusing(clickhouse, port=port).insert([some_block()])


async def test_a_wrong_password_is_fatal(clickhouse: ClickHouseServer) -> None:
    """A wrong password is Fatal, in one line that names the settings to check and not the password."""
    with pytest.raises(Fatal, match="TOLLWAY_CLICKHOUSE_PASSWORD") as failure:
        await refusing(clickhouse, password="open sesame").insert([some_block()])
    assert "\n" not in str(failure.value)
    assert "sesame" not in str(failure.value)


async def test_missing_tables_are_fatal(clickhouse: ClickHouseServer, store: AuditStore) -> None:
    """A missing database or table is Fatal and says: migrate."""
    with pytest.raises(Fatal, match="migrate"):
        await refusing(clickhouse, database="nowhere").insert([some_block()])
    store.command("DROP TABLE usage_events")
    with pytest.raises(Fatal, match="migrate"):
        await store.insert([some_block()])


async def test_too_many_parts_are_back_pressure(store: AuditStore) -> None:
    """TOO_MANY_PARTS is Unavailable; once parts are merged, the same call succeeds and nothing is lost or doubled."""
    log = Log()
    varied(log, 60)
    first, second, third = log.blocks(20, 20)
    store.command("SYSTEM STOP MERGES usage_events")
    store.command("ALTER TABLE usage_events MODIFY SETTING parts_to_throw_insert = 2, parts_to_delay_insert = 0")
    await store.insert([first])
    await store.insert([second])
    with pytest.raises(Unavailable, match="code 252"):
        await store.insert([third])
    store.command("ALTER TABLE usage_events MODIFY SETTING parts_to_throw_insert = 3000")
    await store.insert([third])
    assert physical(store) == {"usage_log": 62, "usage_events": 62, "audit_manifest": 3}


async def test_a_violated_constraint_is_fatal(store: AuditStore) -> None:
    """Rows that the database will never take stop the partition; none of the block's manifest is there."""
    store.command("ALTER TABLE usage_events ADD CONSTRAINT none CHECK account != 'acme'")
    log = Log()
    log.usage()
    with pytest.raises(Fatal, match="constraint"):
        await store.insert(list(log.blocks()))
    assert physical(store)["audit_manifest"] == 0
