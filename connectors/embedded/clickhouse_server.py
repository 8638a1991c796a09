"""ClickHouse's HTTP interface over its engine in this process; clickhouse-connect's ordinary clients run against it.

    python -m tollway.connectors.embedded.clickhouse_server --path P --port N --user U --password-file F

For this machine only: it listens on loopback, and the engine can read local files. What a server has and this has not:
external data, role management, replication; a reply stands in memory whole.
"""

import argparse
import asyncio
import base64
import binascii
import gzip
import hmac
import json
import signal
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lz4.frame  # type: ignore[import-untyped]
import zstandard
from aiohttp import web
from multidict import CIMultiDict

from tollway.connectors.embedded.clickhouse_engine import Engine, EngineError, Reply, Statement, refuse
from tollway.connectors.embedded.clickhouse_sql import quote_name
from tollway.connectors.embedded.process import LOOPBACK

THREADS = 8
REQUESTS_MAX = 32
"""Handled at once, bodies in memory; the rest wait."""
BODY_MAX_BYTES = 256 << 20
"""As sent, and again when decompressed."""
TRANSPORT = frozenset(
    (
        *("query", "database", "user", "password", "default_format", "query_id", "quota_key", "role", "stacktrace"),
        *("session_id", "session_timeout", "session_check", "close_session", "buffer_size", "wait_end_of_query"),
        *("compress", "decompress", "enable_http_compression", "client_protocol_version"),
        *("send_progress_in_http_headers", "http_headers_progress_interval_ms"),
    )
)
HTTP_STATUS = {
    **dict.fromkeys((6, 25, 26, 27, 36, 38, 41, 53, 62, 69, 72, 117, 190, 321), 400),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 81, 115, 372), 404),
    **dict.fromkeys((164, 192, 193, 497, 516), 403),
    48: 501,
    159: 408,
    194: 401,
    202: 503,
    307: 413,
}


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "lz4": lz4.frame.compress,
    "zstd": _zstd,
    "gzip": lambda data: gzip.compress(data, 1),
    "deflate": lambda data: zlib.compress(data, 1),
}


