"""Kills each worker at named failpoints and at random moments, and asks it to stop, always with work before it."""

import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tollway.connectors.embedded.stack import Stack

TOPICS = {"accounts": "usage.events", "audit": "usage.events", "stripe": "billing.meter_events"}
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
HIT_DEADLINE_S = 120.0
READY_DEADLINE_S = 120.0
GONE_DEADLINE_S = 15.0
LAG_DEADLINE_S = 60.0
POLL_S = 0.02


@dataclass(frozen=True)
class Kill:
    """One death of a worker: how, when, and how much work lay before it."""

    group: str
    how: str
    at_s: float
    lag: int


class Lag:
    """Records that a group has not committed yet."""

    def __init__(self, bootstrap: str, group: str) -> None:
        self.topic = TOPICS[group]
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"tollway.{group}",
                "enable.auto.commit": False,
                "log_level": 2,
            }
        )
        count = len(self.consumer.list_topics(self.topic, timeout=15).topics[self.topic].partitions)
        self.partitions = [TopicPartition(self.topic, number) for number in range(count)]

    def now(self) -> int:
        """End offsets less committed ones."""
        try:
            committed = self.consumer.committed(self.partitions, timeout=15)
        except KafkaException:
            return -1  # the coordinator is busy with a rebalance
        ends = (self.consumer.get_watermark_offsets(each, timeout=15)[1] for each in self.partitions)
        return sum(end - max(0, done.offset) for end, done in zip(ends, committed, strict=True))

    def close(self) -> None:
        self.consumer.close()


class Killer(threading.Thread):
    """Works through one group's plan; `kills` says what happened, `failure` why it could not."""

    def __init__(self, stack: Stack, group: str, seed: int, began: float) -> None:
        super().__init__(name=f"killer.{group}", daemon=True)
        self.stack, self.group, self.began = stack, group, began
        self.worker = f"worker-{group}"
        self.random = Random(f"{seed}/{group}")
        self.plan = self._plan()
        self.armed = stack.data / f"failpoint.{group}"
        self.kills: list[Kill] = []
        self.failure: str | None = None
        self.lag: Lag | None = None

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
        self.lag = Lag(self.stack.endpoints.kafka_bootstrap, self.group)
        try:
            for number, how in enumerate(self.plan):
                following = self.plan[number + 1] if number + 1 < len(self.plan) else ""
                if how in FAILPOINTS[self.group]:
                    self._await_hit(how, following)
                else:
                    self._strike(how, following)
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: it becomes a fault of the report
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.lag.close()

    def _await_hit(self, name: str, following: str) -> None:
        """The file goes when the failpoint is hit; the next one is armed before the supervisor starts the next life."""
        until = time.monotonic() + HIT_DEADLINE_S
        while self.armed.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"failpoint {name} was not hit within {HIT_DEADLINE_S:.0f} s")
            time.sleep(POLL_S)
        self._arm(following)
        self._note(name)

    def _strike(self, how: str, following: str) -> None:
        """At a random moment with lag before the worker."""
        pid = self._running_for(self.random.uniform(0.5, 4.0))
        self._arm(following)
        if how == "SIGKILL":
            self.stack.kill(self.worker)
        else:
            os.kill(pid, signal.SIGTERM)
        self._note(how)
        self._await_gone(pid)
        self.stack.wait_ready(self.worker, READY_DEADLINE_S)

    def _running_for(self, seconds: float) -> int:
        """Process id of a worker that has been ready for a while and has work before it."""
        while True:
            self.stack.wait_ready(self.worker, READY_DEADLINE_S)
            pid = self.stack.pid(self.worker)
            time.sleep(seconds)
            self._await_lag()
            if pid is not None and pid == self.stack.pid(self.worker):
                return pid

    def _await_gone(self, pid: int) -> None:
        until = time.monotonic() + GONE_DEADLINE_S
        while self.stack.pid(self.worker) == pid:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.worker} still ran {GONE_DEADLINE_S:.0f} s after it was to end")
            time.sleep(POLL_S)

    def _await_lag(self) -> None:
        until = time.monotonic() + LAG_DEADLINE_S
        while self.lag is not None and self.lag.now() <= 0:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.group} had no lag within {LAG_DEADLINE_S:.0f} s")
            time.sleep(POLL_S)

    def _note(self, how: str) -> None:
        lag = self.lag.now() if self.lag is not None else -1
        self.kills.append(Kill(self.group, how, round(time.monotonic() - self.began, 1), lag))


def failpoints_hit(data: Path) -> dict[str, int]:
    """Failpoint → times it was hit, by what the dying workers wrote into their logs."""
    found: dict[str, int] = {}
    for group, names in FAILPOINTS.items():
        texts = [path.read_text(errors="replace") for path in (data / "log").glob(f"worker-{group}.log*")]
        found |= {name: sum(text.count(f"failpoint {name} hit") for text in texts) for name in names}
    return found


def kill_faults(killers: list[Killer], data: Path) -> list[str]:
    """What the campaign was to do and did not."""
    wrong = [f"{killer.group}: {killer.failure}" for killer in killers if killer.failure]
    wrong += [f"failpoint {name} was never hit" for name, times in failpoints_hit(data).items() if not times]
    for killer in killers:
        done = [kill.how for kill in killer.kills]
        wrong += [f"{killer.group}: no {how}" for how in ("SIGKILL", "SIGTERM") if how not in done]
        wrong += [
            f"{kill.group}: {kill.how} at {kill.at_s} s had no lag before it" for kill in killer.kills if not kill.lag
        ]
    return wrong


def as_rows(killers: list[Killer]) -> list[dict[str, Any]]:
    """All kills in the order in which they happened."""
    return sorted((asdict(kill) for killer in killers for kill in killer.kills), key=lambda row: row["at_s"])
