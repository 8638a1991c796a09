"""A campaign whose deployment changes its shape under load: workers, builds, the log itself. The oracle compares to the unit.

Nothing here kills at random (see `tests.prove`): what happens is a list of steps, each whole before the next. Calls are made
from before the first to after the last, however long a busy machine takes for them.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracle import Court
from tests.oracle_book import Total
from tests.oracle_sides import redis_totals
from tests.prove import Campaign
from tests.prove_emitters import Emitters
from tests.prove_gauge import Kill
from tests.prove_scale import Scale, as_told
from tollway.connectors.embedded.process import LOOPBACK, Child, poll
from tollway.streams.local import worker_child

LOOK_S = 0.5
"""How often every total in Redis is looked at: none may ever go back."""
DRIVE_S = 0.5
REST_S = 3.0
"""Calls are made for so long before the first step, between two, and behind the last."""
RATE, TRAFFIC_MAX_S = 30, 900.0
"""Calls a second of all emitters together, and how long they may go on."""
EVENTS_LEAST = 500
SLACK_S = 120.0
GROUPS = ("accounts", "audit", "stripe")


@dataclass
class Step:
    """Something that is done under load."""

    name: str
    do: Callable[["Reshaping"], object]


@dataclass
class Continuous:
    """Every total as it was seen last, and those that were seen smaller later."""

    seen: dict[Total, int] = field(default_factory=dict)
    looks: int = 0
    back: list[str] = field(default_factory=list)

    def look(self, url: str) -> None:
        found, _ = redis_totals(url)
        self.back += [
            f"redis: {total} went back from {before} to {found.get(total)}"
            for total, before in self.seen.items()
            if found.get(total, 0) < before
        ]
        self.seen, self.looks = found, self.looks + 1


def wrong(report: dict[str, Any]) -> list[str]:
    """What a campaign's report holds against it: differences to the oracle, faults, units, the audit log's verdict."""
    units = [f"{report[what]} {what}" for what in ("lost", "doubled", "overspent") if report[what]]
    audit = [] if report["audit"]["ok"] else [f"audit verify: {report['audit']}"]
    return [*map(str, report["verdict"]["differences"]), *report["faults"], *units, *audit]


class Reshaping(Campaign):
    """`steps` in order of their times; workers run all groups, so that each partition of each group moves with them."""

    def __init__(self, data: Path, seed: int, scale: Scale, steps: list[Step], progress: Callable[[str], None]) -> None:
        super().__init__(data, seed, scale, progress)
        self.steps, self.continuous = steps, Continuous()
        self.taken: dict[str, float] = {}
        """Name of a step → the seconds it took."""
        self.emitters: Emitters
        self.court: Court

    def add_worker(self, name: str, env: dict[str, str] | None = None) -> None:
        """One more, with `env` over what all have; returns when it has its partitions."""
        child = worker(self.data, name, self.scale, env)
        self.stack.supervisor.add([child])
        self.stack.wait_ready(name, SLACK_S)

    def remove_worker(self, name: str) -> None:
        """SIGTERM; it is not started again."""
        self.stack.supervisor.remove(name)

    def owned(self, name: str) -> dict[str, set[int]]:
        """group → the partitions that a worker says are its own; nothing where it does not answer."""
        port = self.stack.supervisor.child(name).env["TOLLWAY_HEALTH_PORT"]
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/health", timeout=2) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:  # red: it says why, and what it has
            found = json.load(error)
        except OSError:
            return {}
        return {group["group"]: set(group["partitions"]) for group in found["groups"]}

    def spread(self, names: list[str], partitions: int, billing: int | None = None) -> None:
        """Wait until these workers, and they alone, share every partition of every group. Raises TimeoutError.

        `billing`: partitions of the topic of meter events, where they are not as many as the log's.
        """
        counts = {**dict.fromkeys(GROUPS, partitions), "stripe": billing or partitions}
        seen: list[dict[str, set[int]]] = []
        for _ in poll(SLACK_S, DRIVE_S):
            seen = [self.owned(name) for name in names]
            if all(shared([each.get(group, set()) for each in seen], count) for group, count in counts.items()):
                return
        raise TimeoutError(f"{names} do not share {partitions} partitions: {seen}")

    def _traffic(self, court: Court) -> tuple[list[Kill], list[str]]:
        where, self.court = self.stack.endpoints, court
        self.emitters = Emitters(where.kafka_bootstrap, self.data, self.report.seed, self.scale)
        began, looked, due, left = time.monotonic(), 0.0, REST_S, list(self.steps)
        try:
            for _ in poll(self.scale.traffic_s, DRIVE_S):
                now = time.monotonic() - began
                if now >= due:
                    if not left:
                        break
                    self._take(left.pop(0))
                    due = time.monotonic() - began + REST_S
                if now - looked >= LOOK_S:
                    looked = now
                    self.continuous.look(where.redis_url)
                self._follow(court)
            wrong = [f"step {step.name!r} never came" for step in left]
            wrong += ["the emitters were done before the last step"] if self.emitters.done() else []
            self.emitters.ask_to_end()
            wrong += self.emitters.finish(SLACK_S)
        finally:
            self.emitters.kill()
        self.continuous.look(where.redis_url)
        return [], wrong + self.continuous.back

    def _take(self, step: Step) -> None:
        began = time.monotonic()
        self.progress(step.name)
        step.do(self)
        self.taken[step.name] = time.monotonic() - began
        self.progress(f"{step.name}: {self.taken[step.name]:.1f} s")

    def _shortfalls(self, verdict: Any) -> list[str]:
        """A proof over too little proves nothing."""
        found = [] if verdict.emitted >= EVENTS_LEAST else [f"{verdict.emitted} events, at least {EVENTS_LEAST}"]
        return found + ([] if self.continuous.looks > 5 else [f"Redis was looked at {self.continuous.looks} times"])


def shared(parts: list[set[int]], partitions: int) -> bool:
    """Whether each has some, none is in two, and none is missing."""
    everything = set().union(*parts)
    return all(parts) and everything == set(range(partitions)) and sum(map(len, parts)) == partitions


def modest(workers: int, partitions: int = 16) -> Scale:
    """Sixty accounts; every worker runs all groups."""
    return Scale(
        int(RATE * TRAFFIC_MAX_S),
        accounts=60,
        principals_each=5,
        traffic_s=TRAFFIC_MAX_S,
        settle_s=180.0,
        snapshot_s=30,
        partitions=partitions,
        checkpoint_s=2,
        replicas={"all": workers},
    )


def worker(data: Path, name: str, scale: Scale, env: dict[str, str] | None = None) -> Child:
    """A supervised worker of all groups."""
    child = as_told(worker_child(data, "all", name), scale)
    return Child(**{**child.__dict__, "env": {**child.env, **(env or {})}})
