"""A service that emits: threads make calls, each journalled before `emit()` and after it returned.

`python -m tests.emitter_process --name e0 --life 0 …`. A successor (`--life 1`) takes over the spool of the life before and
goes on behind the last call that was begun. SIGTERM ends it early, flushed and closed; kill −9 is what it is for.
"""

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.load import World, emitted_fields, traffic, world
from tests.oracle_journal import JournalLines
from tests.raw_writer import JournalFile
from tollway.connectors.emitter import Emitter

PAUSE_MAX_S = 0.25


def begun_before(journals: Path, name: str, life: int, thread: int) -> int:
    """How many calls of this thread's plan earlier lives have begun."""
    writer, last = f"{name}t{thread}", -1
    for earlier in range(life):
        for line in JournalLines(journals / f"{name}.{earlier}.jsonl"):
            of, _, number = line.get("b", "").partition(".")
            if of == writer:
                last = max(last, int(number))
    return last + 1


def calls(
    emitter: Emitter,
    journal: JournalFile,
    plan: Any,
    thread: int,
    per_s: float,
    stop: threading.Event,
    more: dict[str, Any],
) -> None:
    """One thread: make the calls of its plan at a mean rate, unevenly."""
    random, due = Random(thread), time.monotonic()
    for call in plan:
        if stop.is_set():
            return
        due += random.expovariate(per_s)
        while (rest := due - time.monotonic()) > 0 and not stop.wait(min(rest, PAUSE_MAX_S)):
            pass
        fields, tag = {**emitted_fields(call, time.time_ns() // 1000), **more}, call["trace_id"]
        journal.line(b=tag, t=thread, e=fields)
        try:
            emitted = emitter.emit(**fields)
        except ValueError as error:
            journal.line(x=tag, why=str(error))
            continue
        if emitted is None:
            journal.line(x=tag, why="refused, see the counters")
        else:
            journal.line(r=tag, s=emitted.source, l=emitted.lane, q=emitted.sequence)


async def run(arguments: argparse.Namespace, made: World) -> dict[str, Any]:
    """Emit the whole plan, then wait until the broker has all of it."""
    emitter = Emitter(arguments.bootstrap, spool_dir=arguments.spool)
    await emitter.start()
    journal = JournalFile(arguments.journals / f"{arguments.name}.{arguments.life}.jsonl")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    threads = []
    for thread in range(arguments.threads):
        writer, turn = f"{arguments.name}t{thread}", arguments.index * arguments.threads + thread
        plan = traffic(made, arguments.seed, writer, turn, arguments.events, arguments.writers)
        for _ in range(begun_before(arguments.journals, arguments.name, arguments.life, thread)):
            next(plan, None)
        work = (emitter, journal, plan, thread, arguments.rate / arguments.threads, stop, arguments.more)
        threads.append(threading.Thread(target=calls, args=work, name=writer))
    for each in threads:
        each.start()
    for each in threads:
        await asyncio.to_thread(each.join)
    left = await emitter.close(arguments.flush_s)
    journal.close()
    return {"name": arguments.name, "life": arguments.life, "unacknowledged": left, **emitter.counters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("bootstrap", str), ("spool", Path), ("journals", Path), ("name", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, default in (("life", 0), ("index", 0), ("seed", 1), ("events", 1_000), ("threads", 2), ("writers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--accounts", type=int, default=220)
    parser.add_argument("--principals", type=int, default=10, help="principals an account")
    parser.add_argument("--rate", type=float, default=300.0, help="calls a second, all threads together")
    parser.add_argument("--more", type=json.loads, default={}, help="fields of every call, as JSON")
    parser.add_argument("--flush-s", type=float, default=60.0)
    arguments = parser.parse_args()
    made = world(arguments.seed, arguments.accounts, arguments.principals)
    found = asyncio.run(run(arguments, made))
    print(json.dumps(found, default=str))
    return 1 if found["unacknowledged"] else 0


if __name__ == "__main__":
    sys.exit(main())
