"""What a call pays for `emit()`: p50, p99, p99.9 of an event with all usual fields, the sender running in the same loop.

One asyncio process, real Kafka, the spool on disk. Then the sender alone: what it sends of a full spool.
"""

import asyncio
import gc
import secrets
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import part
from benchmarks.machine import median, say
from benchmarks.part import Size
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.emitter import Emitter
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create

SIZES = [
    Size("rates", [5_000, 20_000], [5_000], "events a second"),
    Size("seconds", 5.0, 2.0, "of each rate a round"),
    Size("rounds", 3, 1, "interleaved rounds"),
    Size("spooled", 200_000, 20_000, "events that the sender finds"),
]
TURN_S = 0.005
"""The process wakes this often and makes the calls that are due, as a server does."""


def call(random: Random, number: int) -> dict[str, Any]:
    """A call with every field that a traced agent call usually has."""
    return {
        "occurred_at": time.time_ns() // 1000,
        "surface": "agent",
        "operation": "chat.complete",
        "account": f"acct-{random.randrange(500):04d}",
        "principal_kind": "user",
        "principal": f"user-{random.randrange(5_000):05d}",
        "status": "ok",
        "latency_us": random.randrange(200, 2_000_000),
        "quantities": {"calls": 1, "tokens_in": random.randrange(4_000), "tokens_out": random.randrange(1_500)},
        "agent": "agent-planner",
        "session": f"session-{random.randrange(1_000)}",
        "run": f"run-{number // 20}",
        "path": [f"run-{number // 100}"],
        "cost_nano": random.randrange(10**7),
        "cost_asset": "USD",
        "provider": "example",
        "model": "large-2",
        "trace_id": secrets.token_hex(16),
        "attributes": {"team": "blue", "region": "eu-1"},
    }


async def at_rate(bootstrap: str, folder: Path, rate: int, seconds: float) -> dict[str, float]:
    """Microseconds of each emit() at a steady rate, and what all of it costs an event."""
    emitter = Emitter(bootstrap, spool_dir=folder)
    await emitter.start()
    random, took, made = Random(rate), [], 0
    for number in range(2_000):  # warm
        emitter.emit(**call(random, number))
    await emitter.flush(30)
    calls = [call(random, number) for number in range(int(rate * seconds))]
    gc.collect()
    gc.freeze()  # what only a benchmark holds
    began, cpu = time.perf_counter(), time.process_time()
    while made < len(calls):
        due = min(len(calls), int((time.perf_counter() - began) * rate))
        for fields in calls[made:due]:
            start = time.perf_counter_ns()
            emitter.emit(**fields)
            took.append(time.perf_counter_ns() - start)
        made = max(made, due)
        await asyncio.sleep(TURN_S)
    await emitter.flush(30)
    spent = time.process_time() - cpu
    gc.unfreeze()
    await emitter.close(30)
    took.sort()
    shares = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    found = {name: took[int(len(took) * share)] / 1000 for name, share in shares.items()}
    return {"rate": rate, "emitted": made, **found, "max_us": took[-1] / 1000, "cpu_us_an_event": spent / made * 1e6}


async def drained(bootstrap: str, folder: Path, events: int) -> dict[str, float]:
    """The sender alone: a full spool, then all of it acknowledged; events per CPU second and a second."""
    emitter, random = Emitter(bootstrap, spool_dir=folder), Random(events)
    for number in range(events):
        emitter.emit(**call(random, number))
    began, cpu = time.perf_counter(), time.process_time()
    await emitter.start()
    left = await emitter.flush(120)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - began
    await emitter.close(30)
    if left:
        raise TimeoutError(f"{sum(left.values())} events of the spool are not acknowledged")
    return {"events": events, "per_cpu_s": round(events / cpu_s), "per_s": round(events / wall_s)}


def measure(rates: list[int], seconds: float, rounds: int, spooled: int) -> dict[str, Any]:
    """All rates and the sender in turn, round by round."""
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with KafkaBroker(folder) as kafka:
            asyncio.run(create(settings_module.read(data=folder, kafka_bootstrap=kafka.bootstrap, replication=1)))
            for turn in range(rounds):
                found = {
                    str(rate): asyncio.run(at_rate(kafka.bootstrap, folder / f"spool-{turn}-{rate}", rate, seconds))
                    for rate in rates
                }
                found["sender"] = asyncio.run(drained(kafka.bootstrap, folder / f"spool-{turn}", spooled))
                for key, row in found.items():
                    rows.setdefault(key, []).append(row)
                    say(f"round {turn + 1}: {key}: " + ", ".join(f"{what} {value:,.1f}" for what, value in row.items()))
    middle = {key: {what: round(median([row[what] for row in of]), 1) for what in of[0]} for key, of in rows.items()}
    return {"median": middle, "rounds": rows}


if __name__ == "__main__":
    sys.exit(part.run("emit", __doc__, SIZES, measure))
