"""Kills each worker at named failpoints and at random moments, and asks it to stop, always with work before it."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from tests.prove_gauge import Gauge, Kill, Recoveries
from tollway.connectors.embedded.stack import Stack

FAILPOINTS: dict[str, dict[str, range]] = {
    "accounts": {
        "accounts.before_effects": range(1, 12),
        "accounts.between_effects": range(1, 2),
        "accounts.after_effects": range(1, 12),
        "accounts.before_checkpoint": range(1, 8),
        "accounts.after_checkpoint": range(1, 8),
    },
    "audit": {
        "audit.before_effects": range(1, 3),
        "audit.between_effects": range(1, 3),
        "audit.after_effects": range(1, 3),
        "audit.before_checkpoint": range(1, 5),
        "audit.after_checkpoint": range(1, 5),
    },
    "stripe": {
        "stripe.after_attempts": range(1, 6),
        "stripe.after_calls": range(20, 30),
        "stripe.before_checkpoint": range(1, 6),
        "stripe.after_checkpoint": range(1, 6),
    },
}
"""group → failpoint → the passes at which it may kill: the seed chooses one."""
REST_EVERY = 3
"""A supervisor gives up what fails six times in a row: after this many failpoints comes a kill that it is told of."""
HIT_DEADLINE_S = 300.0
"""Longer than any part is held away, and than the time until the next flush brings the sender work."""
READY_DEADLINE_S = 300.0
GONE_DEADLINE_S = 15.0
WORK_DEADLINE_S = 300.0
DEAD_SEEN_S, WORK_SEEN_S = 0.5, 10.0
POLL_S = 0.02


class Killer(threading.Thread):
    """Works through one group's plan; what it did stands in `recoveries.kills`, `failure` says why it could not.

    `workers` = the names of the group's replicas. The plan is begun anew until `until_s` seconds after `recoveries.began`.
    """

    def __init__(
        self,
        stack: Stack,
        group: str,
        workers: Sequence[str],
        seed: int,
        gauge: Gauge,
        recoveries: Recoveries,
        until_s: float = 0.0,
    ) -> None:
        super().__init__(name=f"killer.{group}", daemon=True)
        self.stack, self.group, self.workers = stack, group, workers
        self.gauge, self.recoveries, self.until_s = gauge, recoveries, until_s
        self.random = Random(f"{seed}/{group}")
        self.armed = stack.data / f"failpoint.{group}"
        self.failure: str | None = None

    def _plan(self) -> list[str]:
        """A worker reads its failpoint when it starts: the kill before it is what arms it."""
        names = list(FAILPOINTS[self.group])
        self.random.shuffle(names)
        plan: list[str] = []
        for number, name in enumerate(names):
            plan += ["SIGKILL"] * (number % REST_EVERY == 0) + [name]
        return [*plan, "SIGTERM"]

    def _arm(self, how: str) -> None:
        if how in FAILPOINTS[self.group]:
            passes = self.random.choice(FAILPOINTS[self.group][how])
            part = self.armed.with_suffix(self.armed.suffix + ".new")
            part.write_text(f"{how}:{passes}")
            part.rename(self.armed)

    def run(self) -> None:
        try:
            self._work_through(self._plan())
            while time.monotonic() - self.recoveries.began < self.until_s:
                self._work_through(self._plan())
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: it becomes a fault of the report
            self.failure = f"{type(error).__name__}: {error}"

    def _work_through(self, plan: list[str]) -> None:
        for how, following in zip(plan, [*plan[1:], ""], strict=True):
            if how in FAILPOINTS[self.group]:
                self._await_hit(how, following)
            else:
                self._strike(how, following)

    def _await_hit(self, name: str, following: str) -> None:
        """The file goes when the failpoint is hit; the next one is armed before the supervisor starts the next life."""
        until = time.monotonic() + HIT_DEADLINE_S
        while self.armed.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"failpoint {name} was not hit within {HIT_DEADLINE_S:.0f} s")
            time.sleep(POLL_S)
        self._arm(following)
        died = self._who_died()
        self._until_seen()
        self._note(died, name, "at that place in its loop")

    def _until_seen(self) -> None:
        """The gauge looks now and then: what a worker that died in its loop has left undone is seen at its next look."""
        until = time.monotonic() + WORK_SEEN_S
        while not self.gauge.is_busy(self.group) and time.monotonic() < until:
            time.sleep(POLL_S)

    def _who_died(self) -> str:
        """Any replica may have read the file; the supervisor starts the dead one again a moment later."""
        until = time.monotonic() + DEAD_SEEN_S
        while time.monotonic() < until:
            for worker in self.workers:
                if self.stack.pid(worker) is None:
                    return worker
            time.sleep(POLL_S)
        return f"worker-{self.group}"

    def _strike(self, how: str, following: str) -> None:
        """At a random moment with work before the worker."""
        worker = self.random.choice(self.workers)
        pid = self._running_for(worker, self.random.uniform(0.5, 4.0))
        self._arm(following)
        if how == "SIGKILL":
            self.stack.kill(worker)
        else:
            os.kill(pid, signal.SIGTERM)
        self._note(worker, how, "running")
        self._await_gone(worker, pid)
        if (
            following not in FAILPOINTS[self.group]
        ):  # a life that dies before it is ready is followed by the next at once
            self.stack.wait_ready(worker, READY_DEADLINE_S)

    def _running_for(self, worker: str, seconds: float) -> int:
        """Process id of a worker that has been ready for a while and has work before it."""
        while True:
            for each in self.workers:  # a replica that is starting would be armed as well
                self.stack.wait_ready(each, READY_DEADLINE_S)
            pid = self.stack.pid(worker)
            time.sleep(seconds)
            await_work(self.gauge, self.group)
            if pid is not None and pid == self.stack.pid(worker):
                return pid

    def _await_gone(self, worker: str, pid: int) -> None:
        until = time.monotonic() + GONE_DEADLINE_S
        while self.stack.pid(worker) == pid:
            if time.monotonic() > until:
                raise TimeoutError(f"{worker} still ran {GONE_DEADLINE_S:.0f} s after it was to end")
            time.sleep(POLL_S)

    def _note(self, worker: str, how: str, doing: str) -> None:
        self.recoveries.note(self.group, worker, how, doing, self.gauge.watch(self.group))


def await_work(gauge: Gauge, group: str) -> None:
    """Raises TimeoutError where a group stays idle."""
    until = time.monotonic() + WORK_DEADLINE_S
    while not gauge.is_busy(group):
        if time.monotonic() > until:
            raise TimeoutError(f"{group} had no work within {WORK_DEADLINE_S:.0f} s")
        time.sleep(POLL_S)


def failpoints_hit(data: Path) -> dict[str, int]:
    """Failpoint → times it was hit, by what the dying workers wrote into their logs."""
    found: dict[str, int] = {}
    for group, names in FAILPOINTS.items():
        texts = [path.read_text(errors="replace") for path in (data / "log").glob(f"worker-{group}*.log*")]
        found |= {name: sum(text.count(f"failpoint {name} hit") for text in texts) for name in names}
    return found


def kill_faults(killers: list[Killer], kills: list[Kill], data: Path) -> list[str]:
    """What the campaign was to do and did not."""
    wrong = [f"{killer.group}: {killer.failure}" for killer in killers if killer.failure]
    wrong += [f"failpoint {name} was never hit" for name, times in failpoints_hit(data).items() if not times]
    for killer in killers:
        done = [kill.how for kill in kills if kill.group == killer.group and kill.process in killer.workers]
        wrong += [f"{killer.group}: no {how}" for how in ("SIGKILL", "SIGTERM") if how not in done]
    return wrong + [f"{kill.process}: {kill.how} at {kill.at_s} s hit an idle process" for kill in kills if kill.idle]


def as_rows(kills: list[Kill]) -> list[dict[str, Any]]:
    """All kills in the order in which they happened."""
    return sorted((asdict(kill) for kill in kills), key=lambda row: row["at_s"])
