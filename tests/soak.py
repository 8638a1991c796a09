"""Memory over time: the local stack at a third of its top rate, every process sampled, and none may grow.

`python -m tests.soak --minutes 20` measures the top rate, lets the stack warm up, samples for so many minutes, fits a line
through each process's memory and exits 1 where one grows by more than its noise. `--out docs/memory` keeps figures,
picture and page.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.load import METERS, World, opening, world
from tests.oracle_sides import ClickHouse
from tests.prove_gauge import Look
from tests.prove_machine import machine, served
from tests.soak_page import page
from tests.soak_picture import picture
from tests.soak_slope import slope
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.stack import Endpoints
from tollway.connectors.embedded.supervisor import children
from tollway.connectors.kafka import Admin, log_partitions, started_producer
from tollway.connectors.stripe import StripePort
from tollway.streams.bootstrap import new_command_id

ROOT = Path(__file__).resolve().parent.parent
ACCOUNTS, PRINCIPALS_EACH = 40, 5
DAYS = {"counts": [{"meter": "calls", "windows": ["d", "M"], "scopes": ["acct", "principal"]}]}
"""No minutes and no hours: the fold keeps those for hours and days, which is growth by design until the oldest go."""
BURST_S, SHARE = 20.0, 3
SAMPLE_S = 5.0
WARM_UP_MINUTES = 12.0
"""Cut off: heaps, arenas and caches fill up to their bounds first (the JVM's young generation, the engine's mark cache,
Arrow's pools, a spool's first segments), and the burst that measured the top rate is given back."""
TOUCHED = {"JAVA_TOOL_OPTIONS": "-XX:+AlwaysPreTouch"}
"""The broker's JVM takes its first heap page by page, for half an hour at this rate: touched at its start, growth shows."""
DRAINED_DEADLINE_S = 300.0
START_DEADLINE_S = 180.0
PARTS = ("kafka", "valkey", "clickhouse", "worker-accounts", "worker-audit", "worker-stripe")
Progress = Callable[[str], None]


