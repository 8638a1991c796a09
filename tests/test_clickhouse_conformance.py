"""The embedded ClickHouse server keeps the rules of a real one that the audit sink relies on."""

import asyncio
import base64
import contextlib
import http.client
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import pytest
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError
from hypothesis import given
from hypothesis import strategies as st

from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.clickhouse_engine import EngineError, _spool_folder
from tollway.connectors.embedded.clickhouse_server import COMPRESS, credentials, decompress
from tollway.connectors.embedded.clickhouse_sql import parse_insert
from tollway.connectors.embedded.process import Process, poll
from tollway.connectors.errors import Unavailable

ROWS = pa.table({"a": pa.array([1, 2], pa.uint64()), "b": ["x", "y"]})


def connect(server: ClickHouseServer, **options: Any) -> Client:
    login = {"username": server.user, "password": server.password, "database": server.database}
    where = {"host": server.host, "port": server.port, "autogenerate_session_id": False}
    return clickhouse_connect.get_client(**{**where, **login, **options})


def code(failure: pytest.ExceptionInfo[DatabaseError]) -> int:
    found = re.search(r"code: (\d+)", str(failure.value))
    assert found, failure.value
    return int(found[1])


@pytest.fixture(scope="module")
def client(clickhouse: ClickHouseServer) -> Iterator[Client]:
    with contextlib.closing(connect(clickhouse)) as client:
        yield client


@pytest.fixture
def table(client: Client) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex}"
    client.command(
        f"CREATE TABLE {name} (a UInt64, b String, CONSTRAINT small CHECK a < 1000) ENGINE = MergeTree ORDER BY a"
        " PARTITION BY a % 10 SETTINGS non_replicated_deduplication_window = 100"
    )
    yield name
    client.command(f"DROP TABLE {name}")


def count(client: Client, table: str) -> int:
    return int(client.query(f"SELECT count() FROM {table}").result_rows[0][0])


def test_too_many_parts_is_an_error(client: Client) -> None:
    """An insert that the engine refuses for too many parts raises 252 and stores nothing."""
    name = f"t_{uuid.uuid4().hex}"
    client.command(
        f"CREATE TABLE {name} (a UInt64, b String) ENGINE = MergeTree ORDER BY a"
        " SETTINGS parts_to_throw_insert = 3, parts_to_delay_insert = 3"
    )
    client.command(f"SYSTEM STOP MERGES {name}")
    for _ in range(3):
        client.insert_arrow(name, ROWS)
    for insert in (
        lambda: client.insert_arrow(name, ROWS),
        lambda: client.insert(name, [[1, "x"]], column_names=["a", "b"]),
        lambda: client.raw_insert(name, ["a", "b"], b"1\tx\n", fmt="TSV"),
        lambda: client.command(f"INSERT INTO {name} VALUES (1, 'x')"),
        lambda: client.command(f"INSERT INTO {name} SELECT 1, 'x'"),
    ):
        with pytest.raises(DatabaseError) as failure:
            insert()
        assert code(failure) == 252
    assert count(client, name) == 6
    client.command(f"DROP TABLE {name}")


def test_violated_constraint_is_an_error(client: Client, table: str) -> None:
    """One row that violates a constraint fails its whole insert with 469, by every way in."""
    bad = pa.table({"a": pa.array([1, 1000], pa.uint64()), "b": ["x", "y"]})
    for insert in (
        lambda: client.insert_arrow(table, bad),
        lambda: client.insert(table, [[1, "x"], [1000, "y"]], column_names=["a", "b"]),
        lambda: client.raw_insert(table, ["a", "b"], b"1\tx\n1000\ty\n", fmt="TSV"),
        lambda: client.command(f"INSERT INTO {table} VALUES (1, 'x'), (1000, 'y')"),
    ):
        with pytest.raises(DatabaseError) as failure:
            insert()
        assert code(failure) == 469
    assert count(client, table) == 0


def test_too_many_partitions_is_an_error(client: Client, table: str) -> None:
    """max_partitions_per_insert_block given with a request is enforced for that request."""
    with pytest.raises(DatabaseError) as failure:
        client.insert_arrow(table, ROWS, settings={"max_partitions_per_insert_block": 1})
    assert code(failure) == 252
    client.insert_arrow(table, ROWS)
    assert count(client, table) == 2


@pytest.mark.parametrize(("fmt", "data"), [("TSV", b"1x\ty\n"), ("Native", b"\x02\xff"), ("ArrowStream", b"junk")])
def test_malformed_data_is_an_error(client: Client, table: str, fmt: str, data: bytes) -> None:
    """Data that is not in its format raises and stores nothing."""
    with pytest.raises(DatabaseError):
        client.raw_insert(table, ["a", "b"], data, fmt=fmt)
    assert count(client, table) == 0


