"""The crash campaign: kill −9 and SIGSTOP/SIGCONT of every process at random moments under load, again while it recovers.

`python -m tests.crash --kills 1000 --seed 1 --out docs/crash/kills.json` looks all the while at what must hold at every moment,
compares everything at the end, and exits 0 only where nothing was lost, doubled or overspent and everything came back in time.
"""

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests import crash_tills, prove
from tests.crash_effects import Effects, Recoveries, Strike
from tests.crash_gate import TWICE
from tests.crash_lives import Services
from tests.crash_report import RECOVER_DEADLINE_S, Report, faults, in_words
from tests.crash_scale import Sizes, sizes
from tests.crash_strike import Budget, Striker, over
from tests.crash_targets import SERVERS, Server, Service, Target, Worker
from tests.crash_watch import Watch, due_by_partition, held_apart
from tests.load_poison import poisons
from tests.oracle import Court, Verdict
from tests.oracle_book import Record
from tests.prove import SHOWN_MAX, STRANGER
from tests.prove_machine import served
from tests.prove_scale import stack_of
from tests.raw_writer import RawWriter, copies, shuffled
from tollway.connectors.control import Signer
from tollway.connectors.stripe import StripePort

COPY_SHARE = 0.01
TRICKLE = 4
"""Records a second out of order, of a writer that never dies."""
TRICKLE_SEED = 1_000_000
TURN_S, PROGRESS_S = 0.4, 5.0
HOLDS_END_S, REST_S = 120.0, 3.0
"""An abandoned hold ends with its time and grace, and a sweep behind it; one whose close was lost a minute later."""
RED_MAX = 5
"""So many breaches end the strikes: what comes after them proves nothing more."""


