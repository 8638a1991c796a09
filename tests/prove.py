"""The campaign: real processes emit, workers die at every place that matters, and the oracle compares to the unit.

`python -m tests.prove --events 50000 --seed 1 --json` prints one object and exits 0 only where nothing was lost, nothing
doubled, every poison refused for its own reason, and every failpoint hit.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from confluent_kafka import KafkaException
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.load import METERS, World, midway, opening, world
from tests.load_poison import Raw, closed_hole, poisons, unsequenced
from tests.oracle import Court, Verdict
from tests.oracle_book import Record
from tests.prove_emitters import ROOT, Emitters
from tests.prove_gauge import Gauge, Kill, Recoveries
from tests.prove_kills import FAILPOINTS, Killer, as_rows, failpoints_hit, kill_faults
from tests.prove_machine import machine, served
from tests.prove_outages import Away, Breaker, outage_faults
from tests.prove_scale import EMITTERS, THREADS, Scale, small, stack_of, whole
from tests.raw_writer import RawWriter, copies, shuffled
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.stack import Stack
from tollway.connectors.kafka import started_producer
from tollway.connectors.stripe import StripePort
from tollway.streams.bootstrap import new_command_id

COPY_SHARE, SHUFFLE_SHARE = 0.01, 0.01
EMITTER_DIES_AT, MIDWAY_AT, POISON_AT = 0.35, 0.4, 0.5
RAIL_FAILS_AT = 0.62
PROGRESS_S = 5.0
VERIFY_DEADLINE_S = 1_800
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
    scale: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    events: int = 0
    emitters: int = 0
    emitters_killed: int = 0
    accounts: int = 0
    principals: int = 0
    raw: dict[str, int] = field(default_factory=dict)
    kills: list[dict[str, Any]] = field(default_factory=list)
    failpoints: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    """Events, rows and units that must be on a side and are not, all sides together."""
    doubled: int = 0
    overspent: int = 0
    """Units at the rail beyond what was accepted."""
    verdict: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    seals: dict[str, Any] = field(default_factory=dict)
    """The log folded again from its first record: how many sealed snapshots and checkpoints it was held against."""
    faults: list[str] = field(default_factory=list)
    driver_peak_mb: int = 0
    """Largest resident size of the campaign's own process, oracle included."""
    seconds: dict[str, float] = field(default_factory=dict)
    ok: bool = False


Step = tuple[float, str, Callable[[], object]]
"""Seconds after the start, the part that it needs, what happens then."""


