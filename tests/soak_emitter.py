"""A service that emits the same few thousand calls for ever, at a rate or as fast as it can, without a journal.

`python -m tests.soak_emitter --bootstrap … --spool … --rate 0 --seconds 20`; it prints its counters as JSON when it ends.
"""

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.load import World, emitted_fields, traffic, world
from tollway.connectors.emitter import Emitter

CALLS = 20_000
TICK_S = 0.01
LATE_US = 30 * 10**6
FLUSH_S = 120.0


def calls(made: World, seed: int) -> list[dict[str, Any]]:
    """Traffic of a world without what is late or ahead: late usage has windows of its own, which would grow by design."""
    found = list(traffic(made, seed, "soak", 0, CALLS, 1))
    return [{**call, "age_us": min(max(call["age_us"], 0), LATE_US)} for call in found]


def emit(emitter: Emitter, plan: list[dict[str, Any]], rate: float, seconds: float, stop: threading.Event) -> None:
    """Make `rate` calls a second in even ticks (0 = without a pause) for so long, or until told to stop."""
    began, made, source = time.monotonic(), 0, cycle(plan)
    while not stop.is_set() and (passed := time.monotonic() - began) < seconds:
        due = int(rate * passed) - made if rate else 1_000
        for call in islice(source, max(0, due)):
            emitter.emit(**emitted_fields(call, time.time_ns() // 1000))
        made += max(0, due)
        if rate:
            stop.wait(TICK_S)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    emitter = Emitter(arguments.bootstrap, spool_dir=arguments.spool)
    await emitter.start()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    plan = calls(world(arguments.seed, arguments.accounts, arguments.principals), arguments.seed)
    began = time.monotonic()
    await asyncio.to_thread(emit, emitter, plan, arguments.rate, arguments.seconds, stop)
    seconds = time.monotonic() - began
    left = await emitter.close(FLUSH_S)
    return {"seconds": seconds, "unacknowledged": left, **emitter.counters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("bootstrap", str), ("spool", Path), ("rate", float), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, default in (("seed", 1), ("accounts", 40), ("principals", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    found = asyncio.run(run(parser.parse_args()))
    print(json.dumps(found, default=str))
    return 1 if found["unacknowledged"] else 0


if __name__ == "__main__":
    sys.exit(main())
