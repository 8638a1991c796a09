"""Redis written anew from a state: each lane COLD until it holds all totals and none besides; holds stay as they are."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.redis import REWRITE_BEGIN, SCAN_COUNT, Answer, fly
from tollway.schemas.lane import LANES, tag
from tollway.streams.quota_view import QuotaView
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState
from tollway.streams.wiring import redis_client

WRITE_S = 600.0
"""A partition's totals get so long to reach Redis: 600,000 a second where nothing is wrong."""


class RedisRewrite:
    """Writes one partition after the other; `close()` it."""

    def __init__(self, client: Redis, view: QuotaView, epoch: str, partitions: int) -> None:
        self._client, self._view, self._epoch, self._partitions = client, view, epoch, partitions

    @classmethod
    async def begin(cls, settings: Settings, epoch: str, partitions: int) -> "RedisRewrite":
        """Connected. Raises Refused where Redis may forget keys."""
        view = QuotaView(redis_client(settings), epoch)
        await view.start()
        return cls(redis_client(settings), view, epoch, partitions)

    async def write(self, state: PartitionState) -> str:
        """All totals of the state, and none that it does not hold. Returns what was done. Raises Refused, Unavailable."""
        lanes = range(state.partition, LANES, self._partitions)
        calls = [REWRITE_BEGIN.call(lane, self._epoch, state.next_offset) for lane in lanes]
        for lane, reply in zip(lanes, await self._flown(calls), strict=True):
            answer = Answer.read(reply)
            if answer.word != "OK":
                raise Refused(
                    f"Redis refuses lane {lane} ({answer.word}): it holds another log's totals, or newer ones than offset "
                    f"{state.next_offset} of this; flush it, or check TOLLWAY_REDIS_URL"
                )
        gone = await self._forget({tag(lane) for lane in lanes})
        await self._view.assigned({state.partition: state})
        try:
            if not await self._view.drained(WRITE_S):
                raise Unavailable(f"Redis did not take partition {state.partition} in {WRITE_S:g} s: {self._problem()}")
        finally:
            await self._view.revoked([state.partition])
        return f"{len(state.parts['quota'])} totals at {state.next_offset}, {gone} dropped before"

    async def close(self) -> None:
        """Disconnect."""
        await self._view.close()
        await self._client.aclose()

    async def _flown(self, calls: list[bytes]) -> list[Any]:
        return [reply for at in range(0, len(calls), 8) for reply in await fly(self._client, calls[at : at + 8])]

    async def _forget(self, tags: set[str]) -> int:
        """Drop every total of these lanes, what is held stays; returns how many."""
        gone = 0
        try:
            async for key in self._client.scan_iter(match="tw:{*}:s:*", count=SCAN_COUNT):
                if not any(key.startswith(prefix.encode()) for prefix in tags):
                    continue
                names: list[bytes] = await self._client.hkeys(key)  # type: ignore[assignment]
                fields = [name for name in names if name.endswith(b" u")]
                gone += await self._client.hdel(key, *fields) if fields else 0
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error
        return gone

    def _problem(self) -> str:
        stats = self._view.stats()
        return str(stats["error"] or f"lanes {stats['lanes']}, {stats['dirty']} totals left")
