"""A sample service of the demo: a process that is called at a steady rate and emits every call. Three kinds of it run."""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tollway.connectors.emitter import Emitter

ACCOUNTS = (
    "acme", "cyberdyne", "globex", "hooli", "initech", "monarch", "soylent", "stark", "tyrell", "umbrella", "wayne", "wonka",
)  # fmt: skip
PRINCIPALS = 8
METERS = ("calls", "tokens_in", "tokens_out")
SERVICES: dict[str, dict[str, Any]] = {
    "search-api": {"surface": "rest", "operations": ("GET /search", "GET /documents/{id}")},
    "weather-tools": {"surface": "mcp", "operations": ("forecast", "alerts")},
    "research-agent": {"surface": "agent", "operations": ("plan", "chat.complete", "summarise")},
}
STATUSES = ("ok",) * 46 + ("error",) * 3 + ("rate_limited",)
PAUSE_S = 0.01
FLUSH_S = 30.0


def call(random: Random, service: str, number: int) -> dict[str, Any]:
    """The fields of one call."""
    kind = SERVICES[service]
    account = ACCOUNTS[int(len(ACCOUNTS) * random.random() ** 2)]
    client = random.random() < 0.25
    fields: dict[str, Any] = {
        "surface": kind["surface"],
        "operation": random.choice(kind["operations"]),
        "account": account,
        "principal_kind": "client" if client else "user",
        "principal": f"{'key' if client else 'user'}-{random.randrange(PRINCIPALS)}",
        "status": random.choice(STATUSES),
        "latency_us": random.randrange(500, 900_000),
        "quantities": {"calls": 1},
    }
    if kind["surface"] == "agent":
        run = f"run-{number // 25}"
        fields |= {"agent": "researcher", "session": f"session-{number // 100}", "run": run, "model": "large-2"}
        fields["quantities"] |= {"tokens_in": random.randrange(4_000), "tokens_out": random.randrange(1_200)}
        fields |= {"cost_nano": random.randrange(10**7), "cost_asset": "USD"}
    return fields


async def serve(bootstrap: str, spool: Path, service: str, seconds: float, rate: float, seed: int) -> dict[str, Any]:
    """Make calls for a while; returns what was emitted: events, refused, and units by account and meter."""
    random, stop = Random(f"{seed}/{service}"), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    emitter, units, made, refused = Emitter(bootstrap, spool_dir=spool), Counter[tuple[str, str, str]](), 0, 0
    await emitter.start()
    began = time.monotonic()
    while not stop.is_set() and (passed := time.monotonic() - began) < seconds:
        while made + refused < passed * rate:
            fields = call(random, service, made)
            if emitter.emit(**fields) is None:
                refused += 1
                continue
            made += 1
            for meter, amount in fields["quantities"].items():
                units[fields["account"], meter, fields["status"]] += amount
        await asyncio.sleep(PAUSE_S)
    left = sum((await emitter.close(FLUSH_S)).values())
    rows = [[*key, amount] for key, amount in units.items()]
    return {"service": service, "events": made, "refused": refused, "unacknowledged": left, "units": rows}


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--service", choices=SERVICES, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="calls a second")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = asyncio.run(serve(given.bootstrap, given.spool, given.service, given.seconds, given.rate, given.seed))
    print(json.dumps(found))
    return 1 if found["unacknowledged"] else 0


if __name__ == "__main__":
    sys.exit(main())