class Campaign:
    """One stack, one seed."""

    def __init__(self, data: Path, seed: int, scale: Scale, progress: Callable[[str], None]) -> None:
        self.data, self.scale, self.progress = data, scale, progress
        self.random, self.report = Random(seed), Report(seed, asdict(scale), machine(), accounts=scale.accounts)
        self.made: World = world(seed, scale.accounts, scale.principals_each)
        self.journals = data / "journals"
        self.journals.mkdir(parents=True)
        self.stack: Stack = stack_of(scale, data, progress)
        self.away = Away()
        self.signer: Signer
        self.customers: dict[str, str] = {}
        self.env: dict[str, str] = {}
        """Over the environment of every `tollway` that is run."""

    def run(self) -> Report:
        with self._timed("start"):
            self.stack.start()
        self.signer = Signer.read(self.data / "control.key")
        self.report.machine |= served(self.stack.endpoints)
        court = Court(asdict(self.stack.endpoints), self.journals)
        try:
            with self._timed("open"):
                asyncio.run(self._open(court.log.partitions))
            with self._timed("traffic"):
                kills, wrong = self._traffic(court)
            with self._timed("settle"):
                verdict = court.verdict(self.scale.settle_s, self.progress)
            with self._timed("verify"):
                self.report.audit = self._audit_verify()
                self.report.seals = self._refolded()
            self._conclude(kills, wrong, verdict, court)
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

    def _traffic(self, court: Court) -> tuple[list[Kill], list[str]]:
        """Emit, copy, shuffle, poison and kill, until all of it is over. Returns the kills and what went wrong."""
        where, seed = self.stack.endpoints, self.report.seed
        gauge = Gauge(where.kafka_bootstrap, where.stripe_url, where.redis_url, lambda: len(court.book.deltas))
        recoveries = Recoveries(gauge, time.monotonic())
        until_s = self.scale.traffic_s * self.scale.kill_until
        killers = [
            Killer(self.stack, group, self.scale.workers(group), seed, gauge, recoveries, until_s)
            for group in FAILPOINTS
        ]
        breakers = [
            Breaker(self.stack, row, self.scale.traffic_s, gauge, recoveries, self.away) for row in self.scale.outages
        ]
        emitters = Emitters(where.kafka_bootstrap, self.data, seed, self.scale)
        raw = RawWriter(where.kafka_bootstrap, self.journals / "raw.jsonl", court.log.partitions)
        due = self._agenda(emitters, raw, court.log.partitions, recoveries)
        try:
            for thread in (gauge, recoveries, *killers, *breakers):
                thread.start()
            wrong = self._drive(court, emitters, raw, due, [*killers, *breakers], recoveries)
            wrong += [*emitters.finish(), *recoveries.await_all()]
            raw.close()
        finally:
            emitters.kill()
            gauge.close()
        wrong += [*kill_faults(killers, recoveries.kills, self.data), *outage_faults(breakers)]
        return recoveries.kills, wrong

    def _drive(
        self,
        court: Court,
        emitters: Emitters,
        raw: RawWriter,
        due: list[Step],
        breaking: list[Killer | Breaker],
        recoveries: Recoveries,
    ) -> list[str]:
        """Once a second: what is due, copies, a trickle, and a line of progress."""
        writers = {f"e{index}t{thread}" for index in range(EMITTERS) for thread in range(THREADS)}
        said = 0.0
        while not emitters.done() or due or any(thread.is_alive() for thread in breaking):
            passed = time.monotonic() - recoveries.began
            limit_s = self.scale.traffic_s + self.scale.traffic_slack_s
            if passed > limit_s:
                return [f"emitters and kills were not done within {limit_s:.0f} s"]
            with self.away.all_here():
                while due and due[0][0] <= passed and due[0][1] not in self.away:
                    due.pop(0)[2]()
            for copy, partition in copies(self._follow(court), self.random, COPY_SHARE, writers):
                raw.write(copy, "copy", partition)
            for record in shuffled(self.made, TRICKLE_SEED + raw.written, TRICKLE, time.time_ns() // 1000):
                raw.write(record, "trickle")
            if passed - said >= PROGRESS_S:
                said = passed
                self.progress(
                    f"{passed:.0f} of {self.scale.traffic_s:.0f} s: {court.book.records} records,"
                    f" {len(recoveries.kills)} deaths, lag {recoveries.gauge.lag('accounts')} accounts,"
                    f" {recoveries.gauge.lag('audit')} audit, {recoveries.gauge.waiting('stripe')} deltas wait"
                )
            time.sleep(1.0)
        return []

    def _follow(self, court: Court) -> list[Record]:
        """Fold what the log has grown by; nothing while the broker is away."""
        try:
            return court.follow()
        except (KafkaException, TimeoutError) as error:
            self.progress(f"the log is not read: {error}")
            return []

    def _agenda(self, emitters: Emitters, raw: RawWriter, partitions: int, recoveries: Recoveries) -> list[Step]:
        """What happens besides the emitters' traffic, in order."""
        account, traffic_s = self.made.accounts[0], self.scale.traffic_s

        def now_us() -> int:
            return time.time_ns() // 1000

        def write(kind: str, records: list[Raw]) -> None:
            for record in records:
                raw.write(record, kind)

        out_of_order = shuffled(self.made, self.report.seed, int(self.scale.events * SHUFFLE_SHARE), now_us())
        holes = closed_hole(self.made.accounts[1], now_us())

        def poison() -> None:
            forger = Signer(Ed25519PrivateKey.generate(), self.signer.kid)
            write("poison", poisons(account, STRANGER, now_us(), self._signing(self.signer), self._signing(forger)))

        def replace() -> None:
            doing = emitters.replace(1)
            recoveries.note("accounts", "emitter e1", "SIGKILL", doing, lambda: emitters.journal_bytes(1, 1) > 0)

        agenda: list[Step] = [
            (traffic_s * 0.1, "kafka", lambda: write("shuffled", [r for n, r in enumerate(out_of_order) if n % HELD_BACK])),
            (traffic_s * 0.15, "kafka", lambda: write("closed hole", holes[:-2])),
            (traffic_s * RAIL_FAILS_AT, "stripe", self._rail_fails),
            (traffic_s * EMITTER_DIES_AT, "", replace),
            (traffic_s * MIDWAY_AT, "kafka", lambda: asyncio.run(self._send(midway(self.made), partitions))),
            (traffic_s * POISON_AT, "kafka", poison),
            (traffic_s * 0.8, "kafka", lambda: write("held back", [*out_of_order[::HELD_BACK], *holes[-2:]])),
            (traffic_s * 0.6, "kafka", lambda: write("unsequenced", unsequenced(self.made.accounts[2], now_us(), 60))),
        ]  # fmt: skip
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
        self.progress("audit verify")
        found = self._tollway("audit", "verify")
        return {**found, "faults": found.get("faults", [])[:SHOWN_MAX], "chains": len(found.get("chains", []))}

    def _refolded(self) -> dict[str, Any]:
        """`tollway rebuild checkpoints --dry-run`: what the workers sealed between their deaths, and what the log gives."""
        found = self._tollway("rebuild", "checkpoints", "--dry-run", "--from", "log")
        rows = found.pop("partitions", [])
        boundaries = [
            {**each, "group": row["group"], "partition": row["partition"]} for row in rows for each in row["boundaries"]
        ]
        sealed = sum(each["what"] != "checkpoint" for each in boundaries)
        return {**found, "sealed": sealed, "different": [each for each in boundaries if not each["equal"]][:SHOWN_MAX]}

    def _tollway(self, *words: str) -> dict[str, Any]:
        argv = [sys.executable, "-m", "tollway.streams.cli", *words, "--data", str(self.data), "--json"]
        env = {**os.environ, **self.env}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=VERIFY_DEADLINE_S, cwd=ROOT, env=env)
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return {"ok": False, "error": done.stderr[-500:]}
        return found

    def _conclude(self, kills: list[Kill], wrong: list[str], verdict: Verdict, court: Court) -> None:
        report = self.report
        report.kills, report.failpoints = as_rows(kills), failpoints_hit(self.data)
        report.events, report.emitters = verdict.emitted, EMITTERS
        report.emitters_killed, report.raw = verdict.lives_killed, verdict.raw
        report.principals = len(court.book.principals)
        report.lost, report.doubled = sum(verdict.lost.values()), sum(verdict.doubled.values())
        report.overspent = verdict.doubled.get("stripe_units", 0)
        report.verdict = {**asdict(verdict), "differences": verdict.differences[:SHOWN_MAX]}
        report.verdict |= {"reconciled": verdict.reconciled, "differences_all": len(verdict.differences)}
        report.faults = [*wrong, *self._shortfalls(verdict)]
        if not report.audit.get("ok"):
            report.faults.append(f"audit verify is red: {report.audit.get('faults') or report.audit}")
        if not report.seals.get("ok"):
            report.faults.append(f"the log folded again is another: {report.seals}")
        report.ok = verdict.reconciled and not report.faults

    def _shortfalls(self, verdict: Verdict) -> list[str]:
        """The campaign must have done what it says: a proof over too little proves nothing."""
        report = self.report
        refused = Counter(report.raw)
        least = {
            "events": (report.events, self.scale.events),
            "principals": (report.principals, self.scale.accounts * self.scale.principals_each),
            "copies and duplicates": (verdict.duplicates, int(self.scale.events * COPY_SHARE / 2)),
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
    parser.add_argument("--whole", action="store_true", help="1,000 accounts, two replicas, and every part dies too")
    parser.add_argument("--data", type=Path, default=None, help="keep everything in this new folder")
    parser.add_argument("--out", type=Path, default=None, help="write the report as JSON into this file too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        sys.stderr.flush()

    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        data = arguments.data or Path(folder) / "data"
        scale = (whole if arguments.whole else small)(arguments.events)
        report = Campaign(data, arguments.seed, scale, progress).run()
    report.driver_peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report.seconds["all"] = round(time.monotonic() - began, 1)
    shown = asdict(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(shown) + "\n")
    print(json.dumps(shown) if arguments.json else "\n".join(f"{name}: {value}" for name, value in shown.items()))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
