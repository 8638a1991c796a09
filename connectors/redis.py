"""Redis: the fold's scripts as cheap calls on a lane, and a reader of what gates see.

Key layout and scripts: design §6 and the heads of `lua/*.lua`. redis-py packs commands in pure Python, a third of all time
at full speed; here a call is packed by hand and carries one msgpack argument.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisError, ResponseError

from tollway.connectors.errors import Refused, Unavailable
from tollway.schemas.lane import lane, tag

CONNECTIONS_MAX = 8  # a ninth caller waits POOL_WAIT_S for one, then finds Redis unavailable
POOL_WAIT_S = 5.0
TIMEOUT_S = 5.0
SCAN_COUNT = 5_000
READ_KEYS = 500
FLIGHT_CALLS_MAX = 8
"""Most calls sent before their answers are read: Valkey executes what it has received in one go, and gates wait for that."""

_FOLDER = Path(__file__).parent / "lua"


class Script:
    """A .lua file; called by its hash."""

    def __init__(self, name: str) -> None:
        self.text = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest().encode()
        self._head = b"$7\r\nEVALSHA\r\n$40\r\n" + sha + b"\r\n$1\r\n1\r\n"

    def call(self, number: int, *arguments: str | int | bytes) -> bytes:
        """RESP bytes of a call on a lane: KEYS[1] = `m`."""
        pieces = [b"*%d\r\n" % (len(arguments) + 4), self._head]
        for item in (f"{tag(number)}m", *arguments):
            data = item if isinstance(item, bytes) else str(item).encode()
            pieces += (b"$%d\r\n" % len(data), data, b"\r\n")
        return b"".join(pieces)


APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP = (Script(name) for name in ("apply", "rewrite_begin", "rewrite_end", "sweep"))
SCRIPTS = (APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP)


@dataclass(frozen=True)
class Answer:
    """What apply and rewrite say: a word, and the lane as they found it (−1 where it has none)."""

    word: str
    off: int
    state: str
    gen: int
    begun: int
    gates: int = 0

    @classmethod
    def read(cls, reply: Any) -> "Answer":
        """From a script's reply."""
        word, off, state, gen, begun, *rest = reply
        return cls(word.decode(), int(off or -1), state.decode(), int(gen or -1), int(begun or -1), *rest)


@dataclass(frozen=True)
class Swept:
    """What sweep found: `asked` are (hold, source, sequence) of captured holds whose usage may have been folded."""

    unsettled: list[str]
    asked: list[tuple[str, str, int]]
    fields: int
    more: bool

    @classmethod
    def read(cls, reply: Any) -> "Swept":
        """From the script's reply."""
        _, unsettled, asked, fields, more = reply
        texts = [text.decode() for text in asked]
        rows = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
        return cls(
            [hold.decode() for hold in unsettled],
            [(hold, source, int(sequence or 0)) for hold, source, sequence in rows],
            fields,
            bool(more),
        )


def connect(url: str, *, timeout_s: float = TIMEOUT_S, ca_file: Path | None = None) -> Redis:
    """A client whose pool queues callers instead of failing them. Connects at first use, does not retry by itself.

    `ca_file`: whom to trust where the url is a rediss:// one. Raises ValueError for what is no address.
    """
    tls = {"ssl_ca_certs": str(ca_file)} if ca_file and url.startswith("rediss://") else {}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS_MAX,
        timeout=POOL_WAIT_S,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        **tls,
    )
    return Redis.from_pool(pool)


