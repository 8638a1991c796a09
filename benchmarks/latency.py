"""From the broker's acknowledgement to the total in Redis, at half of the sustained rate, all groups at work.

Beside the steady traffic a few probes: one event, its acknowledgement, then Redis is asked every few milliseconds until the
account's total of the day has it. Default settings of the workers.
"""

import asyncio
import secrets
import sys
import time
from random import Random
from typing import Any

from redis.asyncio import Redis

from benchmarks import part
from benchmarks.groups import BILLS, fleet, lag, opened
from benchmarks.live import producers
from benchmarks.machine import say
from benchmarks.part import Size
from benchmarks.site import Site, Worker, wait_for, whole
from benchmarks.traffic import TOPIC
from tollway.connectors.kafka import started_producer
from tollway.schemas import codec
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane, tag

SIZES = [
    Size("rate", 20_000, 3_000, "events a second: half of the sustained rate"),
    Size("seconds", 40.0, 10.0, "how long"),
    Size("probes", 4, 2, "probes at once"),
]
LOOK_S = 0.004
PAUSE_S = 0.1
SETTLE_S = 5.0
"""Of steady traffic before the first probe."""
DAY_S = 86_400


async def probe(site: Site, number: int, until: float, producer: Any, client: Redis, took: list[float]) -> None:
    """One event after the other, until the time is over."""
    account, random = f"probe-{number}", Random(number)
    source, sequence = uuid7_hex(time.time_ns() // 1_000_000, secrets.randbits(74)), 0
    key = f"{tag(lane(account))}s:{account}~acct"
    while time.monotonic() < until:
        await asyncio.sleep(random.random() * PAUSE_S)
        sequence += 1
        now_us = time.time_ns() // 1000
        event = {
            "event_id": f"{secrets.randbits(128):032x}", "source": source, "sequence": sequence, "occurred_at": now_us,
            "surface": "rest", "operation": "probe", "account": account, "principal_kind": "user", "principal": "p",
            "status": "ok", "latency_us": 1, "quantities": {"calls": 1},
        }  # fmt: skip
        field = f"calls d:{now_us // 1_000_000 // DAY_S * DAY_S} u"
        where = lane(account) % len(site.partitions)
        await producer.send_and_wait(TOPIC, codec.encode("UsageEvent", event), key=account.encode(), partition=where)
        acknowledged = time.perf_counter()
        while int(await client.hget(key, field) or 0) < sequence:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(LOOK_S)
        took.append(time.perf_counter() - acknowledged)


async def probed(site: Site, seconds: float, probes: int) -> list[float]:
    """Seconds of each."""
    took: list[float] = []
    producer, client = await started_producer(site.bootstrap, {}), Redis.from_url(site.redis_url)
    try:
        until = time.monotonic() + seconds
        await asyncio.gather(*(probe(site, number, until, producer, client, took) for number in range(probes)))
    finally:
        await producer.stop()
        await client.aclose()
    return took


def behind(site: Site, workers: dict[str, Worker]) -> int:
    """Records that the accounts group has not folded."""
    return lag(site, workers["accounts"])


def measure(rate: int, seconds: float, probes: int) -> dict[str, Any]:
    """Steady traffic, then probes in it."""
    with whole(**BILLS) as site:
        opened(site)
        with producers(site, rate, seconds + 2 * SETTLE_S) as senders, fleet(site) as workers:
            wait_for(lambda: all(worker.ready() for worker in workers.values()), "all workers to have their partitions")
            wait_for(lambda: behind(site, workers) <= 0, "the accounts group at the end of the log")
            senders.go()
            time.sleep(SETTLE_S)
            took = sorted(asyncio.run(probed(site, seconds, probes)))
            left = behind(site, workers)
            told = senders.told()[0]
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
    found = {name: round(took[int(len(took) * share)] * 1000, 1) for name, share in shares.items()}
    say(f"{len(took)} probes: {found}")
    return {
        "per_s": round(told["sent"] / told["wall_s"]),
        "probes": len(took),
        **found,
        "max_ms": round(took[-1] * 1000, 1),
        "lag_at_end_s": round(left / rate, 2),
    }


if __name__ == "__main__":
    sys.exit(part.run("latency", __doc__, SIZES, measure))
