"""The audit log in ClickHouse: blocks in, questions out, and the numbered files that make its tables.

One HTTP path in every mode. No session: in a session settings would leak from one insert into the next.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.exceptions import ClickHouseError, ProgrammingError

from tollway.connectors.errors import Fatal, TollwayError, Unavailable

ALONE_ROWS = 8_000
"""A block of this many rows is an insert by itself: its token is then the same after a crash too."""
INSERT_ROWS_MAX = 65_536
INSERT_BYTES_MAX = 32 << 20
"""Most rows, and bytes of values, of the smaller blocks that share an insert; the rest go into a further one."""
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 300
CLOSE_S = 1

MIGRATIONS = Path(__file__).parent / "clickhouse"
_VERSIONS = """
CREATE TABLE IF NOT EXISTS tollway_schema
    (version UInt32, name String, digest String, applied_at DateTime('UTC') DEFAULT now())
ENGINE = ReplacingMergeTree ORDER BY version
"""

MANIFEST_SCHEMA = pa.schema(
    [
        ("epoch", pa.string()),
        ("kafka_partition", pa.uint16()),
        ("first_offset", pa.uint64()),
        ("last_offset", pa.uint64()),
        ("records", pa.uint32()),
        ("block_hash", pa.binary(32)),
        ("chain_hash", pa.binary(32)),
        ("first_append", pa.timestamp("ms", "UTC")),
        ("last_append", pa.timestamp("ms", "UTC")),
    ]
)

_ECHO = re.compile(r"^.*?DB::Exception: | \(version [^()]*(\([^()]*\))?\)| \(for url [^()]*\)")
"""What the client puts around the server's own words."""
_PLAIN_ARROW = {"output_format_arrow_low_cardinality_as_dictionary": 0}
_RETRY = frozenset(
    (159, 160, 198, 202, 203, 209, 210, 212, 236, 241, 242, 243, 252, 279, 285, 319, 394, 425, 439, 745, 999, 1000)
)
"""Time-outs, network, too many queries or parts, memory, disk full, read-only just then, replicas or keeper away, shutdown."""
_CURES = {
    516: "check user and password (TOLLWAY_CLICKHOUSE_USER, TOLLWAY_CLICKHOUSE_PASSWORD)",
    194: "check user and password (TOLLWAY_CLICKHOUSE_USER, TOLLWAY_CLICKHOUSE_PASSWORD)",
    192: "check the user (TOLLWAY_CLICKHOUSE_USER)",
    497: "grant this user INSERT and SELECT on the database, and CREATE for migrations",
    60: "the tables are not there: migrate the database, or check its name (TOLLWAY_CLICKHOUSE_DATABASE)",
    81: "the database is not there: migrate it, or check its name (TOLLWAY_CLICKHOUSE_DATABASE)",
    16: "a column is missing: migrate the database",
    774: "a table was set read-only: let it take rows again (table_readonly = 0)",
    469: "rows violate a constraint that is not Tollway's: drop it",
}