async def check(client: Redis, *, allow_volatile: bool = False) -> None:
    """Raises Refused where Redis may evict keys or keeps no append-only file: forgotten usage would be free.

    Raises Unavailable where it does not answer. `allow_volatile` takes any Redis (tests, caches that may be lost).
    """
    try:
        await client.ping()
        if allow_volatile:
            return
        found = {**await client.config_get("maxmemory-policy"), **await client.config_get("appendonly")}
    except AuthenticationError as error:
        raise Refused(f"Redis refused user and password ({error}): correct those in TOLLWAY_REDIS_URL") from error
    except ResponseError as error:
        raise Refused(f"Redis does not say whether it evicts keys (CONFIG GET: {error}): allow CONFIG GET") from error
    except (RedisError, OSError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise Refused(
                f"the certificate of Redis is not trusted ({error}): correct TOLLWAY_REDIS_CA_FILE"
            ) from error
        raise Unavailable(f"Redis does not answer: {error}") from error
    settings = {_text(name): _text(value) for name, value in found.items()}
    for name, wanted in (("maxmemory-policy", "noeviction"), ("appendonly", "yes")):
        if settings.get(name) != wanted:
            raise Refused(f"Redis has {name} {settings.get(name)}: set it to {wanted}, or quota may be forgotten")


async def fly(client: Redis, calls: Sequence[bytes]) -> list[Any]:
    """Send packed calls together and read their replies. Scripts that Redis lacks are loaded, and their calls sent again.

    Raises Unavailable where the connection fails or any call is answered by an error; which calls took effect is then open.
    """
    try:
        replies = await _exchange(client, calls)
        missing = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            for script in SCRIPTS:
                await client.script_load(script.text)
            again = await _exchange(client, [calls[at] for at in missing])
            for at, reply in zip(missing, again, strict=True):
                replies[at] = reply
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis does not answer: {error or type(error).__name__}") from error
    for reply in replies:
        if isinstance(reply, RedisError):
            raise Unavailable(f"Redis answered: {reply}") from reply
    return replies


async def _exchange(client: Redis, calls: Sequence[bytes]) -> list[Any]:
    pool = client.connection_pool
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    replies: list[Any] = []
    try:
        await connection.send_packed_command(b"".join(calls))
        for _ in calls:
            try:
                replies.append(await connection.read_response(disconnect_on_error=False))
            except ResponseError as error:
                replies.append(error)
    finally:
        if len(replies) < len(calls):
            await connection.disconnect(nowait=True)  # replies are under way that nobody will read
        await pool.release(connection)
    return replies


async def read_quota(client: Redis, account: str) -> dict[str, Any]:
    """What gates see of an account: lane and its state, policy, and totals by scope, meter, window and start.

    `staleness_ms` = Redis' clock − the lane's log time; null where the lane has none. `state` is READY only where the lane was
    READY, and the same, before and after its totals were read: a zero that a flush has left is COLD. Raises Unavailable.
    """
    number = lane(account)
    prefix = tag(number)
    try:
        seconds, micros = await client.time()
        meta = _texts(await client.hgetall(f"{prefix}m"))
        policy = _texts(await client.hgetall(f"{prefix}p:{account}"))
        scopes = await _scopes(client, f"{prefix}s:{account}~")
        after = _texts(await client.hgetall(f"{prefix}m"))
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis does not answer: {error}") from error
    same = [meta.get(name) == after.get(name) for name in ("epoch", "gen", "state")]
    log_ms = int(meta["log"]) if meta.get("log") else None
    return {
        "account": account,
        "lane": number,
        "state": meta.get("state", "COLD") if all(same) else "COLD",
        "epoch": meta.get("epoch"),
        "offset": int(meta["off"]) if "off" in meta else None,
        "log_time_ms": log_ms,
        "staleness_ms": int(seconds) * 1000 + int(micros) // 1000 - log_ms if log_ms is not None else None,
        "policy": {name: value for name, value in policy.items() if "|" not in name},
        "totals": [row for scope, fields in sorted(scopes.items()) for row in _rows(scope, fields, policy)],
    }


async def _scopes(client: Redis, prefix: str) -> dict[str, dict[str, str]]:
    keys = [_text(key) async for key in client.scan_iter(match=f"{prefix}*", count=SCAN_COUNT)]
    found: dict[str, dict[str, str]] = {}
    for start in range(0, len(keys), READ_KEYS):
        some = keys[start : start + READ_KEYS]
        pipe = client.pipeline(transaction=False)
        for key in some:
            pipe.hgetall(key)
        for key, fields in zip(some, await pipe.execute(), strict=True):
            found[key.removeprefix(prefix)] = _texts(fields)
    return found


def _rows(scope: str, fields: dict[str, str], policy: dict[str, str]) -> list[dict[str, Any]]:
    names = sorted({name[:-2] for name in fields})
    rows = []
    for name in names:
        meter, _, window = name.partition(" ")
        window, _, start = window.partition(":")
        kind = scope.partition(":")[0]
        limit = policy.get(f"{scope}|{meter}|{window}", policy.get(f"{kind}|{meter}|{window}"))
        rows.append(
            {
                "scope": scope,
                "meter": meter,
                "window": window,
                "start": int(start),
                "used": int(fields.get(f"{name} u", 0)),
                "held": int(fields.get(f"{name} h", 0)),
                "limit": None if limit is None else int(limit),
            }
        )
    return rows


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _texts(found: Any) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in found.items()}
