"""ClickHouse's engine (chdb) in this process, made to keep the rules of a server: each statement's settings are its
own, sessions expire, and a failed insert is an error.

The engine's streaming insert answers OK when the write fails (too many parts, a violated constraint), so data goes
through a file in shared memory and `INSERT … FROM INFILE`, whose errors are raised.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tollway.connectors.embedded.clickhouse_sql import parse_insert, quote, quote_name

SESSIONS_MAX = 1_000
SESSION_TIMEOUT_S = 60
SESSION_TIMEOUT_MAX_S = 3_600
# A reply stands in memory whole: larger results are refused (Code 396) unless the request sets its own limit.
RESULT_MAX_BYTES = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
SPOOL_PREFIX = "tollway-clickhouse-"
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CODE = re.compile(r"Code: (\d+)\.")

_FORMAT_AT_END = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
CODES = {
    "SYNTAX_ERROR": 62,
    "UNKNOWN_SETTING": 115,
    "READONLY": 164,
    "TOO_MANY_SIMULTANEOUS_QUERIES": 202,
    "TOO_MANY_BYTES": 307,
    "SESSION_NOT_FOUND": 372,
    "SESSION_IS_LOCKED": 373,
    "NOT_IMPLEMENTED": 48,
    "CANNOT_DECOMPRESS": 271,
    "AUTHENTICATION_FAILED": 516,
    "UNKNOWN_EXCEPTION": 1002,
}


class EngineError(Exception):
    """What the engine, or the server in its stead, answers instead of a result."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def refuse(name: str, what: str) -> EngineError:
    """An error in the form of the engine's own, by its name in CODES."""
    return EngineError(CODES[name], f"Code: {CODES[name]}. DB::Exception: {what}. ({name})")


@dataclass(frozen=True)
class Statement:
    """One request: `sql`, then `body` (which holds the rest of the SQL, or an insert's data, or both)."""

    sql: bytes
    body: bytes = b""
    database: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    format: str = "TabSeparated"
    session: str = ""
    session_timeout_s: int = SESSION_TIMEOUT_S
    session_check: bool = False
    """The session must exist already."""
    read_only: bool = False


@dataclass(frozen=True)
class Reply:
    data: bytes
    format: str | None
    """None when the statement has no result set."""
    summary: Mapping[str, str]


@dataclass
class _Session:
    handle: Any
    expires_at: float
    timeout_s: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """Owns the data folder: one process at a time. `run` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        import chdb

        self._path = path
        self._chdb: Any = chdb
        self._error: type[Exception] = chdb.ChdbError
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._root = self._connect()
        except (self._error, RuntimeError) as e:
            raise _engine_error(e) from None
        self._spool, self._spool_lock = _spool_folder()
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self.version, self.timezone = self._root.query("SELECT version(), timezone()", "TSV").bytes().decode().split()

    def _connect(self) -> Any:
        handle = self._chdb.connect(str(self._path))
        handle.query(f"SET max_result_bytes = {RESULT_MAX_BYTES}")
        return handle

    def run(self, statement: Statement) -> Reply:
        """Raises EngineError, among others for whatever a server would raise."""
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(self._handle(statement))
                stack.enter_context(self._applied(handle, statement))
                return self._run(handle, statement)
            except (self._error, RuntimeError) as e:
                raise _engine_error(e) from None

    def close(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.handle.close()
            self._sessions.clear()
        self._root.close()
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool_lock.close()

    def _run(self, handle: Any, statement: Statement) -> Reply:
        text = statement.sql or statement.body
        insert = parse_insert(text)
        if insert is None:
            sql = b"\n".join(part for part in (statement.sql, statement.body) if part).decode(errors="surrogateescape")
            return self._query(handle, sql, statement)
        _refuse_if_read_only(statement)
        data: list[bytes | memoryview] = [memoryview(text)[insert.data_at :]]
        if statement.sql:
            data.append(statement.body)
        if not any(len(part) for part in data):
            return _reply(handle.query("SELECT 1 WHERE 0 FORMAT Null"), None)
        with self._spooled(data) as path:
            result = handle.query(insert.from_file(path), "TabSeparated", params=dict(statement.params))
        return _reply(result, None)

    def _query(self, handle: Any, sql: str, statement: Statement) -> Reply:
        # chdb's own word on what the text is; it runs a batch where a server refuses one
        kind = handle._conn.classify_query(sql)
        if kind["statement_count"] > 1:
            raise refuse("SYNTAX_ERROR", "Syntax error: Multi-statements are not allowed")
        reads = kind["query_class"].name == "READ_ONLY"
        if not reads:
            _refuse_if_read_only(statement)
        result = handle.query(sql, statement.format, params=dict(statement.params))
        named = _FORMAT_AT_END.search(sql[-200:])
        return _reply(result, (named[1] if named else statement.format) if reads else None)

    @contextmanager
    def _handle(self, statement: Statement) -> Iterator[Any]:
        """A handle of its own, closed afterwards, or the session's, which one statement at a time may use."""
        if not statement.session:
            handle = self._connect()
            try:
                yield handle
            finally:
                handle.close()
            return
        session = self._session(statement)
        if not session.lock.acquire(blocking=False):
            raise refuse("SESSION_IS_LOCKED", f"Session {statement.session} is locked by a concurrent client")
        try:
            yield session.handle
        finally:
            session.expires_at = time.monotonic() + session.timeout_s
            session.lock.release()

    def _session(self, statement: Statement) -> _Session:
        timeout_s = min(statement.session_timeout_s, SESSION_TIMEOUT_MAX_S)
        self.expire_sessions()
        with self._lock:
            session = self._sessions.get(statement.session)
            if session is None:
                if statement.session_check:
                    raise refuse("SESSION_NOT_FOUND", f"Session {statement.session} not found")
                if len(self._sessions) >= SESSIONS_MAX:
                    raise refuse("TOO_MANY_SIMULTANEOUS_QUERIES", f"Too many sessions, the most is {SESSIONS_MAX}")
                session = _Session(self._connect(), 0.0, timeout_s)
                self._sessions[statement.session] = session
            session.timeout_s = timeout_s
            session.expires_at = time.monotonic() + timeout_s
            return session

    def expire_sessions(self) -> None:
        """Close the sessions that nobody has used for their timeout."""
        now = time.monotonic()
        with self._lock:
            for name, session in list(self._sessions.items()):
                if session.expires_at < now and not session.lock.locked():
                    session.handle.close()
                    del self._sessions[name]

    @contextmanager
    def _applied(self, handle: Any, statement: Statement) -> Iterator[None]:
        """The request's database and settings, for this statement only: a session's handle gets its own back."""
        # readonly is enforced here: in a session the engine would never let go of it
        settings = {name: value for name, value in statement.settings.items() if name != "readonly"}
        for name in settings:
            if not _SETTING.fullmatch(name):
                raise refuse("UNKNOWN_SETTING", f"Unknown setting '{name}'")
        undo = _undo(handle, settings, bool(statement.database)) if statement.session else []
        try:
            if statement.database:
                handle.query(f"USE {quote_name(statement.database)}")
            if settings:
                handle.query("SET " + ", ".join(f"{name} = {quote(value)}" for name, value in settings.items()))
            yield
        finally:
            for sql in undo:
                handle.query(sql)

    @contextmanager
    def _spooled(self, data: list[bytes | memoryview]) -> Iterator[str]:
        """The data in a file: in shared memory, on the disk when that is full."""
        path = ""
        for folder in (self._spool, self._path / "spool"):
            folder.mkdir(parents=True, exist_ok=True)
            number, path = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(number, "wb") as f:
                    for part in data:
                        f.write(part)
                break
            except OSError:
                Path(path).unlink()
                if folder != self._spool:
                    raise
        try:
            yield path
        finally:
            Path(path).unlink()


