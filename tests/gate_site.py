"""A Redis in which accounts may call: their lanes made ready by the fold's own scripts. And an emitter that shows what it took."""

import time
from typing import Any

import msgpack
import redis

from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END
from tollway.schemas.command import DEFAULT_POLICY
from tollway.schemas.lane import lane, tag
from tollway.streams.policy import gate_fields

EPOCH = "0-log"


def limit(scope: str, most: int, window: str = "d", meter: str = "calls") -> dict[str, Any]:
    """A row of a policy's limits."""
    return {"scope": scope, "meter": meter, "window": window, "limit": most}


def may_call(url: str, account: str, *limits: dict[str, Any], frozen: bool = False) -> None:
    """The account's lane is ready, at this moment's log time, with nothing used and these limits; what stood there is gone."""
    key, now_ms = f"{tag(lane(account))}m", time.time_ns() // 1_000_000
    fields = gate_fields({**DEFAULT_POLICY, "limits": list(limits)}, 1, False, frozen)
    with redis.Redis.from_url(url) as client:
        client.delete(key, *client.scan_iter(f"{tag(lane(account))}*", count=10_000))
        gen = client.eval(REWRITE_BEGIN.text, 1, key, EPOCH, 0)[3]
        body = msgpack.packb([[], [], [[account, *fields]], []])
        assert client.eval(APPLY.text, 1, key, EPOCH, 0, "t", 0, "", "", now_ms, body)[0] == b"OK"
        assert client.eval(REWRITE_END.text, 1, key, EPOCH, gen, 0)[0] == b"OK"


def forget(url: str, account: str) -> None:
    """The account has no policy: no such account is open."""
    with redis.Redis.from_url(url) as client:
        client.delete(f"{tag(lane(account))}p:{account}")


def held(url: str, account: str, scope: str = "acct") -> dict[str, int]:
    """Meter → units held in a scope, over its windows the largest."""
    with redis.Redis.from_url(url) as client:
        fields = client.hgetall(f"{tag(lane(account))}s:{account}~{scope}")
    found: dict[str, int] = {}
    for name, value in fields.items():
        if name.endswith(b" h"):
            meter = name.decode().partition(" ")[0]
            found[meter] = max(found.get(meter, 0), int(value))
    return found


class ShownEmitter(Emitter):
    """An emitter that sends nowhere and shows what it took."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:9", durability="memory")
        self.taken: list[dict[str, Any]] = []

    def emit(self, **fields: Any) -> Emitted | None:
        emitted = super().emit(**fields)
        if emitted is not None:
            self.taken.append(fields)
        return emitted
