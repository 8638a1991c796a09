"""Many workers in several processes spend one account's limits through gates, while the real fold reads what they emit.

`python -m tests.gate_overspend --attempts 1000000` is the long form; it prints one line of JSON, and exits 1 on a breach.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.batches import counts, directory, usage
from tests.gate_lane import EPOCH
from tests.quota_world import ACCOUNT, HOME, PREFIX, Log
from tollway.connectors import redis as far
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitted
from tollway.connectors.gate import Ask, Decision, Gate, scopes_of
from tollway.connectors.redis import SWEEP, Swept, fly
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane
from tollway.streams.quota_view import QuotaView

PROCESSES, WORKERS = 4, 16
"""64 workers in all."""
KILLS = 3
METER, WINDOW = "tokens_out", "L"
BASE = f"{METER} {WINDOW}:0"
SHARES = {"acct": 30, "user": 12, "agent": 18, "sess": 10, "run": 5}
"""Units of each scope's limit for ten attempts: some run out early, some never."""
FOLD_EVENTS = 2_000
PHANTOM_LOOKS = 20
"""Times in a campaign at which every open hold is asked for."""
GRACE_S, AHEAD_S = 40, (50, 55)
"""Log time may be 60 s ahead of Redis' clock: far enough for what was abandoned to expire."""