class Soak:
    """One stack under `tollway up`, as a person starts it; the supervisor is that process."""

    def __init__(self, data: Path, minutes: float, warm_up: float, progress: Progress) -> None:
        self.data, self.minutes, self.warm_up, self.progress = data, minutes, warm_up, progress
        self.made: World = plain(world(1, ACCOUNTS, PRINCIPALS_EACH))
        self.times: list[float] = []
        self.rss: dict[str, list[float]] = {}
        self.own: dict[str, list[float]] = {}
        self.endpoints: Endpoints

    def run(self) -> dict[str, Any]:
        argv = [sys.executable, "-m", "tollway.streams.cli", "up", "--data", str(self.data), "--test-windows"]
        log = (self.data.parent / "up.log").open("w")
        up = subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT, env=os.environ | TOUCHED)
        try:
            self._await_ready(up)
            asyncio.run(self._open())
            top = self._top_rate()
            self._sample(up.pid, top / SHARE)
            return self._report(top)
        finally:
            up.terminate()
            up.wait(60)
            log.close()

    def _await_ready(self, up: "subprocess.Popen[bytes]") -> None:
        until = time.monotonic() + START_DEADLINE_S
        while any(children(self.data).get(name, {}).get("state") != "ready" for name in PARTS):
            if up.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.data.parent / "up.log").read_text()[-500:])
            time.sleep(0.5)
        self.endpoints = Endpoints.load(self.data)

    async def _open(self) -> None:
        """Meters, customers and accounts, as ops would declare them."""
        port = StripePort((self.data / "stripe" / "key").read_text().strip(), self.endpoints.stripe_url)
        try:
            for name in METERS.values():
                if name is not None:
                    await port.ensure_meter(name)
            customers = {account: await port.ensure_customer(account) for account in self.made.bound}
        finally:
            await port.close()
        partitions = await log_partitions(Admin(self.endpoints.kafka_bootstrap, {}))
        producer = await started_producer(self.endpoints.kafka_bootstrap, {})
        control = Control(producer, Signer.read(self.data / "control.key"), partitions, new_command_id)
        try:
            for account, kind, body in opening(self.made):
                real = {"customer": customers[account]} if kind == "customer.bind" else body
                await control.send(account, kind, real)
        finally:
            await producer.stop()

    def _emitter(self, name: str, rate: float, seconds: float) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "tests.soak_emitter", "--bootstrap", self.endpoints.kafka_bootstrap]
        argv += ["--spool", str(self.data / f"spool-{name}"), "--rate", str(rate), "--seconds", str(seconds)]
        argv += ["--accounts", str(ACCOUNTS), "--principals", str(PRINCIPALS_EACH)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def _top_rate(self) -> float:
        """Calls a second that the stack, emitter included, carries on this machine: a burst, until all groups are through."""
        accounts, view = Look(self.endpoints.kafka_bootstrap, "accounts"), ClickHouse(asdict(self.endpoints))
        began, burst = time.monotonic(), self._emitter("burst", 0, BURST_S)
        told = json.loads(burst.communicate(timeout=BURST_S + DRAINED_DEADLINE_S)[0])
        until, last = time.monotonic() + DRAINED_DEADLINE_S, _now(accounts).ends
        while view.count() < told["emitted"] or any(done < last[n] for n, done in _now(accounts).done.items()):
            if time.monotonic() > until:
                raise RuntimeError(f"a burst of {BURST_S:.0f} s was not worked off within {DRAINED_DEADLINE_S:.0f} s")
            time.sleep(0.5)
        seconds = time.monotonic() - began
        self.progress(
            f"top rate: {told['emitted']} calls in {seconds:.1f} s = {told['emitted'] / seconds:.0f} a second"
        )
        accounts.close()
        view.close()
        return float(told["emitted"] / seconds)

    def _sample(self, supervisor: int, rate: float) -> None:
        seconds = (self.warm_up + self.minutes) * 60
        emitter = self._emitter("soak", rate, seconds + 60)
        pids = {name: int(child["pid"]) for name, child in children(self.data).items() if name in PARTS}
        pids |= {"emitter": emitter.pid, "supervisor": supervisor}
        began = said = time.monotonic()
        try:
            while (passed := time.monotonic() - began) < seconds:
                self.times.append(passed / 60)
                for name, pid in pids.items():
                    rss, own = memory_mb(pid)
                    self.rss.setdefault(name, []).append(rss)
                    self.own.setdefault(name, []).append(own)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    shown = ", ".join(f"{name} {values[-1]:.0f}" for name, values in self.own.items())
                    self.progress(f"{passed / 60:.1f} of {seconds / 60:.0f} min at {rate:.0f}/s: MB {shown}")
                while time.monotonic() - began < len(self.times) * SAMPLE_S:
                    time.sleep(0.1)
        finally:
            emitter.terminate()
            emitter.communicate(timeout=180)

    def _report(self, top: float) -> dict[str, Any]:
        measured = [number for number, minute in enumerate(self.times) if minute >= self.warm_up]
        minutes = [self.times[number] for number in measured]
        slopes = {name: slope(minutes, [mb[number] for number in measured]) for name, mb in self.own.items()}
        resident = {name: slope(minutes, [mb[number] for number in measured]) for name, mb in self.rss.items()}
        growing = [name for name, fit in slopes.items() if fit.grows]
        title = f"Anonymous memory at {top / SHARE:,.0f} events a second, a third of {top:,.0f}"
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine() | served(self.endpoints),
            "top_rate": round(top),
            "rate": round(top / SHARE),
            "warm_up_minutes": self.warm_up,
            "minutes": round(minutes[-1] - minutes[0], 1),
            "own": {name: {**asdict(fit), "grows": fit.grows} for name, fit in slopes.items()},
            "rss": {name: {**asdict(fit), "grows": fit.grows} for name, fit in resident.items()},
            "samples_mb": {
                "minute": [round(minute, 3) for minute in self.times],
                **{name: [round(value, 1) for value in values] for name, values in self.own.items()},
            },
            "growing": growing,
            "ok": not growing,
            "svg": picture(title, self.times, dict(self.own), slopes, self.warm_up),
        }


def plain(made: World) -> World:
    """Every account counts its calls by day and month, and has a customer: units of one without wait 34 days for it."""
    bound = {name: f"cus_{name}" for name in made.accounts}
    return World(made.accounts, made.principals, bound, {}, dict.fromkeys(made.accounts, DAYS), {})


def _now(look: Look) -> Any:
    found = look.now()
    if found is None:
        raise RuntimeError("Kafka does not answer")
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident and anonymous MB of a process (Linux). Resident counts pages of mapped files too: the broker maps the indices of
    its log, which grow with the log and are the page cache's."""
    found = dict[str, float]()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, size = line.partition(":")
        found[name] = int(size.split()[0]) / 1024
    return found["Rss"], found["Anonymous"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to measure after the warm-up")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_MINUTES, help="minutes that are cut off")
    parser.add_argument("--out", type=Path, default=None, help="write <OUT>.json, <OUT>.svg and <OUT>.md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack is stopped on the way out
    began = time.monotonic()

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        sys.stderr.flush()

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = Soak(Path(folder) / "data", arguments.minutes, arguments.warm_up, progress).run()
    drawn = found.pop("svg")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        arguments.out.with_suffix(".svg").write_text(drawn)
        arguments.out.with_suffix(".md").write_text(page(found, arguments.out.name))
    print(json.dumps({name: value for name, value in found.items() if name != "samples_mb"}))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