def test_unknown_names_are_errors(client: Client, table: str) -> None:
    """Unknown tables, columns, databases, formats and settings raise the server's own codes."""
    for sql, expected in {
        "INSERT INTO missing_table FORMAT TSV\n1\tx\n": 60,
        f"INSERT INTO {table} (a, missing) FORMAT TSV\n1\tx\n": 16,
        "SELECT * FROM missing_database.t": 81,
        f"INSERT INTO {table} FORMAT Missing\n1\tx\n": 73,
        "SELECT missing_column": 47,
        "SELEC 1": 62,
        "SELECT 1; SELECT 2": 62,
    }.items():
        with pytest.raises(DatabaseError) as failure:
            client.command(sql)
        assert code(failure) == expected, sql
    with pytest.raises(DatabaseError) as failure:
        client.command("SELECT 1", settings={"missing_setting": "1"})
    assert code(failure) == 115


def test_same_token_twice_is_once(client: Client, table: str) -> None:
    """A second insert under a known token changes nothing; another token inserts the same rows again."""
    for token, total in (("one", 2), ("one", 2), ("two", 4), ("one", 4)):
        client.insert_arrow(table, ROWS, settings={"insert_deduplication_token": token})
        assert count(client, table) == total


def test_token_and_rows_outlive_kill_9(tmp_path: Path) -> None:
    """What was acknowledged before kill -9 is there after it, and its token is still known."""
    server = ClickHouseServer(tmp_path)
    settings = {"insert_deduplication_token": "one"}
    try:
        server.start()
        server.wait_ready()
        with contextlib.closing(connect(server)) as client:
            client.command(
                "CREATE TABLE t (a UInt64, b String) ENGINE = MergeTree ORDER BY a"
                " SETTINGS non_replicated_deduplication_window = 100"
            )
            client.insert_arrow("t", ROWS, settings=settings)
        server.kill()
        server.start()
        server.wait_ready()
        with contextlib.closing(connect(server)) as client:
            assert count(client, "t") == 2
            client.insert_arrow("t", ROWS, settings=settings)
            assert count(client, "t") == 2
    finally:
        server.stop()


def test_a_killed_server_leaves_nothing_in_shared_memory(tmp_path: Path) -> None:
    """The spool folder that kill -9 leaves is removed at the next start of any server; one in use is not."""
    mine, lock = _spool_folder(tmp_path)
    with lock:
        left, left_lock = _spool_folder(tmp_path)
        (left / "body").write_bytes(b"rows")
        left_lock.close()  # as the kernel does for a killed process
        next_one, next_lock = _spool_folder(tmp_path)
        next_lock.close()
        assert sorted(tmp_path.iterdir()) == sorted([mine, next_one])


def test_optimize_on_insert_can_be_switched_off(client: Client) -> None:
    """With optimize_on_insert=0 equal keys of one insert stay apart until merged; with the default they do not."""
    name = f"t_{uuid.uuid4().hex}"
    client.command(f"CREATE TABLE {name} (a UInt64, b String) ENGINE = ReplacingMergeTree ORDER BY a")
    same = pa.table({"a": pa.array([1, 1], pa.uint64()), "b": ["x", "y"]})
    client.insert_arrow(name, same, settings={"optimize_on_insert": 0})
    assert count(client, name) == 2
    client.command(f"TRUNCATE TABLE {name}")
    client.insert_arrow(name, same)
    assert count(client, name) == 1
    client.command(f"DROP TABLE {name}")


@pytest.mark.parametrize("session", [None, "leaks"])
def test_settings_do_not_leak(clickhouse: ClickHouseServer, session: str | None) -> None:
    """A request's settings and database end with it, in a session too; what the session itself SET stays."""
    read = "SELECT value FROM system.settings WHERE name = 'max_threads'"
    with contextlib.closing(connect(clickhouse, session_id=session, database="default")) as client:
        before = client.command(read)
        assert client.command(read, settings={"max_threads": 7}) == 7
        assert client.command(read) == before
        with pytest.raises(DatabaseError):
            client.command("SELECT missing", settings={"max_threads": 7})
        assert client.command(read) == before
        if session:
            client.command("SET max_threads = 5")
            assert client.command(read, settings={"max_threads": 7}) == 7
            assert client.command(read) == 5