def limits(attempts: int) -> dict[str, int]:
    """kind → limit."""
    return {kind: share * attempts // 10 for kind, share in SHARES.items()}


class Spender:
    """One process: its gate, its journal, which is what it emitted."""

    def __init__(self, gate: Gate, journal: Path, seed: int) -> None:
        self.gate, self.dice = gate, random.Random(seed)
        self.file = journal.open("ab", buffering=0)
        self.source = uuid7_hex(time.time_ns() // 1_000_000, self.dice.getrandbits(74))
        self.sequence = 0
        self.seen: Counter[str] = Counter()

    async def spend(self, attempts: int) -> None:
        """One worker."""
        for _ in range(attempts):
            await self._attempt()

    async def _attempt(self) -> None:
        dice = self.dice
        who = {"agent": f"a{dice.randrange(2)}", "session": f"s{dice.randrange(4)}", "run": f"r{dice.randrange(8)}"}
        principal, most = f"u{dice.randrange(3)}", dice.randint(1, 20)
        call = uuid7_hex(time.time_ns() // 1_000_000, dice.getrandbits(74))
        ask = Ask(ACCOUNT, scopes_of("user", principal, **who), {METER: (most, dice.randint(1, most))}, call, 5)
        decision = await self.gate.authorize(ask)
        self.seen[f"{decision.verdict} {decision.reason}".strip()] += 1
        if dice.random() < 0.1:
            again = await self.gate.authorize(ask)
            self.seen["executed twice"] += decision.allowed and again.allowed
        if not decision.allowed or decision.hold is None:
            return
        fate = dice.random()
        if fate < 0.05:
            await self.gate.void(decision.hold)
        elif fate < 0.08:
            self.seen["abandoned"] += 1  # it was not executed, and nobody says so
        else:
            await self._execute(decision, principal, who, captured=fate > 0.2)

    async def _execute(self, decision: Decision, principal: str, who: dict[str, str], captured: bool) -> None:
        """Emit, then capture; some captures never come, and some come twice."""
        assert decision.hold is not None
        used = self.dice.randint(0, decision.up_to[METER])
        self.sequence += 1
        fields = {"principal": principal, **who, "hold": decision.hold.id, "occurred_at": decision.hold.at_us}
        sent = {"source": self.source, "sequence": self.sequence, "quantities": {"calls": 1, METER: used}}
        os.write(self.file.fileno(), json.dumps({**fields, **sent}).encode() + b"\n")
        emitted = Emitted(self.source, lane(ACCOUNT), self.sequence)
        if captured:
            for _ in range(2 if self.dice.random() < 0.1 else 1):
                self.seen[await self.gate.capture(decision.hold, {METER: used}, emitted)] += 1


async def spend(url: str, journal: Path, seed: int, attempts: int) -> None:
    """A process's whole life."""
    async with Gate(
        url, deadline_s=10, grace_s=GRACE_S, holds_max=attempts + 1
    ) as gate:  # no emitter says what is settled
        spender = Spender(gate, journal, seed)
        await asyncio.gather(*(spender.spend(attempts // WORKERS) for _ in range(WORKERS)))
        spender.seen.update({f"gate {name}": n for name, n in gate.stats().items() if name in ("late", "restored")})
    journal.with_suffix(".seen").write_text(json.dumps(spender.seen))


@dataclass
class Report:
    """What came out. `breaches` says what did not hold; empty = all did."""

    breaches: list[str]
    attempts: int
    looks: int
    phantom_looks: int
    events: int
    killed: int
    expired: int
    seconds: float
    seen: dict[str, int]


class Campaign:
    """The parent: starts, kills, folds, looks."""

    def __init__(self, url: str, folder: Path, attempts: int, seed: int) -> None:
        self.url, self.folder, self.attempts = url, folder, attempts
        self.dice, self.limits = random.Random(seed), limits(attempts)
        rows = [(kind, METER, WINDOW, limit) for kind, limit in self.limits.items()]
        policy = {**counts((METER, WINDOW, list(SHARES)), limits=rows), "outage": "closed", "max_staleness_s": 3_600}
        self.log = Log(directory({ACCOUNT: policy}))
        self.log.at(int(time.time()))
        self.client = far.connect(url)
        self.view = QuotaView(far.connect(url), EPOCH, allow_volatile=True)
        self.children: dict[int, tuple[asyncio.subprocess.Process, Path]] = {}
        self.journals: dict[Path, int] = {}
        self.used: Counter[str] = Counter()
        self.folded: set[str] = set()
        """Holds whose usage is folded."""
        self.phantom_looks = 0
        self.events = self.looks = self.killed = 0
        self.breaches: list[str] = []

    async def run(self) -> Report:
        started = time.monotonic()
        await self.client.flushdb()
        await self.view.start()
        try:
            await self.view.assigned({HOME: self.log.state})
            await self._shown()
            for _ in range(PROCESSES):
                await self._start(self.attempts // PROCESSES)
            while any(child.returncode is None for child, _ in self.children.values()):
                await self._turn()
            expired = await self._settle()
        finally:
            for child, _ in self.children.values():
                if child.returncode is None:
                    child.kill()
            await self.view.close()
            await self.client.aclose()
        seconds = round(time.monotonic() - started, 1)
        return Report(
            breaches=self.breaches,
            attempts=self.attempts,
            looks=self.looks,
            phantom_looks=self.phantom_looks,
            events=self.events,
            killed=self.killed,
            expired=expired,
            seconds=seconds,
            seen=dict(self._seen()),
        )

    async def _start(self, attempts: int) -> None:
        journal = self.folder / f"journal-{len(self.journals)}.jsonl"
        journal.touch()
        self.journals[journal] = 0
        seed = str(self.dice.randrange(2**31))
        words = ("--spend", self.url, str(journal), seed, "--attempts", str(attempts))
        child = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.gate_overspend", *words)
        self.children[child.pid] = (child, journal)

    async def _turn(self) -> None:
        """Fold what was emitted, look at every scope, and now and then kill a process."""
        self._read()
        self.log.at(int(time.time()))
        self.view.note(HOME, self.log.state)
        await self._look()
        if self.events >= self.phantom_looks * self.attempts // (2 * PHANTOM_LOOKS):
            self.phantom_looks += 1
            await self._look_for_phantoms()
        due = (self.killed + 1) * self.attempts // (3 * (KILLS + 1))
        running = [(child, journal) for child, journal in self.children.values() if child.returncode is None]
        if self.killed < KILLS and self.events >= due and len(running) == PROCESSES:
            child, _ = self.dice.choice(running)
            child.send_signal(signal.SIGKILL)
            await child.wait()
            self.killed += 1
            await self._start(self.attempts // PROCESSES // 2)
        await asyncio.sleep(0)

    def _read(self) -> None:
        """New whole lines of every journal, folded; one line in ten arrives twice."""
        for journal, at in self.journals.items():
            with journal.open("rb") as file:
                file.seek(at)
                lines = file.readlines(FOLD_EVENTS * 300)
            lines = [line for line in lines if line.endswith(b"\n")]
            self.journals[journal] = at + sum(map(len, lines))
            events = [usage(ACCOUNT, **json.loads(line)) for line in lines]
            for event in events:
                for scope in self._scopes(event):
                    self.used[scope] += event["quantities"][METER]
            if events:
                self.events += len(events)
                self.folded.update(event["hold"] for event in events)
                self.log.fold(*events)

    @staticmethod
    def _scopes(event: dict[str, Any]) -> tuple[str, ...]:
        who = {"agent": event["agent"], "session": event["session"], "run": event["run"]}
        return scopes_of("user", event["principal"], **who)

    async def _look(self) -> None:
        """used + held ≤ limit in every scope, now. Between the parts of one apply a call stands in both for a moment: the gate
        is stricter then, and what it shows is not the load."""
        keys = [key async for key in self.client.scan_iter(f"{PREFIX}s:*", count=1_000)]
        for key in keys:
            scope = key.decode().partition("~")[2]
            pipe = self.client.pipeline(transaction=True)
            pipe.hmget(f"{PREFIX}m", "begun", "off")
            pipe.hmget(key, f"{BASE} u", f"{BASE} h")
            (begun, off), found = await pipe.execute()
            if begun != off:
                continue
            self.looks += 1
            load = sum(int(value or 0) for value in found)
            limit = self.limits[scope.partition(":")[0]]
            if load > limit:
                self.breaches.append(f"{scope} has {load} of {limit}")

    async def _look_for_phantoms(self) -> None:
        """Outside a running apply no hold is open whose usage is folded: it would refuse others for what is counted already."""
        await self._shown()
        waiting = {hold.decode() for hold in await self.client.zrange(f"{PREFIX}hx", 0, -1)}
        for hold in waiting & self.folded:
            if await self.client.hget(f"{PREFIX}h:{hold}", "st") in (b"H", b"C"):
                self.breaches.append(f"hold {hold} is open, although its usage is folded")

    async def _shown(self) -> None:
        """Redis shows all that is folded."""
        self.view.note(HOME, self.log.state)
        if not await self.view.drained(60):
            self.breaches.append(f"the fold does not reach Redis: {self.view.stats()}")

    async def _reached(self, ahead_s: int) -> None:
        """Log time is `ahead_s` ahead of the clock, and Redis shows it and all that is folded: without new totals it is told once
        a step, so the log ticks on until one has ended."""
        self.log.at(int(time.time()) + ahead_s)
        wanted_ms = self.log.state.log_time_ms
        await self._shown()
        async with asyncio.timeout(60):
            while int(await self.client.hget(f"{PREFIX}m", "log") or 0) < wanted_ms:
                self.log.at(int(time.time()) + ahead_s)
                self.view.note(HOME, self.log.state)
                await asyncio.sleep(0.02)

    async def _settle(self) -> int:
        """All is emitted: abandoned holds expire by log time; then the gate's figures are the fold's, and the journals'."""
        self._read()
        await self._shown()
        expired = 0
        for ahead_s in AHEAD_S:
            await self._reached(ahead_s)
            more = True
            while more:
                swept = Swept.read((await fly(self.client, [SWEEP.call(lane(ACCOUNT), 500)]))[0])
                expired, more = expired + len(swept.unsettled), swept.more
                self.log.quota.put_back_closes(lane(ACCOUNT), [hold for hold, _, _ in swept.asked])
            await self._reached(ahead_s)
        await self._look()
        folded = {scope: units for (scope, *_), units in self.log.quota.totals(ACCOUNT).items()}
        keys = [key async for key in self.client.scan_iter(f"{PREFIX}s:*", count=1_000)]
        for key in keys:
            scope = key.decode().partition("~")[2]
            shown, held = (int(value or 0) for value in await self.client.hmget(key, f"{BASE} u", f"{BASE} h"))
            wanted = (self.used[scope], self.used[scope], 0)
            if (shown, folded.get(scope, 0), held) != wanted:
                self.breaches.append(f"{scope}: gate {shown}, fold {folded.get(scope)}, held {held}; used {wanted[0]}")
        await self._ask_for_the_rest()
        return expired

    async def _ask_for_the_rest(self) -> None:
        """No phantom: what is left is granted to the unit, and not one unit more."""
        async with Gate(self.url, deadline_s=10) as gate:
            scopes = scopes_of("user", "u0", agent="a0", session="s0", run="r0")
            rest = min(self.limits[scope.partition(":")[0]] - self.used[scope] for scope in scopes)
            more = await gate.authorize(Ask(ACCOUNT, scopes, {METER: rest + 1}))
            last = await gate.authorize(Ask(ACCOUNT, scopes, {METER: rest})) if rest else more
            if more.allowed or (rest and not last.allowed):
                self.breaches.append(f"{rest} left in {scopes}: {last.verdict}; {rest + 1}: {more.verdict}")

    def _seen(self) -> Counter[str]:
        seen: Counter[str] = Counter()
        for journal in self.journals:
            if journal.with_suffix(".seen").exists():
                seen += Counter(json.loads(journal.with_suffix(".seen").read_text()))
        if seen["executed twice"]:
            self.breaches.append(f"{seen['executed twice']} calls were allowed twice")
        unanswered = {word: count for word, count in seen.items() if word.startswith("unavailable")}
        if unanswered or not seen["denied limit"]:
            self.breaches.append(f"not every call was asked for, or no limit was reached: {unanswered}, {dict(seen)}")
        return seen


async def overspend(url: str, folder: Path, attempts: int, seed: int) -> Report:
    """The whole campaign against one Redis, which it flushes."""
    return await Campaign(url, folder, attempts, seed).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gate_overspend", description=__doc__)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spend", nargs=3, metavar=("URL", "JOURNAL", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.spend:
        url, journal, seed = given.spend
        asyncio.run(spend(url, Path(journal), int(seed), given.attempts))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder))
        server.start()
        try:
            server.wait_ready()
            report = asyncio.run(overspend(server.url, Path(folder), given.attempts, given.seed))
        finally:
            server.stop()
    print(json.dumps(vars(report)))
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
