"""What each group has done so far, partition by partition, asked of the sinks themselves; and so, when a death is over.

An effect of `accounts` is a lane's offset in Redis, of `audit` a block in ClickHouse, of `stripe` a meter event at the rail.
"""

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

import clickhouse_connect
import redis
from clickhouse_connect.driver.exceptions import ClickHouseError

from tests.oracle_wire import lane
from tests.prove_gauge import LANES, Look
from tollway.connectors.embedded.stack import Endpoints

ASK_S = 2.0
"""A sink that is away or stopped does not answer within this time; the next sample asks again."""
LOOK_S = 0.1
Marks = dict[int, int]
"""Partition → a number that grows with what is done there."""
AWAY = (redis.RedisError, ClickHouseError, HTTPException, OSError, ValueError)


@dataclass(frozen=True)
class Sample:
    """One answer. `at` = when it was asked, monotonic."""

    at: float
    marks: Marks


class Sampler(threading.Thread):
    """Asks again and again until `close`; `latest` is the newest answer."""

    def __init__(self, name: str, read: Callable[[], Marks | None], every_s: float) -> None:
        super().__init__(name=f"sampler.{name}", daemon=True)
        self._read, self._every_s = read, every_s
        self.latest = Sample(0.0, {})
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.ask()
            self._ended.wait(self._every_s)

    def ask(self) -> None:
        """Once; what is away says nothing."""
        at = time.monotonic()
        try:
            marks = self._read()
        except AWAY:
            return
        if marks is not None:
            self.latest = Sample(at, marks)

    def close(self) -> None:
        self._ended.set()
        self.join()


class Rail:
    """What the stand-in has taken, event by event, in the order in which it took it."""

    def __init__(self, url: str, account_of: dict[str, str], partitions: int) -> None:
        self._url, self._account_of, self._partitions = url, account_of, partitions
        self.events: list[dict[str, Any]] = []
        self._taken: Counter[int] = Counter()

    def read(self) -> Marks:
        with urllib.request.urlopen(f"{self._url}/_admin/events?after={len(self.events)}", timeout=ASK_S) as answer:
            found = json.load(answer)["data"]
        for event in found:
            account = self._account_of.get(event["customer"])
            if account is not None and not event["error"]:
                self._taken[lane(account) % self._partitions] += 1
        self.events += found
        return dict(self._taken)


class Effects:
    """Samplers of all groups. `due`: the deltas that the log asks for, by partition, kept up by the oracle's reader."""

    def __init__(self, where: Endpoints, account_of: dict[str, str], partitions: int) -> None:
        self.partitions = range(partitions)
        self.due: Counter[int] = Counter()
        self._redis = redis.Redis.from_url(where.redis_url, socket_timeout=ASK_S, socket_connect_timeout=ASK_S)
        self._where, self._clickhouse = where, None
        self._look = Look(where.kafka_bootstrap, "accounts")
        self.rail = Rail(where.stripe_url, account_of, partitions)
        self._ends = Sampler("ends", self._read_ends, 0.2)
        self.done = {
            "accounts": Sampler("accounts", self._read_redis, 0.15),
            "audit": Sampler("audit", self._read_clickhouse, 0.3),
            "stripe": Sampler("stripe", self.rail.read, 0.2),
        }

    def start(self) -> None:
        for sampler in (self._ends, *self.done.values()):
            sampler.start()

    def _read_ends(self) -> Marks | None:
        found = self._look.now()
        return found.ends if found else None

    def _read_redis(self) -> Marks:
        pipe = self._redis.pipeline(transaction=False)
        for number in range(LANES):
            pipe.hget(f"tw:{{{number:03d}}}:m", "off")
        found = dict.fromkeys(self.partitions, 0)
        for number, off in enumerate(pipe.execute()):
            found[number % len(found)] = max(found[number % len(found)], int(off or 0))
        return found

    def _read_clickhouse(self) -> Marks:
        if self._clickhouse is None:
            where = self._where
            self._clickhouse = clickhouse_connect.get_client(
                host=where.clickhouse_host,
                port=where.clickhouse_port,
                username=where.clickhouse_user,
                password=where.clickhouse_password,
                database=where.clickhouse_database,
                autogenerate_session_id=False,
                send_receive_timeout=ASK_S,
                connect_timeout=ASK_S,
            )
        sql = "SELECT kafka_partition, max(last_offset) + 1 FROM audit_manifest GROUP BY kafka_partition"
        rows = self._clickhouse.query(sql).result_rows  # type: ignore[attr-defined]
        return {**dict.fromkeys(self.partitions, 0), **{int(number): int(end) for number, end in rows}}

    def latest(self, group: str) -> Sample:
        """A group's newest answer."""
        return self.done[group].latest

    def lag(self, group: str, partitions: Iterable[int]) -> Marks:
        """Partition → what it has before it: records without their effect, deltas that are not at the rail. Only those > 0."""
        ends = self.due if group == "stripe" else self._ends.latest.marks
        done = self.done[group].latest.marks
        lag = {number: ends.get(number, 0) - done.get(number, 0) for number in partitions}
        return {number: count for number, count in lag.items() if count > 0}

    def close(self) -> None:
        for sampler in (self._ends, *self.done.values()):
            sampler.close()
        self._look.close()
        self._redis.close()