def test_session_keeps_temporary_tables_and_refuses_a_second_client(clickhouse: ClickHouseServer) -> None:
    """A session's temporary table is seen by its next request only; a busy session answers 373."""
    with (
        contextlib.closing(connect(clickhouse, session_id="busy")) as one,
        contextlib.closing(connect(clickhouse, session_id="busy")) as two,
        contextlib.closing(connect(clickhouse, session_id="other")) as other,
    ):
        one.command("CREATE TEMPORARY TABLE kept (a UInt8)")
        assert one.command("SELECT count() FROM kept") == 0
        with pytest.raises(DatabaseError) as failure:
            other.command("SELECT count() FROM kept")
        assert code(failure) == 60
        busy = threading.Thread(target=lambda: one.command("SELECT sleep(3) /* holds the session */"))
        busy.start()
        holds = (
            "SELECT count() FROM system.processes WHERE query LIKE '%holds the session%' AND query NOT LIKE '%LIKE%'"
        )
        for _ in poll(10):
            if other.command(holds):
                break
        with pytest.raises(DatabaseError) as failure:
            two.command("SELECT 1")
        busy.join()
        assert code(failure) == 373
        with pytest.raises(DatabaseError) as failure:
            two.command("SELECT 1", settings={"session_id": "never", "session_check": "1"})
        assert code(failure) == 372


