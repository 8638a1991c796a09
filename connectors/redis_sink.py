"""Usage into a Redis stream that several processes share: for development, and for readers that have no Kafka.

Its guarantee: an event is in the stream once, by its event_id, for HORIZON_S; what still waits in a process's memory dies
with it. Quotas and bills come from Kafka alone.
"""

import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollway.connectors.errors import Unavailable
from tollway.connectors.queued import EVENTS_MAX, Queued

KEY = "tollway:usage"
STREAM_MAX = 1_000_000
"""Events that the stream keeps; a full one takes no more until its reader has trimmed it, and the queue waits."""
HORIZON_S = 86_400
PAGE = 1_000

_TEXT = (Path(__file__).parent / "lua" / "record_once.lua").read_text(encoding="utf-8")


class RedisSink(Queued):
    """Appends each event once to the stream `{<key>}:events`. `start` it in the service's loop."""

    def __init__(
        self,
        client: Redis,
        *,
        key: str = KEY,
        stream_max: int = STREAM_MAX,
        events_max: int = EVENTS_MAX,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        super().__init__("redis", events_max, clock_us)
        self._client, self._key, self._stream_max = client, key, stream_max
        self._record = client.register_script(_TEXT)

    async def send(self, events: list[dict[str, Any]]) -> None:
        """One round trip. Raises Unavailable where Redis is away or the stream is full; repeating is harmless."""
        pipe = self._client.pipeline(transaction=False)
        try:
            for event in events:
                line = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
                keys = [_stream(self._key), f"{{{self._key}}}:{event['event_id']}"]
                await self._record(keys=keys, args=[line, self._stream_max, HORIZON_S], client=pipe)
            taken = await pipe.execute()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error
        if not all(taken):
            raise Unavailable(f"stream {_stream(self._key)} holds {self._stream_max} events: read and trim it")


def _stream(key: str) -> str:
    return f"{{{key}}}:events"


async def read_redis(client: Redis, key: str = KEY, *, after: str = "-") -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(id, event) in their order, behind the id `after`; trim what was read with `XTRIM … MINID`. Raises Unavailable."""
    start = f"({after}" if after != "-" else after
    while True:
        try:
            page: Any = await client.xrange(_stream(key), start, "+", count=PAGE)
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error
        for place, fields in page:
            yield place.decode(), json.loads(fields[b"event"])
        if len(page) < PAGE:
            return
        start = f"({page[-1][0].decode()}"
