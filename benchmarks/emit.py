"""What a call pays for `emit()`: p50, p99, p99.9 of an event with all usual fields, the sender running in the same loop.

One asyncio process, real Kafka, the spool on disk. `python -m benchmarks.emit [--rates 5000 20000] [--seconds 5] [--json]`.
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.machine import machine, median, report, say
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.emitter import Emitter
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create

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
    began, cpu = time.perf_counter(), time.process_time()
    making = 0.0
    while (passed := time.perf_counter() - began) < seconds:
        while made < passed * rate:
            before = time.perf_counter_ns()
            fields = call(random, made)
            start = time.perf_counter_ns()
            emitter.emit(**fields)
            took.append(time.perf_counter_ns() - start)
            making += (start - before) / 1e9
            made += 1
        await asyncio.sleep(TURN_S)
    await emitter.flush(30)
    spent = time.process_time() - cpu - making
    await emitter.close(30)
    took.sort()
    shares = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    found = {name: took[int(len(took) * share)] / 1000 for name, share in shares.items()}
    return {"rate": rate, "emitted": made, **found, "max_us": took[-1] / 1000, "cpu_us_an_event": spent / made * 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[5_000, 20_000], help="events a second")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: dict[int, list[dict[str, float]]] = {rate: [] for rate in arguments.rates}
    with tempfile.TemporaryDirectory() as folder:
        kafka = KafkaBroker(Path(folder))
        try:
            kafka.start()
            kafka.wait_ready()
            asyncio.run(create(settings_module.read(data=Path(folder), kafka_bootstrap=kafka.bootstrap, replication=1)))
            for turn in range(arguments.rounds):
                for rate in arguments.rates:
                    spool = Path(folder) / f"spool-{turn}-{rate}"
                    row = asyncio.run(at_rate(kafka.bootstrap, spool, rate, arguments.seconds))
                    say(f"round {turn + 1}: " + ", ".join(f"{name} {value:,.1f}" for name, value in row.items()))
                    rows[rate].append(row)
        finally:
            kafka.kill()
    middle = [{name: round(median([row[name] for row in of]), 1) for name in of[0]} for of in rows.values()]
    report(
        {"machine": machine(), "seconds": arguments.seconds, "rounds": arguments.rounds, "emit": middle}, arguments.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
