"""What the ASGI middleware adds to a request: p50 and p99 of a FastAPI application bare, metered, and metered and gated.

The application is called as a server calls it, all variants in turn in one run; the usage goes to a spool on disk and from there
to real Kafka, the gate asks a real Valkey. Beside it: the same application behind one plain INCR, for what any round trip adds
on this machine at this moment.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from redis.asyncio import Redis

from benchmarks import part
from benchmarks.machine import median, say
from benchmarks.part import Size
from tests.gate_site import limit, may_call
from tollway.connectors.asgi import MeterMiddleware
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitter
from tollway.connectors.gate import Gate
from tollway.connectors.meter import Meter
from tollway.connectors.principal import Principal
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create

SIZES = [
    Size("requests", 1_000, 200, "of each variant a round"),
    Size("rounds", 3, 1, "interleaved rounds"),
]
ACCOUNT = "acme"
BLOCK = 50
"""Requests of one variant before the next has its turn."""
LIMITS = 10**12


def application() -> Any:
    """A service of twenty routes, the last of them called."""
    app = FastAPI()
    for number in range(20):

        @app.get(f"/resource-{number}/{{id}}")
        async def read(id: int) -> dict[str, int]:
            return {"id": id}

    return app


def behind_incr(app: Any, client: Redis) -> Any:
    """The application behind one round trip to Redis that does next to nothing there."""

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        await client.incr("benchmark")
        await app(scope, receive, send)

    return counted


async def request(app: Any, number: int) -> int:
    """Nanoseconds of one request."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": f"/resource-19/{number}", "raw_path": b"/resource-19/x", "query_string": b"",
        "root_path": "", "headers": [(b"host", b"localhost"), (b"accept", b"*/*"), (b"user-agent", b"benchmark")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    codes: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            codes.append(message["status"])

    began = time.perf_counter_ns()
    await app(scope, receive, send)
    took = time.perf_counter_ns() - began
    assert codes == [200], codes
    return took


async def timed(bootstrap: str, valkey: str, folder: Path, requests: int) -> dict[str, list[int]]:
    """Variant → nanoseconds of each of its requests."""
    principal = Principal("user", "u-1", ACCOUNT)
    async with Emitter(bootstrap, spool_dir=folder) as emitter, Gate(valkey, deadline_s=1.0) as gate:
        metered, gated, bare = application(), application(), application()
        metered.add_middleware(MeterMiddleware, Meter(emitter, principal=principal))
        asking = Meter(emitter, principal=principal, gate=gate)
        gated.add_middleware(MeterMiddleware, asking)
        plain = Redis.from_url(valkey)
        apps = {"bare": bare, "metered": metered, "incr": behind_incr(application(), plain), "gated": gated}
        took: dict[str, list[int]] = {name: [] for name in apps}
        for app in apps.values():
            for number in range(200):  # warm
                await request(app, number)
        for block in range(0, requests, BLOCK):
            for name, app in apps.items():
                await emitter.flush(30)  # what the variant before it emitted is not sent in this one's time
                for number in range(block, block + BLOCK):
                    took[name].append(await request(app, number))
                    await asking.settled(1)  # else the next one would wait for this one's capture
        await plain.aclose()
        return took


def figures(took: dict[str, list[int]]) -> dict[str, float]:
    """Microseconds: p50 and p99 of the bare application, and what the others add to each."""
    found: dict[str, float] = {}
    for share, word in ((0.5, "p50"), (0.99, "p99")):
        at = {name: sorted(values)[int(len(values) * share)] / 1000 for name, values in took.items()}
        found[f"bare_{word}_us"] = at["bare"]
        found |= {f"{name}_added_{word}_us": at[name] - at["bare"] for name in at if name != "bare"}
    return found


def measure(requests: int, rounds: int) -> dict[str, Any]:
    """All variants in turn, round by round."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with KafkaBroker(folder / "kafka") as kafka, ValkeyServer(folder / "valkey") as valkey:
            asyncio.run(create(settings_module.read(data=folder, kafka_bootstrap=kafka.bootstrap, replication=1)))
            may_call(valkey.url, ACCOUNT, limit("acct", LIMITS), limit("user", LIMITS, "h"))
            for turn in range(rounds):
                took = asyncio.run(timed(kafka.bootstrap, valkey.url, folder / f"spool-{turn}", requests))
                rows.append(figures(took))
                say(f"round {turn + 1}: " + ", ".join(f"{each} {value:,.0f}" for each, value in rows[-1].items()))
    return {"median": {each: round(median([row[each] for row in rows]), 1) for each in rows[0]}, "rounds": rows}


if __name__ == "__main__":
    sys.exit(part.run("asgi", __doc__, SIZES, measure))
