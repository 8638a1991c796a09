"""The campaign: real processes emit, workers die at every place that matters, and the oracle compares to the unit.

`python -m tests.prove --events 50000 --seed 1 --json` prints one object and exits 0 only where nothing was lost, nothing
doubled, every poison refused for its own reason, and every failpoint hit.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.load import METERS, World, midway, opening, world
from tests.load_poison import Raw, closed_hole, poisons, unsequenced
from tests.oracle import Court, Verdict
from tests.oracle_journal import emitted, raw_counts, read_journals
from tests.prove_kills import FAILPOINTS, Killer, as_rows, failpoints_hit, kill_faults
from tests.raw_writer import RawWriter, copies, shuffled
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.stack import Stack
from tollway.connectors.kafka import started_producer
from tollway.connectors.stripe import StripePort
from tollway.streams.bootstrap import new_command_id
from tollway.streams.local import local_stack

ROOT = Path(__file__).resolve().parent.parent
EMITTERS, THREADS = 3, 2
ACCOUNTS, PRINCIPALS_EACH = 220, 10
TRAFFIC_S = 90.0
"""The emitters are paced to make their calls in this time: kills fall into traffic, not behind it."""
COPY_SHARE, SHUFFLE_SHARE = 0.01, 0.01
EMITTER_DIES_AT, MIDWAY_AT, POISON_AT = 0.35, 0.4, 0.5
TRAFFIC_DEADLINE_S, SETTLE_DEADLINE_S = 400.0, 240.0
HELD_BACK = 10
"""Every so manieth of the shuffled records comes a minute after its neighbours: its hole outlives several workers."""
TRICKLE_SEED = 1_000_000
"""Beyond any campaign's own seed: two writers of one seed would have one name."""
TRICKLE = 20
"""Records a second that go on until the last kill, so that every worker dies with work before it."""
RAIL_FAULTS = {"accept_drop": 5, "accept_500": 5, "500": 5, "drop": 5, "429": 10}
STRANGER = "org-nobody-opened"
SHOWN_MAX = 20


@dataclass
class Report:
    """What a campaign found; `ok` only where there is no fault and the verdict is reconciled."""

    seed: int
    events: int = 0
    emitters: int = 0
    emitters_killed: int = 0
    accounts: int = 0
    principals: int = 0
    raw: dict[str, int] = field(default_factory=dict)
    kills: list[dict[str, Any]] = field(default_factory=list)
    failpoints: dict[str, int] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    ok: bool = False


