"""Decisions a second and their latency: authorize + capture over five scopes, fifty callers, while the fold applies totals.

Beside it a plain INCR by the same client library on the same Valkey, under the same apply.
"""

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack

from benchmarks import part
from benchmarks.part import Size
from tollway.connectors import redis as far
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitted
from tollway.connectors.gate import Ask, Gate, scopes_of
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, Answer, fly
from tollway.schemas.lane import lane
from tollway.streams.policy import gate_fields

SIZES = [
    Size("seconds", 10.0, 2.0, "of each"),
    Size("callers", 50, 50, "callers at once"),
]
ACCOUNT, EPOCH = "acme", "0-log"
LANE = lane(ACCOUNT)
APPLIED_A_SECOND = 20_000
APPLIED_AT_ONCE = 1_000
LIMIT = 10**15
POLICY = {
    "limits": [
        {"scope": kind, "meter": "calls", "window": "d", "limit": LIMIT}
        for kind in ("acct", "user", "agent", "sess", "run")
    ],
    "outage": "closed",
    "max_staleness_s": 3_600,
}

Once = Callable[[int], Awaitable[None]]


async def opened(url: str) -> int:
    """A lane that is READY; its generation."""
    client = far.connect(url)
    found = Answer.read((await fly(client, [REWRITE_BEGIN.call(LANE, EPOCH, 0)]))[0])
    body = msgpack.packb([[], [], [[ACCOUNT, *gate_fields(POLICY, 1, False)]], []])
    await fly(client, [APPLY.call(LANE, EPOCH, 0, "t", 0, "", "", int(time.time() * 1000), body)])
    await fly(client, [REWRITE_END.call(LANE, EPOCH, found.gen, 0)])
    await client.aclose()
    return found.gen


def apply_totals(url: str, seconds: float) -> None:
    """A process of its own: 20,000 totals a second, a thousand a call, on the lane that the gate asks."""
    asyncio.run(_apply_totals(url, seconds))


async def _apply_totals(url: str, seconds: float) -> None:
    client = far.connect(url)
    began, off = time.perf_counter(), 0
    while (now := time.perf_counter() - began) < seconds:
        if off >= now * APPLIED_A_SECOND:
            await asyncio.sleep(0.001)
            continue
        off += APPLIED_AT_ONCE
        runs = [[f"{ACCOUNT}~user:v{n}", f"calls d:{off % 7} u", str(off)] for n in range(APPLIED_AT_ONCE)]
        body = msgpack.packb([runs, [], [], []])
        await fly(client, [APPLY.call(LANE, EPOCH, off, f"t{off}", 0, "", "", int(time.time() * 1000), body)])
    await client.aclose()


async def measured(once: Once, callers: int, seconds: float) -> dict[str, float]:
    """Calls a second in all, and p50 and p99 of one in milliseconds."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while (began := time.perf_counter()) < until:
            await once(number)
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    took.sort()
    return {
        "a_second": round(len(took) / seconds),
        "p50_ms": round(took[len(took) // 2] * 1000, 2),
        "p99_ms": round(took[len(took) * 99 // 100] * 1000, 2),
    }


async def gate_calls(url: str, callers: int, seconds: float) -> dict[str, dict[str, float]]:
    """Authorize and capture alone, each by its own clock, and as a pair."""
    sequence = 0
    parts: dict[str, list[float]] = {"authorize": [], "capture": []}
    async with Gate(url, deadline_s=5) as gate:

        async def once(number: int) -> None:
            nonlocal sequence
            scopes = scopes_of("user", f"u{number}", agent="a1", session=f"s{number}", run=f"r{number}")
            began = time.perf_counter()
            decision = await gate.authorize(Ask(ACCOUNT, scopes, {"calls": 1}))
            decided = time.perf_counter()
            assert decision.hold is not None, decision
            sequence += 1
            word = await gate.capture(decision.hold, {"calls": 1}, Emitted("5" * 32, LANE, sequence))
            assert word == "captured", word
            gate._memory.drop(decision.hold)  # as when its usage has been folded
            parts["authorize"].append(decided - began)
            parts["capture"].append(time.perf_counter() - decided)

        found = {"authorize + capture": await measured(once, callers, seconds)}
    for name, took in parts.items():
        took.sort()
        found[name] = {
            "p50_ms": round(took[len(took) // 2] * 1000, 2),
            "p99_ms": round(took[len(took) * 99 // 100] * 1000, 2),
        }
    return found


async def incr_calls(url: str, callers: int, seconds: float) -> dict[str, dict[str, float]]:
    """A plain INCR round trip by the same library: its pool of fifty, nothing sent together."""
    from redis.asyncio import BlockingConnectionPool, Redis

    client = Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=callers, timeout=5))

    async def once(number: int) -> None:
        await client.incr(f"plain:{number}")

    found = {"INCR": await measured(once, callers, seconds)}
    await client.aclose()
    return found


def run(url: str, callers: int, seconds: float) -> dict[str, dict[str, float]]:
    """Both, each under apply, one after the other."""
    results: dict[str, dict[str, float]] = {}
    asyncio.run(opened(url))
    for contender in (incr_calls, gate_calls):
        fold = multiprocessing.get_context("spawn").Process(target=apply_totals, args=(url, seconds + 1))
        fold.start()
        results |= asyncio.run(contender(url, callers, seconds))
        fold.join()
        asyncio.run(opened_again(url))
    return results


async def opened_again(url: str) -> None:
    """The lane anew, for the next contender."""
    client = far.connect(url)
    await client.flushdb()
    await client.aclose()
    await opened(url)


def measure(seconds: float, callers: int) -> dict[str, Any]:
    """On a Valkey of its own."""
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(Path(folder)) as server:
        return {"applied_a_second": APPLIED_A_SECOND, **run(server.url, callers, seconds)}


if __name__ == "__main__":
    sys.exit(part.run("gate", __doc__, SIZES, measure))