class Campaign(prove.Campaign):
    """One stack, one seed; the parts that any campaign has are those of `tests.prove`."""

    def __init__(self, data: Path, seed: int, scale: Sizes, progress: Callable[[str], None]) -> None:
        super().__init__(data, seed, scale.of_stack(), progress)
        self.sizes, self.seed = scale, seed
        self.found = Report(seed, asdict(scale), self.report.machine, seconds=self.report.seconds)
        self.stack = stack_of(scale.of_stack(), data, self._said)
        self.services = Services(data, self.journals)
        self.deaths: Counter[str] = Counter()
        self._deltas = self._poisoned = self._trickled = 0

    def _said(self, line: str) -> None:
        """The supervisor's sentences; a child that ended by itself is counted."""
        if "ended with code" in line and "code -9" not in line:
            self.deaths[line.partition(":")[0]] += 1
        if "ready after" not in line:
            self.progress(line)

    def prove(self) -> Report:
        """All of it. Whatever ends it, no process is left."""
        timed = self._timed
        try:
            with timed("start"):
                self.stack.start()
            self.signer = Signer.read(self.data / "control.key")
            self.found.machine |= served(self.stack.endpoints)
            court = Court(asdict(self.stack.endpoints), self.journals)
            try:
                with timed("open"):
                    asyncio.run(self._open(court.log.partitions))
                with timed("strikes"):
                    strikes, wrong = self._strike(court)
                with timed("settle"):
                    verdict = court.verdict(self.sizes.settle_s, self.progress)
                    self.found.gate |= self._gate_at_rest()
                with timed("verify"):
                    self.found.audit, self.found.seals = self._audit_verify(), self._refolded()
                self._tell(strikes, wrong, verdict, court)
            finally:
                court.close()
        except BaseException:
            self.services.supervisor.hurry()  # nothing is proven any more: it need not be flushed
            raise
        finally:
            self.services.stop()
            self.stack.stop()
        return self.found

    async def _open(self, partitions: int) -> None:
        """The world, and the tills with customers of their own."""
        await super()._open(partitions)
        port = StripePort((self.data / "stripe" / "key").read_text().strip(), self.stack.endpoints.stripe_url)
        try:
            for account in crash_tills.bound(self.seed):
                self.customers[account] = await port.ensure_customer(account)
        finally:
            await port.close()
        await self._send(crash_tills.opening(self.seed), partitions)

    def _strike(self, court: Court) -> tuple[list[Strike], list[str]]:
        """Services work and processes die until the budget is spent and all has come back. What went wrong beside it."""
        where = self.stack.endpoints
        account_of = {name: account for account, name in self.customers.items()}
        effects = Effects(where, account_of, court.log.partitions)
        recoveries, budget = Recoveries(time.monotonic()), Budget(self.sizes.kills, self.sizes.plans())
        watch = Watch(court, effects.rail, self.seed)
        raw = RawWriter(where.kafka_bootstrap, self.journals / "raw.jsonl", court.log.partitions)
        strikers = self._strikers(effects, recoveries, budget)
        try:
            effects.start()
            recoveries.start()
            self._start_services()
            self._work(court, watch, effects, recoveries, raw, strikers)
            recoveries.await_all(RECOVER_DEADLINE_S)
            self.progress("services are flushed and closed")
            self.services.stop()
            raw.close()
            self._turn(court, watch, effects)
        finally:
            for striker in strikers:
                if striker.is_alive():
                    striker.close()
            recoveries.close()
            effects.close()
            watch.close()
        self.found.looks, self.found.breaches = dict(watch.looks), watch.breaches
        return recoveries.strikes, [f"{each.name}: {each.failure}" for each in strikers if each.failure]

    def _strikers(self, effects: Effects, recoveries: Recoveries, budget: Budget) -> list[Striker]:
        def target(group: str, name: str) -> Target:
            if group == SERVERS:
                return Server(self.stack, effects, name)
            if name.startswith("worker"):
                return Worker(self.stack, effects, group, name)
            return Service(self.services, group, name)

        return [
            Striker(plan, {n: target(plan.group, n) for n in plan.names}, self.seed, budget, recoveries)
            for plan in self.sizes.plans()
        ]

    def _start_services(self) -> None:
        where, scale = self.stack.endpoints, self.sizes
        emitters = [
            self.services.emitter(
                name, where, self.seed, scale.rate / scale.emitters, scale.accounts, scale.principals_each
            )
            for name in scale.emitter_names
        ]
        gates = [
            self.services.gate(name, where, self.seed, scale.gate_rate / scale.gates, scale.hold_grace_s)
            for name in scale.gate_names
        ]
        self.services.start([*emitters, *gates])

    def _work(
        self,
        court: Court,
        watch: Watch,
        effects: Effects,
        recoveries: Recoveries,
        raw: RawWriter,
        strikers: list[Striker],
    ) -> None:
        """While the strikers work: the log is followed, every side looked at, copies, stragglers and poison written."""
        began, said, looked = time.monotonic(), 0.0, 0.0
        writers = {*self.sizes.emitter_names, *self.sizes.gate_names}
        self._await_work(court, watch, effects)
        for striker in strikers:
            striker.start()
        while not over(strikers):
            passed = time.monotonic() - began
            records = self._turn(court, watch, effects, look=passed - looked > self.sizes.look_s)
            looked = passed if passed - looked > self.sizes.look_s else looked
            for copy, partition in copies(records, self.random, COPY_SHARE, writers):
                raw.write(copy, "copy", partition)
            if passed > self._trickled:
                self._trickled += 1
                for record in shuffled(self.made, TRICKLE_SEED + self._trickled, TRICKLE, time.time_ns() // 1000):
                    raw.write(record, "trickle")
            if passed > self.sizes.poison_every_s * (self._poisoned + 0.5):
                self._poison(raw)
            if passed - said > PROGRESS_S:
                said = passed
                self._say(court, recoveries, watch)
            if len(watch.breaches) > RED_MAX:
                break
            time.sleep(TURN_S)

    def _await_work(self, court: Court, watch: Watch, effects: Effects) -> None:
        """The first strikes are to fall into work: each service has written, each group has had an effect."""
        until = time.monotonic() + RECOVER_DEADLINE_S
        names = [*self.sizes.emitter_names, *self.sizes.gate_names]
        while time.monotonic() < until:
            self._turn(court, watch, effects)
            works = all(self.services.written(name) for name in names)
            if works and all(any(sampler.latest.marks.values()) for sampler in effects.done.values()):
                return
            time.sleep(TURN_S)
        raise TimeoutError(f"not everything worked within {RECOVER_DEADLINE_S:.0f} s")

    def _turn(self, court: Court, watch: Watch, effects: Effects, look: bool = True) -> list[Record]:
        """Fold what the log has grown by, look at the sides, and say which deltas are due."""
        records: list[Record] = []
        try:
            records = watch.look() if look else court.follow()
        except (KafkaException, TimeoutError) as error:
            self.progress(f"the log is not read: {error}")
        self._deltas = due_by_partition(court.book, self._deltas, effects.due, court.log.partitions)
        return records

    def _poison(self, raw: RawWriter) -> None:
        """Every reason to refuse, once."""
        forger = Signer(Ed25519PrivateKey.generate(), self.signer.kid)

        account, now_us = self.made.accounts[self._poisoned % len(self.made.accounts)], time.time_ns() // 1000
        self._poisoned += 1
        for record in poisons(account, STRANGER, now_us, self._signing(self.signer), self._signing(forger)):
            raw.write(record, "poison")

    def _say(self, court: Court, recoveries: Recoveries, watch: Watch) -> None:
        struck, away = len(recoveries.strikes), recoveries.open_in(*{plan.group for plan in self.sizes.plans()})
        self.progress(
            f"{struck} of {self.sizes.kills} strikes, {len(away)} not over"
            f" ({', '.join(sorted({strike.process for strike in away})) or 'none'});"
            f" {court.book.records} records, {sum(watch.looks.values())} looks, {len(watch.breaches)} breaches"
        )

    def _gate_at_rest(self) -> dict[str, Any]:
        """What gates hold is what open holds say; in a long campaign there are none left when their time is over."""
        until = time.monotonic() + (self.sizes.hold_grace_s + HOLDS_END_S) * self.sizes.await_holds
        while True:
            count, wrong = held_apart(self.stack.endpoints.redis_url, self.seed)
            if not count or time.monotonic() > until:
                twice = self.journals / TWICE
                calls = twice.read_text().split() if twice.exists() else []
                return {"open_holds": count, "held_apart": wrong[:SHOWN_MAX], "allowed_twice": calls[:SHOWN_MAX]}
            self.progress(f"{count} abandoned holds are still to expire")
            time.sleep(REST_S)

    def _tell(self, strikes: list[Strike], wrong: list[str], verdict: Verdict, court: Court) -> None:
        found = self.found
        found.judge(verdict, crash_tills.overspent(court.book, self.seed))
        found.tell(strikes, self.sizes.processes, dict(self.deaths))
        found.faults = [*wrong, *faults(found, verdict, self.sizes)]
        found.ok = verdict.reconciled and not found.faults and not found.breaches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1_000, help="strikes: SIGKILL, and SIGSTOP with SIGCONT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=None, help="keep everything in this new folder")
    parser.add_argument("--out", type=Path, default=None, help="write the report as JSON into this file too")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills is {arguments.kills}: give 1 or more")
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)  # it logs each question to a server that is away
    began = time.monotonic()

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        sys.stderr.flush()

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job has the first one ignored
        signal.signal(number, signal.default_int_handler)
    os.environ |= sizes(arguments.kills).of_log()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        data = arguments.data or Path(folder) / "data"
        try:
            report = Campaign(data, arguments.seed, sizes(arguments.kills), progress).prove()
        except KeyboardInterrupt:
            progress("ended by a signal: every process is stopped, nothing is proven")
            return 130
    report.driver_peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report.seconds["all"] = round(time.monotonic() - began, 1)
    shown = asdict(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(shown) + "\n")
    print(json.dumps(shown) if arguments.json else in_words(report))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