class Emitters:
    """The emitting processes, and the successor of the one that is killed."""

    def __init__(self, bootstrap: str, folder: Path, seed: int, events: int, seconds: float) -> None:
        self.bootstrap, self.folder, self.seed = bootstrap, folder, seed
        self.each = -(-events // (EMITTERS * THREADS))
        self.rate = self.each * THREADS / seconds
        self.running = {f"e{index}": self._start(index, 0) for index in range(EMITTERS)}
        self.killed: list[str] = []

    def _start(self, index: int, life: int) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "tests.emitter_process", "--bootstrap", self.bootstrap, "--name", f"e{index}"]
        argv += ["--spool", str(self.folder / f"spool-e{index}"), "--journals", str(self.folder / "journals")]
        argv += ["--index", str(index), "--life", str(life), "--seed", str(self.seed), "--events", str(self.each)]
        argv += ["--threads", str(THREADS), "--writers", str(EMITTERS * THREADS), "--rate", str(self.rate)]
        argv += ["--accounts", str(ACCOUNTS), "--principals", str(PRINCIPALS_EACH)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def replace(self, index: int) -> None:
        """kill −9, and a successor on the same spool."""
        dying = self.running[f"e{index}"]
        if dying.poll() is not None:
            raise RuntimeError(f"emitter e{index} had ended before it could be killed")
        dying.send_signal(signal.SIGKILL)
        dying.wait()
        self.killed.append(f"e{index}")
        self.running[f"e{index}"] = self._start(index, 1)

    def done(self) -> bool:
        return all(process.poll() is not None for process in self.running.values())

    def finish(self) -> list[str]:
        """What is wrong with their ends."""
        wrong = []
        for name, process in self.running.items():
            try:
                out, _ = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                wrong.append(f"{name} did not end")
                continue
            if process.returncode:
                wrong.append(f"{name} ended with {process.returncode}: {out[-300:]}")
        return wrong

    def kill(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


class Campaign:
    """One stack, one seed."""

    def __init__(self, data: Path, seed: int, events: int, progress: Callable[[str], None]) -> None:
        self.data, self.events, self.progress = data, events, progress
        self.random, self.report = Random(seed), Report(seed, accounts=ACCOUNTS)
        self.made: World = world(seed, ACCOUNTS, PRINCIPALS_EACH)
        self.journals = data / "journals"
        self.journals.mkdir(parents=True)
        self.stack: Stack = local_stack(data, progress, test_windows=True)
        self.signer: Signer
        self.customers: dict[str, str] = {}

    def run(self) -> Report:
        with self._timed("start"):
            self.stack.start()
        self.signer = Signer.read(self.data / "control.key")
        court = Court(asdict(self.stack.endpoints), self.journals)
        try:
            with self._timed("open"):
                asyncio.run(self._open(court.log.partitions))
            with self._timed("traffic"):
                killers, wrong = self._traffic(court)
            with self._timed("settle"):
                verdict = court.verdict(SETTLE_DEADLINE_S, self.progress)
            with self._timed("verify"):
                self.report.audit = self._audit_verify()
            self._conclude(killers, wrong, verdict, court)
        finally:
            court.close()
            self.stack.stop()
        return self.report

    async def _open(self, partitions: int) -> None:
        """Meters and customers at the rail; meters, prices, accounts, binds and policies in the log."""
        key = (self.data / "stripe" / "key").read_text().strip()
        port = StripePort(key, self.stack.endpoints.stripe_url)
        try:
            for name in METERS.values():
                if name is not None:
                    await port.ensure_meter(name)
            for account in [*self.made.bound, *self.made.late_bound]:
                self.customers[account] = await port.ensure_customer(account)
        finally:
            await port.close()
        await self._send(opening(self.made), partitions)

    async def _send(self, commands: list[tuple[str, str, dict[str, Any]]], partitions: int) -> None:
        producer = await started_producer(self.stack.endpoints.kafka_bootstrap, {})
        control = Control(producer, self.signer, partitions, new_command_id)
        try:
            for account, kind, body in commands:
                real = {"customer": self.customers[account]} if kind == "customer.bind" else body
                await control.send(account, kind, real)
        finally:
            await producer.stop()

    def _traffic(self, court: Court) -> tuple[list[Killer], list[str]]:
        """Emit, copy, shuffle, poison and kill, until all of it is over."""
        bootstrap, partitions = self.stack.endpoints.kafka_bootstrap, court.log.partitions
        began = time.monotonic()
        emitters = Emitters(bootstrap, self.data, self.report.seed, self.events, TRAFFIC_S)
        raw = RawWriter(bootstrap, self.journals / "raw.jsonl", partitions)
        killers = [Killer(self.stack, group, self.report.seed, began) for group in FAILPOINTS]
        due = self._agenda(emitters, raw, partitions)
        writers = {f"e{index}t{thread}" for index in range(EMITTERS) for thread in range(THREADS)}
        wrong: list[str] = []
        try:
            for killer in killers:
                killer.start()
            while not emitters.done() or due or any(killer.is_alive() for killer in killers):
                passed = time.monotonic() - began
                if passed > TRAFFIC_DEADLINE_S:
                    wrong += [f"emitters and kills were not done within {TRAFFIC_DEADLINE_S:.0f} s"]
                    break
                while due and due[0][0] <= passed:
                    due.pop(0)[1]()
                for copy, partition in copies(court.follow(), self.random, COPY_SHARE, writers):
                    raw.write(copy, "copy", partition)
                for record in shuffled(self.made, TRICKLE_SEED + raw.written, TRICKLE, time.time_ns() // 1000):
                    raw.write(record, "trickle")
                self.progress(
                    f"{passed:.0f} s: {court.book.records} records, {sum(len(k.kills) for k in killers)} kills"
                )
                time.sleep(1.0)
            wrong += emitters.finish()
            raw.close()
        finally:
            emitters.kill()
        return killers, wrong

    def _agenda(self, emitters: Emitters, raw: RawWriter, partitions: int) -> list[tuple[float, Callable[[], object]]]:
        """(seconds after the start, what happens then), in order."""
        account = self.made.accounts[0]

        def now_us() -> int:
            return time.time_ns() // 1000

        def write(kind: str, records: list[Raw]) -> None:
            for record in records:
                raw.write(record, kind)

        out_of_order = shuffled(self.made, self.report.seed, int(self.events * SHUFFLE_SHARE), now_us())
        holes = closed_hole(self.made.accounts[1], now_us())

        def poison() -> None:
            forger = Signer(Ed25519PrivateKey.generate(), self.signer.kid)
            write("poison", poisons(account, STRANGER, now_us(), self._signing(self.signer), self._signing(forger)))

        agenda: list[tuple[float, Callable[[], object]]] = [
            (TRAFFIC_S * 0.1, lambda: write("shuffled", [r for n, r in enumerate(out_of_order) if n % HELD_BACK])),
            (TRAFFIC_S * 0.15, lambda: write("closed hole", holes[:-2])),
            (TRAFFIC_S * 0.3, self._rail_fails),
            (TRAFFIC_S * EMITTER_DIES_AT, lambda: emitters.replace(1)),
            (TRAFFIC_S * MIDWAY_AT, lambda: asyncio.run(self._send(midway(self.made), partitions))),
            (TRAFFIC_S * POISON_AT, poison),
            (TRAFFIC_S * 0.8, lambda: write("held back", [*out_of_order[::HELD_BACK], *holes[-2:]])),
            (TRAFFIC_S * 0.6, lambda: write("unsequenced", unsequenced(self.made.accounts[2], now_us(), 60))),
        ]
        return sorted(agenda, key=lambda entry: entry[0])

    def _rail_fails(self) -> None:
        """The rail answers badly, and takes events whose answer is lost: each may be billed once all the same."""
        for fault, count in RAIL_FAULTS.items():
            body = json.dumps({"fault": fault, "count": count}).encode()
            asked = urllib.request.Request(f"{self.stack.endpoints.stripe_url}/_admin/faults", data=body, method="POST")
            with urllib.request.urlopen(asked, timeout=10) as answer:
                answer.read()

    @staticmethod
    def _signing(signer: Signer) -> Callable[[bytes], list[tuple[str, bytes]]]:
        return lambda value: [("sig", signer.sign(value)), ("kid", signer.kid.encode())]

    def _audit_verify(self) -> dict[str, Any]:
        """`tollway audit verify --json`, as ops would run it."""
        argv = [sys.executable, "-m", "tollway.streams.cli", "audit", "verify", "--data", str(self.data), "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return {"ok": False, "error": done.stderr[-500:]}
        return {**found, "faults": found.get("faults", [])[:SHOWN_MAX], "chains": len(found.get("chains", []))}

    def _conclude(self, killers: list[Killer], wrong: list[str], verdict: Verdict, court: Court) -> None:
        report, journals = self.report, read_journals(self.journals)
        report.kills, report.failpoints = as_rows(killers), failpoints_hit(self.data)
        report.events, report.emitters = emitted(journals), EMITTERS
        report.emitters_killed = sum(1 for journal in journals if not journal.ended)
        report.principals = len({(row.event["account"], row.event["principal"]) for row in court.book.rows})
        report.raw = raw_counts(journals)
        report.verdict = {**asdict(verdict), "differences": verdict.differences[:SHOWN_MAX]}
        report.verdict |= {"reconciled": verdict.reconciled, "differences_all": len(verdict.differences)}
        report.faults = [*wrong, *kill_faults(killers, self.data), *self._shortfalls(verdict)]
        if not report.audit.get("ok"):
            report.faults.append(f"audit verify is red: {report.audit.get('faults') or report.audit}")
        report.ok = verdict.reconciled and not report.faults

    def _shortfalls(self, verdict: Verdict) -> list[str]:
        """The campaign must have done what it says: a proof over too little proves nothing."""
        report = self.report
        refused = Counter(report.raw)
        least = {
            "events": (report.events, self.events),
            "principals": (report.principals, 2_000),
            "copies and duplicates": (verdict.duplicates, int(self.events * COPY_SHARE / 2)),
            "dead letters": (sum(verdict.dead_letters.values()), 40),
        }
        wrong = [
            f"{name}: {found}, must be at least {wanted}" for name, (found, wanted) in least.items() if found < wanted
        ]
        for reason, count in refused.items():
            if reason not in ("accepted", "duplicate") and verdict.dead_letters.get(reason, 0) != count:
                wrong.append(f"dead letters `{reason}`: {verdict.dead_letters.get(reason, 0)}, written {count}")
        return wrong

    def _timed(self, name: str) -> "_Timed":
        return _Timed(self.report.seconds, name)


class _Timed:
    """Adds the seconds of a block to a report."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = round(time.monotonic() - self.began, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50_000, help="calls of emit()")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=None, help="keep everything in this new folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")

    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        data = arguments.data or Path(folder) / "data"
        report = Campaign(data, arguments.seed, arguments.events, progress).run()
    shown = asdict(report)
    print(json.dumps(shown) if arguments.json else "\n".join(f"{name}: {value}" for name, value in shown.items()))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
