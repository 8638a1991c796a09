"""A gate's way to Redis: scripts with declared keys, many callers' calls in one packet, deadlines.

Calls that wait at the same moment travel together: the client's cost a call, not Redis, limits a gate (docs/gate.md).
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from tollway.connectors.errors import Unavailable

CONNECTIONS_MAX = 4
FLIGHT_CALLS_MAX = 32
"""Most calls in one packet; about a millisecond of Redis."""
QUEUE_MAX = 10_000
"""Calls waiting for a connection; beyond that a call is refused at once, as `busy`."""
STUCK_S = 1.0
"""A packet that is not answered within this is given up with its connection; its callers have gone long before."""

_FOLDER = Path(__file__).parent / "lua"
_SHARED = (_FOLDER / "gate.lua").read_text(encoding="utf-8")


class Busy(Unavailable):
    """More calls wait than may."""


class Slow(Unavailable):
    """No answer within the deadline; whether the call took effect is open."""


class GateScript:
    """A gate's .lua file behind what all of them share; called by its hash."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = _SHARED + (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        self._head = b"$7\r\nEVALSHA\r\n$40\r\n" + self.sha.encode() + b"\r\n"

    def pack(self, keys: Sequence[str], arguments: Sequence[str | int]) -> bytes:
        """RESP bytes of a call."""
        items = [str(len(keys)), *keys, *map(str, arguments)]
        text = "".join([f"${len(item)}\r\n{item}\r\n" for item in items])
        if not text.isascii():  # lengths are of bytes
            coded = [item.encode() for item in items]
            return b"".join((self._start(items), *(b"$%d\r\n%b\r\n" % (len(data), data) for data in coded)))
        return self._start(items) + text.encode()

    def _start(self, items: Sequence[str]) -> bytes:
        return b"*%d\r\n%b" % (len(items) + 2, self._head)


AUTHORIZE, CAPTURE, VOID, EXTEND, REASSERT = map(GateScript, ("authorize", "capture", "void", "extend", "reassert"))
META = GateScript("meta")
SCRIPTS = (AUTHORIZE, CAPTURE, VOID, EXTEND, REASSERT, META)

Late = Callable[[Any], None]
"""Takes the answer of a call whose caller has gone."""


class Wire(Protocol):
    """`call` raises Unavailable (Busy, Slow) where there is no answer in time."""

    async def call(
        self,
        script: GateScript,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        deadline_s: float,
        late: Late | None = None,
    ) -> Any: ...

    async def warm(self) -> None:
        """Connect and load the scripts, so that the first call need not. Raises Unavailable."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Call:
    script: GateScript
    packed: bytes
    future: "asyncio.Future[Any]"
    late: Late | None


class PooledWire:
    """One Redis, through a pool that queues."""

    def __init__(self, url: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=STUCK_S,
            socket_timeout=None,  # no timer for each reply: a packet has STUCK_S
            socket_connect_timeout=STUCK_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._client = Redis.from_pool(pool)
        self._waiting: deque[_Call] = deque()
        self._pumps: set[asyncio.Task[None]] = set()

    async def call(
        self,
        script: GateScript,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        deadline_s: float,
        late: Late | None = None,
    ) -> Any:
        if len(self._waiting) >= QUEUE_MAX:
            raise Busy(f"{QUEUE_MAX} calls wait for Redis")
        loop = asyncio.get_running_loop()
        call = _Call(script, script.pack(keys, arguments), loop.create_future(), late)
        self._waiting.append(call)
        if len(self._pumps) < CONNECTIONS_MAX and len(self._waiting) > FLIGHT_CALLS_MAX * (len(self._pumps) - 1):
            task = loop.create_task(self._pump())
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)
        late_at = loop.call_later(deadline_s, _give_up, call, deadline_s)  # half the cost of asyncio.timeout
        try:
            return await call.future
        finally:
            late_at.cancel()

    async def warm(self) -> None:
        try:
            await self._load()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error or type(error).__name__}") from error

    async def _load(self) -> None:
        async with asyncio.timeout(STUCK_S):
            for script in SCRIPTS:
                await self._client.script_load(script.text)

    async def close(self) -> None:
        """Let what is under way end, then disconnect."""
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=STUCK_S)
        for task in self._pumps:
            task.cancel()
        await self._client.aclose()

    async def _pump(self) -> None:
        await asyncio.sleep(0)  # whoever calls in this turn of the loop comes along
        while self._waiting:
            flight: list[_Call] = []
            while self._waiting and len(flight) < FLIGHT_CALLS_MAX:
                call = self._waiting.popleft()
                if not call.future.done():  # its caller has gone: never sent
                    flight.append(call)
            if flight:
                await self._fly(flight)

    async def _fly(self, flight: list[_Call]) -> None:
        try:
            async with asyncio.timeout(STUCK_S):
                lacking = await self._exchange(flight)
            if lacking:
                await self._load()
                async with asyncio.timeout(STUCK_S):
                    for call in await self._exchange(lacking):
                        _fail(call, Unavailable("Redis forgets scripts while they are loaded"))
        except (RedisError, OSError) as error:
            for call in flight:
                _fail(call, Unavailable(f"Redis does not answer: {error or type(error).__name__}"))

    async def _exchange(self, flight: list[_Call]) -> list[_Call]:
        """Send and answer; returns the calls whose script Redis does not have."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        lacking: list[_Call] = []
        read = 0
        try:
            await connection.send_packed_command(b"".join([call.packed for call in flight]))
            for call in flight:
                try:
                    reply = await connection.read_response(disconnect_on_error=False)
                except NoScriptError:
                    lacking.append(call)
                except ResponseError as error:
                    _fail(call, Unavailable(f"Redis answered: {error}"))
                else:
                    _answer(call, reply)
                read += 1
        finally:
            if read < len(flight):
                await connection.disconnect(nowait=True)  # answers are under way that nobody will read
            await pool.release(connection)
        return lacking


def _answer(call: _Call, reply: Any) -> None:
    if not call.future.done():
        call.future.set_result(reply)
    elif call.late is not None:
        call.late(reply)


def _give_up(call: _Call, deadline_s: float) -> None:
    _fail(call, Slow(f"Redis did not answer within {deadline_s * 1000:.0f} ms"))


def _fail(call: _Call, error: Exception) -> None:
    if not call.future.done():
        call.future.set_exception(error)


class ClusterWire:
    """A Redis Cluster: redis-py finds the node of the lane's slot, also while it moves."""

    def __init__(self, client: "RedisCluster") -> None:
        self._client = client

    async def call(
        self,
        script: GateScript,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        deadline_s: float,
        late: Late | None = None,
    ) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                try:
                    return await self._client.evalsha(script.sha, len(keys), *keys, *arguments)
                except NoScriptError:
                    return await self._client.eval(script.text, len(keys), *keys, *arguments)
        except TimeoutError:
            raise Slow(f"Redis did not answer within {deadline_s * 1000:.0f} ms") from None
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error or type(error).__name__}") from error

    async def warm(self) -> None:
        try:
            for script in SCRIPTS:
                await self._client.script_load(script.text)
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error or type(error).__name__}") from error

    async def close(self) -> None:
        await self._client.aclose()