def http_get(server: ClickHouseServer, sql: str, headers: dict[str, str], **params: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/?" + urllib.parse.urlencode({"query": sql, **params}), headers=headers)
        response = connection.getresponse()
        return response.status, response.headers.get("X-ClickHouse-Exception-Code", ""), response.read().decode()


def test_login(clickhouse: ClickHouseServer) -> None:
    """The right user and password are taken by headers, basic auth and parameters; anything else is 516."""
    basic = base64.b64encode(f"{clickhouse.user}:{clickhouse.password}".encode()).decode()
    named = {"X-ClickHouse-User": clickhouse.user, "X-ClickHouse-Key": clickhouse.password}
    params = {"user": clickhouse.user, "password": clickhouse.password}
    assert http_get(clickhouse, "SELECT 1", named) == (200, "", "1\n")
    assert http_get(clickhouse, "SELECT 1", {"Authorization": f"Basic {basic}"}) == (200, "", "1\n")
    assert http_get(clickhouse, "SELECT 1", {}, **params) == (200, "", "1\n")
    for headers in (
        {},
        named | {"X-ClickHouse-Key": "no"},
        named | {"X-ClickHouse-User": "no"},
        {"Authorization": "?"},
    ):
        status, number, text = http_get(clickhouse, "SELECT 1", headers)
        assert (status, number) == (403, "516"), text
    with pytest.raises(DatabaseError) as failure:
        connect(clickhouse, password="no")
    assert code(failure) == 516


def test_get_only_reads(clickhouse: ClickHouseServer, client: Client, table: str) -> None:
    """GET, and readonly=1, refuse whatever writes with 164."""
    login = {"X-ClickHouse-User": clickhouse.user, "X-ClickHouse-Key": clickhouse.password}
    for sql in (f"INSERT INTO {table} VALUES (1, 'x')", f"INSERT INTO {table} FORMAT TSV\n1\tx\n", f"TRUNCATE {table}"):
        assert http_get(clickhouse, sql, login, database=clickhouse.database)[:2] == (403, "164")
        with pytest.raises(DatabaseError) as failure:
            client.command(sql, settings={"readonly": "1"})
        assert code(failure) == 164
    assert count(client, table) == 0


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", False])
def test_round_trip(clickhouse: ClickHouseServer, table: str, compress: str | bool) -> None:
    """Rows come back as they went in, through Native and Arrow, whatever the compression."""
    with contextlib.closing(connect(clickhouse, compress=compress)) as client:
        client.insert(table, [[n, "ü\t\n'" * 50] for n in range(900)], column_names=["a", "b"])
        client.insert_arrow(table, ROWS)
        assert client.query_arrow(
            f"SELECT * FROM {table} WHERE a IN (1, 2) AND length(b) = 1 ORDER BY a"
        ).to_pydict() == (ROWS.to_pydict())
        assert len(client.query(f"SELECT * FROM {table}").result_rows) == 902
        assert client.query(f"SELECT a FROM {table} WHERE a > 5000").result_rows == []


def test_bound_parameters(client: Client) -> None:
    """Server-side parameters keep quotes, tabs, backslashes and lists as they are."""
    wanted = ["it's", "tab\there", "back\\slash\\n", "ü", ""]
    for value in wanted:
        assert client.query("SELECT {v:String}", parameters={"v": value}).result_rows == [(value,)]
    assert client.query("SELECT {v:Array(String)}", parameters={"v": wanted}).result_rows == [(wanted,)]
    assert client.query("SELECT {v:Nullable(Int64)}", parameters={"v": None}).result_rows == [(None,)]


async def test_async_client(clickhouse: ClickHouseServer, table: str) -> None:
    """clickhouse-connect's async client inserts and reads Arrow, many requests at once."""
    client = await clickhouse_connect.get_async_client(
        host=clickhouse.host,
        port=clickhouse.port,
        username=clickhouse.user,
        password=clickhouse.password,
        database=clickhouse.database,
        autogenerate_session_id=False,
    )
    try:
        batches = [pa.table({"a": pa.array([n], pa.uint64()), "b": [str(n)]}) for n in range(40)]
        await asyncio.gather(*(client.insert_arrow(table, batch) for batch in batches))
        read = await client.query_arrow(f"SELECT a FROM {table} ORDER BY a")
        assert read["a"].to_pylist() == list(range(40))
        with pytest.raises(DatabaseError):
            await client.insert_arrow(table, pa.table({"a": pa.array([1000], pa.uint64()), "b": ["x"]}))
    finally:
        await client.close()


def test_a_second_server_on_the_same_data_is_refused(clickhouse: ClickHouseServer) -> None:
    """A second server on a folder in use ends at once with one sentence that names the folder."""
    second = ClickHouseServer(clickhouse.data)
    folder = str(clickhouse.data / "clickhouse")
    child = second.child()
    assert folder in child.argv
    process = Process(child, clickhouse.data / "second")
    second.password = clickhouse.password
    process.start()
    try:
        with pytest.raises(Unavailable, match=r"Code: 76") as failure:
            process.wait_ready()
    finally:
        process.kill()
    assert "Traceback" not in str(failure.value)
    assert folder in str(failure.value)


@given(st.binary(max_size=2_000), st.sampled_from(sorted(COMPRESS)))
def test_decompress_inverts_compress(data: bytes, encoding: str) -> None:
    """Every encoding we send we also read; a body over the limit, or cut short, is an error and not a shorter body."""
    packed = COMPRESS[encoding](data)
    assert decompress(packed, encoding, limit=len(data)) == data
    assert decompress(packed + packed, encoding) == data + data
    if data:
        with pytest.raises(EngineError) as failure:
            decompress(packed, encoding, limit=len(data) - 1)
        assert failure.value.code == 307
        with pytest.raises(EngineError) as failure:
            decompress(packed[:-5], encoding)
        assert failure.value.code == 271


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"INSERT INTO t FORMAT TSV\n1\t2", ("INSERT INTO t", "", "TSV", b"1\t2")),
        (b"insert into t (a, `FORMAT x`) format Native\r\nd", ("insert into t (a, `FORMAT x`)", "", "Native", b"d")),
        (
            b"/* c */ INSERT INTO d.t SETTINGS x = 1 FORMAT CSV\nq",
            ("/* c */ INSERT INTO d.t", "SETTINGS x = 1", "CSV", b"q"),
        ),
        (b"INSERT INTO t FORMAT Values (1, 'FORMAT CSV')", ("INSERT INTO t", "", "Values", b"(1, 'FORMAT CSV')")),
        (b"INSERT INTO t VALUES", ("INSERT INTO t", "", "Values", b"")),
        (b"INSERT INTO t VALUES (1, ' FORMAT CSV\n')", None),
        (b"INSERT INTO t SELECT 1 FORMAT CSV\n", None),
        (b"SELECT 'INSERT INTO t FORMAT CSV\n'", None),
        (b"WITH 1 AS a SELECT a FORMAT CSV", None),
    ],
)
def test_where_an_inserts_data_begins(text: bytes, expected: tuple[str, str, str, bytes] | None) -> None:
    """The statement is told from its data, and the word FORMAT in names and strings is neither."""
    insert = parse_insert(text)
    found = insert and (insert.target, insert.settings, insert.format, text[insert.data_at :])
    assert found == expected


def test_credentials_prefer_headers() -> None:
    """ClickHouse's own headers win over basic auth, which wins over parameters."""
    basic = {"Authorization": "Basic " + base64.b64encode(b"b:2").decode()}
    assert credentials({"X-ClickHouse-User": "a", "X-ClickHouse-Key": "1"} | basic, {"user": "c"}) == ("a", "1")
    assert credentials(basic, {"user": "c", "password": "3"}) == ("b", "2")
    assert credentials({}, {"user": "c", "password": "3"}) == ("c", "3")
    assert credentials({}, {}) == ("default", "")