class _Unzstd:
    """zstandard's decompressor in the shape of zlib's and lz4's."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self.eof, self.unused_data = False, b""

    def decompress(self, data: bytes, limit: int) -> bytes:
        out, size, step = [], 0, 1 << 12  # small steps: each may grow thirty thousand times
        for at in range(0, len(data), step):
            out.append(self._frame.decompress(data[at : at + step]))
            size += len(out[-1])
            if self._frame.eof:
                self.eof, self.unused_data = True, self._frame.unused_data + data[at + step :]
            if self._frame.eof or size > limit:
                break
        return b"".join(out)


DECOMPRESS: Mapping[str, Callable[[], Any]] = {
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "zstd": _Unzstd,
    "gzip": lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16),
    "deflate": zlib.decompressobj,
}


def decompress(data: bytes, encoding: str, limit: int = BODY_MAX_BYTES) -> bytes:
    """The body as it was before its Content-Encoding. Raises EngineError (48, 271, 307)."""
    if encoding in ("", "identity"):
        return data
    if encoding not in DECOMPRESS:
        raise refuse("NOT_IMPLEMENTED", f"Unknown Content-Encoding {encoding}: use one of {', '.join(DECOMPRESS)}")
    out, size = [], 0
    while data:
        frame = DECOMPRESS[encoding]()
        try:
            out.append(frame.decompress(data, limit + 1 - size))
        except (RuntimeError, zstandard.ZstdError, zlib.error) as e:
            raise refuse("CANNOT_DECOMPRESS", f"The body is not {encoding}: {e}") from e
        size += len(out[-1])
        if size > limit:
            raise refuse("TOO_MANY_BYTES", f"The body is larger than {limit} bytes when decompressed")
        if not frame.eof:
            raise refuse("CANNOT_DECOMPRESS", f"The body's {encoding} data ends too early")
        data = frame.unused_data
    return out[0] if len(out) == 1 else b"".join(out)


def credentials(headers: Mapping[str, str], params: Mapping[str, str]) -> tuple[str, str]:
    """User and password, from the first place that has them: X-ClickHouse- headers, basic auth, parameters."""
    if "X-ClickHouse-User" in headers or "X-ClickHouse-Key" in headers:
        return headers.get("X-ClickHouse-User", "default"), headers.get("X-ClickHouse-Key", "")
    kind, _, value = headers.get("Authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return "", ""
        return user, password
    return params.get("user", "default"), params.get("password", "")


def statement_of(method: str, headers: Mapping[str, str], params: Mapping[str, str], body: bytes) -> Statement:
    """The request as one statement: what is neither transport nor a bound value is a setting."""
    timeout = params.get("session_timeout", "60")
    return Statement(
        sql=params.get("query", "").encode(errors="surrogateescape"),
        body=decompress(body, headers.get("Content-Encoding", "").lower()),
        database=params.get("database") or headers.get("X-ClickHouse-Database", ""),
        settings={k: v for k, v in params.items() if k not in TRANSPORT and not k.startswith("param_")},
        params={k.removeprefix("param_"): v for k, v in params.items() if k.startswith("param_")},
        format=params.get("default_format") or headers.get("X-ClickHouse-Format", "TabSeparated"),
        session=params.get("session_id", ""),
        session_timeout_s=int(timeout) if timeout.isdecimal() else 60,
        session_check=params.get("session_check") == "1",
        read_only=method in ("GET", "HEAD"),
    )


class Server:
    """Answers requests from the engine's threads."""

    def __init__(self, engine: Engine, user: str, password: str) -> None:
        self._engine, self._user, self._password = engine, user, password
        self._threads = ThreadPoolExecutor(THREADS, "clickhouse")
        self._requests = asyncio.Semaphore(REQUESTS_MAX)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_MAX_BYTES)
        app.router.add_get("/ping", self._alive)
        app.router.add_get("/replicas_status", self._alive)
        app.router.add_route("*", "/", self._handle)
        return app

    async def _alive(self, request: web.Request) -> web.Response:
        return web.Response(text="Ok.\n")

    async def _handle(self, request: web.Request) -> web.Response:
        query_id = request.query.get("query_id") or str(uuid.uuid4())
        headers = CIMultiDict(
            {
                "X-ClickHouse-Query-Id": query_id,
                "X-ClickHouse-Server-Display-Name": "tollway",
                "X-ClickHouse-Timezone": self._engine.timezone,
            }
        )
        try:
            self._authenticate(request)
            async with self._requests:
                return await self._answer(request, headers)
        except EngineError as e:
            headers["X-ClickHouse-Exception-Code"] = str(e.code)
            text = f"{e} (version {self._engine.version} (official build))\n"
            return web.Response(status=HTTP_STATUS.get(e.code, 500), text=text, headers=headers)

    def _authenticate(self, request: web.Request) -> None:
        user, password = credentials(request.headers, request.query)
        known = hmac.compare_digest(user.encode(), self._user.encode())
        if not hmac.compare_digest(password.encode(), self._password.encode()) or not known:
            raise refuse(
                "AUTHENTICATION_FAILED",
                f"{user}: Authentication failed: password is incorrect, or there is no user with such name",
            )

    async def _answer(self, request: web.Request, headers: CIMultiDict[str]) -> web.Response:
        params = dict(request.query)
        try:
            if request.content_type == "multipart/form-data":
                params |= await _form_fields(request)
                body = b""
            else:
                body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise refuse("TOO_MANY_BYTES", f"The body is larger than {BODY_MAX_BYTES} bytes") from None
        if not params.get("query") and not body:
            return web.Response(text="Ok.\n", headers=headers)

        accepted = request.headers.get("Accept-Encoding", "") if params.get("enable_http_compression") == "1" else ""
        encoding = next((word for word in map(str.strip, accepted.lower().split(",")) if word in COMPRESS), None)

        def work() -> tuple[Reply, bytes]:
            reply = self._engine.run(statement_of(request.method, request.headers, params, body))
            return reply, COMPRESS[encoding](reply.data) if encoding and reply.data else reply.data

        reply, data = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        headers["X-ClickHouse-Summary"] = json.dumps(reply.summary)
        if reply.format:
            headers["X-ClickHouse-Format"] = reply.format
        if encoding and data:
            headers["Content-Encoding"] = encoding
        return web.Response(body=data, headers=headers, content_type="application/octet-stream")


async def _form_fields(request: web.Request) -> dict[str, str]:
    fields = {}
    for name, value in (await request.post()).items():
        if not isinstance(value, str):
            raise refuse("NOT_IMPLEMENTED", f"External data ({name}) is not supported by the embedded server")
        fields[name] = value
    return fields


async def serve(engine: Engine, port: int, user: str, password: str) -> None:
    """Until SIGINT or SIGTERM; requests that are under way are answered first."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(Server(engine, user, password).app(), access_log=None, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, port).start()
    print(f"ClickHouse {engine.version} serves on {LOOPBACK}:{port}", flush=True)
    while not stop.is_set():
        engine.expire_sessions()
        try:
            await asyncio.wait_for(stop.wait(), 10)
        except TimeoutError:
            continue
    await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(prog="clickhouse_server", description="ClickHouse's engine on a loopback port.")
    parser.add_argument("--path", type=Path, required=True, help="data folder; one server at a time")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--user", default="default")
    parser.add_argument("--password-file", type=Path, required=True, help="its first line is the password")
    parser.add_argument("--database", default="", help="created when it is not there")
    arguments = parser.parse_args()
    try:
        password = arguments.password_file.read_text().splitlines()[0]
        engine = Engine(arguments.path)
        if arguments.database:
            engine.run(Statement(f"CREATE DATABASE IF NOT EXISTS {quote_name(arguments.database)}".encode()))
        asyncio.run(serve(engine, arguments.port, arguments.user, password))
        engine.close()
    except (OSError, IndexError) as e:
        print(f"--password-file {arguments.password_file} or --port {arguments.port}: {e}", file=sys.stderr)
        return 1
    except EngineError as e:
        print(f"--path {arguments.path}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
