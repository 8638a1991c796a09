"""Kills the parts beneath the workers, and holds them away, while there is work that needs them."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.prove_gauge import Gauge, Recoveries
from tests.prove_kills import await_work
from tollway.connectors.embedded.stack import Stack

READY_DEADLINE_S = 300.0
RECOVER_DEADLINE_S = 180.0
POLL_S = 0.1


@dataclass(frozen=True)
class Outage:
    """One death of a part: when, as a share of the traffic's time, and how long it stays away."""

    part: str
    group: str
    """The group that must have work before it."""
    at: float
    away_s: float = 0.0


OUTAGES: tuple[tuple[Outage, ...], ...] = (
    (
        Outage("valkey", "accounts", 0.08),
        Outage("kafka", "accounts", 0.55),
        Outage("kafka", "accounts", 0.70, 20.0),
    ),
    (Outage("clickhouse", "audit", 0.14), Outage("clickhouse", "audit", 0.22, 60.0)),
    (Outage("stripe", "stripe", 0.17), Outage("stripe", "stripe", 0.30, 60.0)),
)
"""Three rows, each in its own time: what bills goes on while what audits is blocked."""


class Away:
    """Which parts are dead at this moment. What needs one holds it meanwhile, so that it does not die under the hand."""

    def __init__(self) -> None:
        self._lock, self._away = threading.Lock(), dict[str, int]()

    def __contains__(self, part: str) -> bool:
        return self._away.get(part, 0) > 0

    def take(self, part: str) -> None:
        with self._lock:
            self._away[part] = self._away.get(part, 0) + 1

    def give_back(self, part: str) -> None:
        with self._lock:
            self._away[part] -= 1

    @contextmanager
    def all_here(self) -> Iterator[None]:
        """No part is killed inside."""
        with self._lock:
            yield


class Breaker(threading.Thread):
    """Works through one row of outages; `failure` says why it could not."""

    def __init__(
        self, stack: Stack, row: tuple[Outage, ...], traffic_s: float, gauge: Gauge, recoveries: Recoveries, away: Away
    ) -> None:
        super().__init__(name=f"breaker.{row[0].part}", daemon=True)
        self.stack, self.row, self.traffic_s, self.away = stack, row, traffic_s, away
        self.gauge, self.recoveries = gauge, recoveries
        self.failure: str | None = None

    def run(self) -> None:
        try:
            for outage in self.row:
                self._break(outage)
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: it becomes a fault of the report
            self.failure = f"{type(error).__name__}: {error}"

    def _break(self, outage: Outage) -> None:
        while time.monotonic() - self.recoveries.began < outage.at * self.traffic_s:
            time.sleep(POLL_S)
        await_work(self.gauge, outage.group)
        self.away.take(outage.part)
        try:
            has_moved = self.gauge.watch(outage.part)
            self.stack.kill(outage.part, restart=not outage.away_s)
            how = f"SIGKILL, away {outage.away_s:.0f} s" if outage.away_s else "SIGKILL"
            doing = f"serving group {outage.group}"
            kill = self.recoveries.note(outage.group, outage.part, how, doing, has_moved, outage.away_s)
            back = time.monotonic() + outage.away_s
            while time.monotonic() < back:
                time.sleep(POLL_S)
            if outage.away_s:
                self.stack.revive(outage.part)
            self.stack.wait_ready(outage.part, READY_DEADLINE_S)
        finally:
            self.away.give_back(outage.part)
        until = time.monotonic() + RECOVER_DEADLINE_S
        while kill.recovered_s is None and time.monotonic() < until:
            time.sleep(POLL_S)


def outage_faults(breakers: list[Breaker]) -> list[str]:
    """What was to be broken and was not."""
    return [f"{breaker.name}: {breaker.failure}" for breaker in breakers if breaker.failure]