class InsertBlock(Protocol):
    """What an insert needs of a block (`streams.audit.Block`)."""

    @property
    def count(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def log(self) -> pa.RecordBatch: ...
    @property
    def events(self) -> pa.RecordBatch: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


def token(blocks: Sequence[InsertBlock]) -> str:
    """Names the content of an insert: rows that come under a token the table has seen are dropped without a word."""
    names = [
        f"{row['epoch']}|{row['kafka_partition']}|{row['first_offset']}|{row['last_offset']}|{row['block_hash'].hex()}"
        for row in (block.manifest for block in blocks)
    ]
    return sha256("\n".join(names).encode()).hexdigest()


def inserts(blocks: Iterable[InsertBlock]) -> Iterator[list[InsertBlock]]:
    """Whole blocks, grouped as they share an insert: large ones alone, the others together up to the limits."""
    shared: list[InsertBlock] = []
    for block in blocks:
        if block.count >= ALONE_ROWS:
            yield [block]
            continue
        together = [*shared, block]
        if shared and (
            sum(each.count for each in together) > INSERT_ROWS_MAX
            or sum(each.bytes for each in together) > INSERT_BYTES_MAX
        ):
            yield shared
            together = [block]
        shared = together
    if shared:
        yield shared


class AuditStore:
    """The audit log's database. Connects at first use; all methods but `insert` are synchronous; safe from many threads.

    Every method raises Unavailable where trying again can help, else Fatal in one sentence with the cure.
    """

    def __init__(
        self,
        host: str,
        port: int,
        user: str,
        password: str,
        database: str = "tollway",
        *,
        secure: bool = False,
        ca_file: Path | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.database = database
        self._login: dict[str, Any] = {"host": host, "port": port, "username": user, "password": password}
        self._secure, self._ca_file, self._timeout_s = secure, ca_file, timeout_s
        self._place = f"ClickHouse at {host}:{port}"
        self._client: Any = None
        self._connecting = threading.Lock()

    async def insert(self, blocks: Sequence[InsertBlock]) -> None:
        """Rows of both tables, then their manifest rows. The same call again stores nothing twice.

        Runs in a thread that no exit waits for, as a server that hangs holds it for long: a cancelled call may still store
        its blocks, which are then merged with their retry.
        """
        if blocks:
            await asyncio.wrap_future(_in_daemon(lambda: self._insert(blocks)))

    def arrow(self, sql: str, **parameters: Any) -> pa.Table:
        """Answer as Arrow, texts as binary. `parameters` are bound to `{name:Type}`."""
        return self._try(
            lambda client: client.query_arrow(sql, parameters=parameters, settings=_PLAIN_ARROW, use_strings=False)
        )

    def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """Answer as one dict a row. `parameters` are bound to `{name:Type}`."""
        rows: list[dict[str, Any]] = self._try(
            lambda client: list(client.query(sql, parameters=parameters).named_results())
        )
        return rows

    def command(self, sql: str) -> None:
        """Run a statement that answers with nothing."""
        self._try(lambda client: client.command(sql))

    def migrate(self) -> list[str]:
        """Create the database and apply the numbered files that it has not seen; returns their names.

        Every statement can run twice: a run that broke off is repeated. Raises Fatal where the database was made by a newer
        Tollway, or where an applied file has changed since.
        """
        self._create_database()
        self.command(_VERSIONS)
        applied = {row["version"]: row for row in self.rows("SELECT version, name, digest FROM tollway_schema FINAL")}
        files = {int(path.name[:4]): path for path in sorted(MIGRATIONS.glob("[0-9][0-9][0-9][0-9]_*.sql"))}
        newer = [row["name"] for version, row in applied.items() if version not in files]
        if newer:
            raise Fatal(f"{self._place}: database {self.database} has {newer[-1]} of a newer Tollway: upgrade this one")
        done = []
        for version, path in files.items():
            text = path.read_text(encoding="utf-8")
            digest = sha256(text.encode()).hexdigest()
            if version not in applied:
                for statement in statements(text):
                    self.command(statement)
                row = f"({version}, '{path.name}', '{digest}')"
                self.command(f"INSERT INTO tollway_schema (version, name, digest) VALUES {row}")
                done.append(path.name)
            elif applied[version]["digest"] != digest:
                raise Fatal(f"{path.name} was changed after {self.database} took it: put the change into a new number")
        return done

    def put(self, table: str, rows: pa.Table, name: str) -> None:
        """Rows into a table; the same `name` again, with any rows, stores nothing."""
        self._insert_into(table, rows, name)

    def close(self) -> None:
        """Give the connections back. One that is just being made to a server that hangs is left to end with the process."""
        if not self._connecting.acquire(timeout=CLOSE_S):
            return
        try:
            if self._client is not None:
                self._client.close()
                self._client = None
        finally:
            self._connecting.release()

    def _insert(self, blocks: Sequence[InsertBlock]) -> None:
        for group in inserts(blocks):
            name = token(group)
            self._insert_into("usage_log", pa.Table.from_batches([block.log for block in group]), name)
            self._insert_into("usage_events", pa.Table.from_batches([block.events for block in group]), name)
        manifest = pa.Table.from_pylist([block.manifest for block in blocks], schema=MANIFEST_SCHEMA)
        self._insert_into("audit_manifest", manifest, token(blocks))

    def _insert_into(self, table: str, rows: pa.Table, name: str) -> None:
        settings = {"insert_deduplication_token": name, "optimize_on_insert": 0, "async_insert": 0}
        # one dictionary a column: the file format takes no second one
        self._try(lambda client: client.insert_arrow(table, rows.unify_dictionaries(), settings=settings))

    def _create_database(self) -> None:
        client = self._call(lambda: self._connect(None))
        try:
            self._call(lambda: client.command(f"CREATE DATABASE IF NOT EXISTS `{self.database}`"))
        finally:
            client.close()

    def _connect(self, database: str | None) -> Any:
        return clickhouse_connect.get_client(
            **self._login,
            database=database,
            secure=self._secure,
            ca_cert=str(self._ca_file) if self._ca_file else None,
            compress=self._secure,
            autogenerate_session_id=False,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=self._timeout_s,
        )

    def _try(self, work: Callable[[Any], Any]) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = self._call(lambda: self._connect(self.database))
            client = self._client
        return self._call(lambda: work(client))

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ClickHouseError, OSError, pa.ArrowInvalid) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> TollwayError:
        """What a failure means for the caller."""
        code = getattr(error, "code", None)
        said = _ECHO.sub("", " ".join(str(error).split()))[:300]
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return Fatal(
                f"{self._place} has a certificate that is not trusted, correct TOLLWAY_CLICKHOUSE_CA_FILE: {said}"
            )
        if code is None and not isinstance(error, ProgrammingError):
            return Unavailable(f"{self._place} does not answer: {said}")
        if code in _RETRY:
            return Unavailable(f"{self._place} is overloaded or not ready (code {code}): {said}")
        cure = _CURES.get(code or 0, "see its message")
        return Fatal(f"{self._place} refuses (code {code}), {cure}: {said}")


def _in_daemon(work: Callable[[], None]) -> Future[None]:
    """What a daemon thread makes of some work."""
    done: Future[None] = Future()

    def run() -> None:
        failure: BaseException | None
        try:
            work()
            failure = None
        except BaseException as error:  # noqa: BLE001 - raised where the future is awaited
            failure = error
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile: nobody asks any more
            done.set_exception(failure) if failure else done.set_result(None)

    threading.Thread(target=run, daemon=True, name="clickhouse insert").start()
    return done


def statements(text: str) -> list[str]:
    """The statements of a numbered file: each ends with `;` at a line's end; no comment stands behind one."""
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return [each.strip() for each in re.split(r";[ \t]*(?:\n|$)", code) if each.strip()]