class Moved:
    """Whether, after a moment, each of some partitions has had a new effect. The first answer asked after it is the base."""

    def __init__(self, latest: Callable[[str], Sample], wanted: dict[str, list[int]], since: float) -> None:
        self._latest, self._since = latest, since
        self._wanted = {group: set(numbers) for group, numbers in wanted.items()}
        self._base: dict[str, Sample] = {}

    def __call__(self) -> bool:
        for group, numbers in self._wanted.items():
            latest = self._latest(group)
            if latest.at < self._since:
                continue
            base = self._base.setdefault(group, latest)
            numbers -= {number for number in numbers if latest.marks.get(number, 0) > base.marks.get(number, 0)}
        return not any(self._wanted.values())


@dataclass
class Strike:
    """One death or stop: of what, how, when, with what before it, and how long until that moved again."""

    process: str
    group: str
    how: str
    """SIGKILL, or SIGSTOP for longer than the session and then SIGCONT."""
    at_s: float
    lag: int
    """Records without effect, deltas not at the rail, or bytes in the spool, of the process's own partitions."""
    partitions: list[int]
    in_recovery: bool
    """An earlier death of its group, or of a server beneath it, was not over."""
    busy: bool
    stopped_s: float = 0.0
    overtaken: bool | None = None
    """Of a worker that was stopped: whether another had gone on with its partitions when it woke."""
    recovered_s: float | None = None
    """From the death (of a stopped one: from the stop) to the first new effect in each partition that it had, or of its successor."""
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Recoveries(threading.Thread):
    """Writes into each strike how long its work stood still."""

    def __init__(self, began: float) -> None:
        super().__init__(name="recoveries", daemon=True)
        self.began = began
        self.strikes: list[Strike] = []
        self._open: list[tuple[Strike, Callable[[], bool]]] = []
        self._lock, self._ended = threading.Lock(), threading.Event()

    def now_s(self) -> float:
        return time.monotonic() - self.began

    def add(self, strike: Strike, has_moved: Callable[[], bool]) -> None:
        """At the death, at once."""
        with self._lock:
            self.strikes.append(strike)
            self._open.append((strike, has_moved))

    def open_in(self, *groups: str) -> list[Strike]:
        """Those that are not over, of some groups."""
        with self._lock:
            return [strike for strike, _ in self._open if strike.group in groups]

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            with self._lock:
                for entry in list(self._open):
                    strike, has_moved = entry
                    if has_moved():
                        strike.recovered_s = round(self.now_s() - strike.at_s, 2)
                        self._open.remove(entry)

    def await_all(self, deadline_s: float) -> None:
        """Until all are over, or the deadline."""
        until = time.monotonic() + deadline_s
        while self.open_in(*{strike.group for strike in self.strikes}) and time.monotonic() < until:
            self._ended.wait(LOOK_S)

    def close(self) -> None:
        self._ended.set()
        self.join()
