"""A service of a crash campaign: workers ask a gate, make their calls, emit and capture, and journal what they emit.

`python -m tests.crash_gate --name g0 …`. Each life has a journal of its own and sends what the one before it had spooled.
SIGTERM ends it early, flushed and closed; kill −9 and SIGSTOP are what it is for.
"""

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

from tests.crash_lives import next_life
from tests.crash_tills import METER, Wish, wish
from tests.raw_writer import JournalFile
from tollway.connectors.emitter import Emitter
from tollway.connectors.gate import Decision, Gate
from tollway.schemas.ids import uuid7_hex

WORKERS = 4
TTL_S = 10
DEADLINE_S = 1.0
"""The machine is shared by all that is killed and started: a decision may take longer than in production."""
WORK_MAX_S = 0.3
REFUSED_REST_S = 0.05
FLUSH_S = 60.0
TWICE = "allowed-twice"
"""File of calls that a gate allowed twice, beside the journals."""


class Service:
    """One life."""

    def __init__(self, gate: Gate, emitter: Emitter, journals: Path, name: str, seed: int) -> None:
        """`name` is this life's own: its journal is begun."""
        self.gate, self.emitter, self.journals = gate, emitter, journals
        self.journal = JournalFile(journals / f"{name}.0.jsonl")
        self.name, self.seed = name, seed
        self.random = Random(f"{seed}/{name}")
        self.stop = asyncio.Event()
        self.made = 0
        self.seen: Counter[str] = Counter()

    async def work(self, worker: int, per_s: float) -> None:
        """Ask, call, emit, capture, unevenly at a mean rate, until stopped."""
        while not self.stop.is_set():
            await self._call(worker)
            await self._rest(self.random.expovariate(per_s))

    async def _rest(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return

    async def _call(self, worker: int) -> None:
        call = uuid7_hex(time.time_ns() // 1_000_000, self.random.getrandbits(74))
        wanted = wish(self.random, self.seed, call, TTL_S)
        decision = await self.gate.authorize(wanted.ask)
        self.seen[f"{decision.verdict} {decision.reason}".strip()] += 1
        if self.random.random() < 0.1:
            again = await self.gate.authorize(wanted.ask)
            if decision.allowed and again.allowed:
                note_twice(self.journals, call)
        if not decision.allowed or decision.hold is None:
            await self._rest(REFUSED_REST_S)
            return
        fate = self.random.random()
        await self._rest(self.random.uniform(0, WORK_MAX_S))
        if fate < 0.05:
            await self.gate.void(decision.hold)
        else:
            await self._settle(worker, wanted, decision, captured=fate > 0.15)

    async def _settle(self, worker: int, wanted: Wish, decision: Decision, captured: bool) -> None:
        """Emit first, then capture; some captures never come."""
        assert decision.hold is not None
        used = self.random.randint(0, decision.up_to[METER])
        self.made += 1
        tag = f"{self.name}.{worker}.{self.made}"
        fields: dict[str, Any] = {
            "account": decision.ask.account,
            "principal_kind": "user",
            "principal": wanted.principal,
            **wanted.who,
            "surface": "llm",
            "operation": "chat.complete",
            "status": "ok" if self.random.random() < 0.9 else "error",
            "latency_us": self.random.randrange(1_000_000),
            "quantities": {"calls": 1, METER: used},
            "hold": decision.hold.id,
            "occurred_at": decision.hold.at_us,
            "trace_id": tag,
        }
        self.journal.line(b=tag, t=worker, e=fields)
        emitted = self.emitter.emit(**fields)
        if emitted is None:
            self.journal.line(x=tag, why="refused, see the counters")
            return
        self.journal.line(r=tag, s=emitted.source, l=emitted.lane, q=emitted.sequence)
        if captured:
            self.seen[await self.gate.capture(decision.hold, {"calls": 1, METER: used}, emitted)] += 1


def note_twice(journals: Path, call: str) -> None:
    """A call that was allowed twice: nothing of the kind may be there."""
    with (journals / TWICE).open("a") as file:
        file.write(f"{call}\n")


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A life, until SIGTERM; then what it saw."""
    name = f"{arguments.name}.{next_life(arguments.journals, arguments.name)}"
    emitter = Emitter(arguments.bootstrap, spool_dir=arguments.spool)
    await emitter.start()
    async with Gate(arguments.redis, emitter, deadline_s=DEADLINE_S, grace_s=arguments.grace_s) as gate:
        service = Service(gate, emitter, arguments.journals, name, arguments.seed)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, service.stop.set)
        per_s = arguments.rate / WORKERS
        await asyncio.gather(*(service.work(worker, per_s) for worker in range(WORKERS)))
        left = await emitter.close(FLUSH_S)
        service.seen.update({name: n for name, n in gate.stats().items() if name in ("late", "restored", "orphans")})
    service.journal.close()
    return {"name": name, "unacknowledged": left, "seen": service.seen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("bootstrap", str), ("redis", str), ("spool", Path), ("journals", Path), ("name", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=15.0, help="calls a second, all workers together")
    parser.add_argument("--grace-s", type=int, default=900, help="the log's hold_grace_s")
    found = asyncio.run(run(parser.parse_args()))
    print(json.dumps(found, default=str))
    return 1 if found["unacknowledged"] else 0


if __name__ == "__main__":
    sys.exit(main())
