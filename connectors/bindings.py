"""Whose bearer token it is: `principal.bind` commands as the edge reads them from Redis, and as the fold writes them.

A token is found by its issuer, its kind (user or client) and its subject alone, so these keys have no lane:
`tw:b:<digest>` is one binding, `tw:b:ready` says which partitions of the log have written all of theirs. What is not there
is unknown only once every partition has; until then it is Unavailable, never a stranger.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollway.connectors.errors import Unavailable

READY = "tw:b:ready"
CACHE_S = 5.0
CACHED_MAX = 10_000
"""Answers remembered by one reader; the longest unused is forgotten for a new one."""
WRITTEN_MAX = 500
"""Bindings written in one round trip."""

_FOLDER = Path(__file__).parent / "lua"


@dataclass(frozen=True)
class Bound:
    """Who a token's bearer is. `operations`: names, or beginnings with a `*` behind; empty = all."""

    account: str
    principal_kind: str
    principal: str
    scopes: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()

    def may(self, operation: str) -> bool:
        """Whether the binding allows this operation."""
        return not self.operations or any(
            operation.startswith(name[:-1]) if name.endswith("*") else operation == name for name in self.operations
        )


@dataclass(frozen=True)
class Told:
    """One binding on its way to Redis. `principal` is None where it was unbound."""

    issuer: str
    kind: str
    subject: str
    account: str
    principal: str | None
    scopes: Sequence[str]
    operations: Sequence[str]
    at_ms: int
    offset: int


def key_of(issuer: str, kind: str, subject: str) -> str:
    """Redis key of a token."""
    return "tw:b:" + hashlib.sha256(f"{issuer}\0{kind}\0{subject}".encode()).hexdigest()[:40]


class Bindings:
    """Reads bindings, and remembers each answer for `cache_s`: so long an unbound token may still pass."""

    def __init__(
        self,
        client: Redis,
        *,
        cache_s: float = CACHE_S,
        cached_max: int = CACHED_MAX,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._cache_s, self._cached_max, self._clock_s = client, cache_s, cached_max, clock_s
        self._cache: OrderedDict[str, tuple[float, Bound | None]] = OrderedDict()

    async def bound(self, issuer: str, kind: str, subject: str) -> Bound | None:
        """Who it is; None where the token is bound to nobody. Raises Unavailable where Redis cannot say."""
        key, now = key_of(issuer, kind, subject), self._clock_s()
        cached = self._cache.get(key)
        if cached is not None and now < cached[0]:
            self._cache.move_to_end(key)
            return cached[1]
        found = await self._read(key, kind)
        self._cache[key] = now + self._cache_s, found
        self._cache.move_to_end(key)
        while len(self._cache) > self._cached_max:
            self._cache.popitem(last=False)
        return found

    async def _read(self, key: str, kind: str) -> Bound | None:
        try:
            pipe = self._client.pipeline(transaction=False)
            pipe.hmget(key, "account", "principal", "scopes", "operations")
            pipe.hget(READY, "partitions")
            pipe.hlen(READY)
            (account, principal, scopes, operations), partitions, marks = await pipe.execute()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error
        if principal:
            return Bound(
                account.decode(),
                kind,
                principal.decode(),
                tuple(msgpack.unpackb(scopes)),
                tuple(msgpack.unpackb(operations)),
            )
        if account is None and (partitions is None or marks < int(partitions) + 2):
            raise Unavailable("not every partition has written its bindings to Redis yet: ask again")
        return None


class BindingsWriter:
    """The fold's side: bindings of one partition, and that all of them are there."""

    def __init__(self, client: Redis, epoch: str, partitions: int) -> None:
        self._client, self._epoch, self._partitions = client, epoch, partitions
        self._bind = client.register_script((_FOLDER / "bind.lua").read_text(encoding="utf-8"))
        self._ready = client.register_script((_FOLDER / "bindings_ready.lua").read_text(encoding="utf-8"))

    async def write(self, partition: int, told: Sequence[Told], mark: str) -> None:
        """Write bindings, then say that the partition's are there up to `mark`. Raises Unavailable; safe to repeat."""
        try:
            for start in range(0, len(told), WRITTEN_MAX):
                pipe = self._client.pipeline(transaction=False)
                for one in told[start : start + WRITTEN_MAX]:
                    await self._bind(
                        keys=[key_of(one.issuer, one.kind, one.subject)], args=_row(partition, one), client=pipe
                    )
                await pipe.execute()
            await self._ready(keys=[READY], args=[self._epoch, self._partitions, partition, mark])
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error

    async def mark(self, partition: int) -> str | None:
        """Up to where Redis says that the partition's bindings are there. Raises Unavailable."""
        try:
            reply: list[Any] = await self._client.hmget(READY, "epoch", str(partition))
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error
        epoch, found = reply
        return found.decode() if found is not None and epoch.decode() == self._epoch else None


def _row(partition: int, one: Told) -> list[Any]:
    lists = [msgpack.packb(list(names)) for names in (one.scopes, one.operations)]
    return [one.at_ms, partition, one.offset, one.account, one.principal or "", *lists]