def _undo(handle: Any, settings: Mapping[str, str], database: bool) -> list[str]:
    names = ", ".join(quote(name) for name in settings)
    rows = handle.query(
        f"SELECT name, value, changed FROM system.settings WHERE name IN ({names})", "JSONCompactStrings"
    )
    before = json.loads(rows.bytes())["data"]
    undo = [f"SET {name} = {quote(value) if changed == '1' else 'DEFAULT'}" for name, value, changed in before]
    if database:
        undo.append(f"USE {quote_name(handle.query('SELECT currentDatabase()', 'TSVRaw').bytes().decode()[:-1])}")
    return undo


def _refuse_if_read_only(statement: Statement) -> None:
    if statement.read_only or statement.settings.get("readonly", "0") != "0":
        raise refuse("READONLY", "Cannot execute query in readonly mode")


def _engine_error(e: Exception) -> EngineError:
    found = _CODE.search(str(e))
    return EngineError(int(found[1]) if found else CODES["UNKNOWN_EXCEPTION"], str(e))


def _reply(result: Any, format: str | None) -> Reply:
    data = result.bytes() or b""
    summary = {
        "read_rows": result.storage_rows_read(),
        "read_bytes": result.storage_bytes_read(),
        "written_rows": result.rows_written(),
        "written_bytes": result.bytes_written(),
        "total_rows_to_read": result.storage_rows_read(),
        "result_rows": result.rows_read() if format else result.rows_written(),
        "result_bytes": len(data),
        "elapsed_ns": int(result.elapsed() * 1e9),
    }
    return Reply(data, format, {name: str(value) for name, value in summary.items()})


def _spool_folder(base: Path = SHARED_MEMORY) -> tuple[Path, TextIO]:
    """A folder of this process alone, with the lock that says so; it ends with the lock's file.

    Folders of servers that were killed are removed: in shared memory they would take memory for ever.
    """
    parent = base if os.access(base, os.W_OK) else Path(tempfile.gettempdir())
    for left in parent.glob(f"{SPOOL_PREFIX}*"):
        try:
            with (left / "owner").open() as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # in use, or another user's
            continue
    new = Path(tempfile.mkdtemp(prefix=".tollway-", dir=parent))
    lock = (new / "owner").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Only now by the name that others look for: before, it would have seemed abandoned.
    return new.rename(parent / f"{SPOOL_PREFIX}{secrets.token_hex(8)}"), lock
