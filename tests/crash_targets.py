"""Whom a crash campaign strikes: workers, services and servers; each says what work it has, and when that goes on."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from tests.crash_effects import Effects, Moved
from tests.crash_lives import Services, spooled_bytes
from tollway.connectors.embedded.stack import Stack

HEALTH_S = 0.3
"""A worker that is stopped does not answer within this time: what it had at its last answer counts."""
LANDED_S = 0.15
"""What a process had sent before it died has landed by then: later effects are another's."""
WRITES_S = 1.0
SERVES: dict[str, tuple[str, ...]] = {
    "kafka": ("accounts", "audit"),
    "valkey": ("accounts",),
    "clickhouse": ("audit",),
    "stripe": ("stripe",),
}
"""Server → the groups whose effects need it."""
SERVERS = "servers"
Work = tuple[list[int], int]
"""Partitions that it has, and what lies before it."""


class Target(Protocol):
    """One process under one name."""

    name: str
    group: str

    def pid(self) -> int | None: ...

    def kill(self) -> None: ...

    def work(self) -> Work: ...

    def watch(self, partitions: list[int]) -> Callable[[], bool]:
        """From now on: whether all of that work has moved again."""
        ...


class Worker:
    """A worker of one group: its health says which partitions it has loaded."""

    def __init__(self, stack: Stack, effects: Effects, group: str, name: str) -> None:
        self.stack, self.effects, self.group, self.name = stack, effects, group, name
        self._known: tuple[int | None, list[int]] = (None, [])

    def pid(self) -> int | None:
        return self.stack.pid(self.name)

    def kill(self) -> None:
        self.stack.kill(self.name)

    def work(self) -> Work:
        pid = self.pid()
        if pid != self._known[0]:
            self._known = (pid, [])
        found = _loaded(pid) if pid is not None else None
        if found is not None:
            self._known = (pid, found)
        return self._known[1], sum(self.effects.lag(self.group, self._known[1]).values())

    def watch(self, partitions: list[int]) -> Callable[[], bool]:
        wanted = partitions or list(self.effects.partitions)
        if self.group == "stripe":  # it has effects where deltas are due, and nowhere else
            wanted = list(self.effects.lag(self.group, wanted)) or list(self.effects.lag(self.group, self.effects.due))
        return Moved(self.effects.latest, {self.group: wanted}, time.monotonic() + LANDED_S)


class Service:
    """An emitter or a gate: its journal says that it works."""

    def __init__(self, services: Services, group: str, name: str) -> None:
        self.services, self.group, self.name = services, group, name

    def pid(self) -> int | None:
        return self.services.supervisor.pid(self.name)

    def kill(self) -> None:
        self.services.supervisor.kill(self.name)

    def work(self) -> Work:
        """Waits for its next write: it is struck while it works. 0 where none comes."""
        before, until = self.services.written(self.name), time.monotonic() + WRITES_S
        while time.monotonic() < until:
            if self.services.written(self.name) > before:
                return [], max(1, spooled_bytes(self.services.spool(self.name)))
            time.sleep(0.01)
        return [], 0

    def watch(self, partitions: list[int]) -> Callable[[], bool]:
        del partitions
        before = self.services.written(self.name)
        return lambda: self.services.written(self.name) > before


class Server:
    """The broker, Valkey, ClickHouse or the stand-in: the effects of those whom it serves."""

    def __init__(self, stack: Stack, effects: Effects, name: str) -> None:
        self.stack, self.effects, self.name, self.group = stack, effects, name, SERVERS

    def pid(self) -> int | None:
        return self.stack.pid(self.name)

    def kill(self) -> None:
        self.stack.kill(self.name)

    def work(self) -> Work:
        lags = [self.effects.lag(group, self.effects.partitions) for group in SERVES[self.name]]
        return list(self.effects.partitions), sum(sum(lag.values()) for lag in lags)

    def watch(self, partitions: list[int]) -> Callable[[], bool]:
        wanted = {group: list(partitions) for group in SERVES[self.name]}
        if self.name == "stripe":
            wanted["stripe"] = list(self.effects.lag("stripe", partitions))
        return Moved(self.effects.latest, wanted, time.monotonic() + LANDED_S)


def _loaded(pid: int) -> list[int] | None:
    """The partitions that a worker says it has loaded; None where it does not answer."""
    port = _health_port(pid)
    if not port:
        return None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=HEALTH_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as red:
        body = red.read()
    except (HTTPException, OSError):
        return None
    try:
        groups = json.loads(body)["groups"]
    except (ValueError, KeyError):
        return None
    return sorted(number for group in groups for number in group["partitions"])


def _health_port(pid: int) -> str:
    """As the process was told in its environment."""
    try:
        told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((each.partition(b"=")[2].decode() for each in told if each.startswith(b"TOLLWAY_HEALTH_PORT=")), "")
