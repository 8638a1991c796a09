"""How much work lies before each part of a campaign, and how long after its death that work moves again."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import redis
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

TOPICS = {"accounts": "usage.events", "audit": "usage.events", "stripe": "billing.meter_events"}
SAMPLE_S = 0.3
ASK_S = 5.0
"""A broker that is away does not answer within this time; the next sample asks again."""
RECOVER_DEADLINE_S = 180.0
LANES = 256


@dataclass(frozen=True)
class Reading:
    """One look at a group: next offsets of its log, and those it has committed."""

    at: float
    ends: dict[int, int]
    done: dict[int, int]

    @property
    def lag(self) -> int:
        return sum(self.ends.values()) - sum(self.done.values())

    @property
    def behind(self) -> dict[int, int]:
        """Committed offsets of the partitions that have work before them."""
        return {number: done for number, done in self.done.items() if done < self.ends[number]}


class Look:
    """Asks the broker for one group."""

    def __init__(self, bootstrap: str, group: str) -> None:
        self.topic, settings = TOPICS[group], {"bootstrap.servers": bootstrap, "log_level": 0}
        self.admin = AdminClient(settings)
        self.consumer = Consumer({**settings, "group.id": f"tollway.{group}", "enable.auto.commit": False})
        listed = self.admin.list_topics(self.topic, timeout=15).topics[self.topic].partitions
        self.partitions = [TopicPartition(self.topic, number) for number in listed]

    def now(self) -> Reading | None:
        """None where the broker does not answer."""
        try:
            committed = self.consumer.committed(self.partitions, timeout=ASK_S)
            asked = {each: OffsetSpec.latest() for each in self.partitions}
            asking = self.admin.list_offsets(asked, request_timeout=ASK_S)
            ends = {each.partition: future.result(ASK_S).offset for each, future in asking.items()}
        except (KafkaException, TimeoutError):
            return None
        found = Reading(time.monotonic(), ends, {each.partition: max(0, each.offset) for each in committed})
        # A broker that has just come back tells ends that it has not recovered yet.
        return found if all(done <= ends[number] for number, done in found.done.items()) else None

    def close(self) -> None:
        self.consumer.close()


class Gauge(threading.Thread):
    """Samples the three groups, what the rail has taken and what Redis has applied, until `close`."""

    def __init__(self, bootstrap: str, stripe_url: str, redis_url: str, due: Callable[[], int]) -> None:
        super().__init__(name="gauge", daemon=True)
        self.looks = {group: Look(bootstrap, group) for group in TOPICS}
        self.readings: dict[str, Reading] = {}
        self.rates: dict[str, float] = {}
        """Records a second by which a group's log grows."""
        self.delivered = 0
        self._stripe_url, self._due = stripe_url, due
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2)
        self._applied = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            for group, look in self.looks.items():
                found, before = look.now(), self.readings.get(group)
                if found is None:
                    continue
                if before is not None and found.at > before.at:
                    grown = sum(found.ends.values()) - sum(before.ends.values())
                    self.rates[group] = grown / (found.at - before.at)
                self.readings[group] = found
            self._ask_the_rail()
            self._ask_redis()
            self._ended.wait(SAMPLE_S)

    def _ask_the_rail(self) -> None:
        try:
            asked = f"{self._stripe_url}/_admin/events?after={self.delivered}"
            with urllib.request.urlopen(asked, timeout=ASK_S) as answer:
                self.delivered = json.load(answer)["next"]
        except (urllib.error.URLError, OSError, ValueError):
            return  # away: asked again

    def _ask_redis(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for number in range(LANES):
            pipe.hget(f"tw:{{{number:03d}}}:m", "off")
        try:
            self._applied = sum(int(offset) for offset in pipe.execute() if offset is not None)
        except redis.RedisError:
            return

    def lag(self, group: str) -> int:
        """Records appended and not committed, as of the last answer."""
        found = self.readings.get(group)
        return found.lag if found else 0

    def waiting(self, group: str) -> int:
        """Deltas that are due at the rail and not there: the sender takes its log into its state long before it sends."""
        return max(0, self._due() - self.delivered) if group == "stripe" else 0

    def is_busy(self, group: str) -> bool:
        return self.lag(group) > 0 or self.waiting(group) > 0

    def watch(self, subject: str) -> Callable[[], bool]:
        """Says, from now on, whether the work of a group, or the work that a part carries, has moved again."""
        if subject == "valkey":
            applied = self._applied
            return lambda: self._applied > applied
        if subject == "stripe":
            delivered = self.delivered
            return lambda: self.delivered > delivered
        groups = {"kafka": ("accounts", "audit"), "clickhouse": ("audit",)}.get(subject, (subject,))
        before = {group: self.readings[group].behind for group in groups}
        return lambda: all(
            self.readings[group].done[number] > done
            for group, marks in before.items()
            for number, done in marks.items()
        )

    def close(self) -> None:
        self._ended.set()
        self.join()
        for look in self.looks.values():
            look.close()
        self._redis.close()


@dataclass
class Kill:
    """One death: of what, how, when, with how much work before it, and how long until that work moved again."""

    group: str
    """The group whose work it does or carries."""
    process: str
    how: str
    at_s: float
    lag: int
    waiting: int = 0
    doing: str = ""
    away_s: float = 0.0
    recovered_s: float | None = None
    """From the death on; a group commits with its checkpoints, every few seconds."""
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))

    @property
    def idle(self) -> bool:
        return self.lag <= 0 and self.waiting <= 0


class Recoveries(threading.Thread):
    """Writes into each kill how long its work stood still."""

    def __init__(self, gauge: Gauge, began: float) -> None:
        super().__init__(name="recoveries", daemon=True)
        self.gauge, self.began = gauge, began
        self.kills: list[Kill] = []
        self._open: list[tuple[Kill, Callable[[], bool]]] = []
        self._lock, self._ended = threading.Lock(), threading.Event()

    def note(
        self, group: str, process: str, how: str, doing: str, has_moved: Callable[[], bool], away_s: float = 0.0
    ) -> Kill:
        """Call it at the death, at once; `has_moved` = whether the work that lay before it goes on."""
        kill = Kill(group, process, how, round(time.monotonic() - self.began, 1), self.gauge.lag(group), away_s=away_s)
        kill.waiting = self.gauge.waiting(group)
        rate = self.gauge.rates.get(group, 0.0)
        kill.doing = f"{doing}: {kill.lag} records not committed, {rate:.0f} more a second" + (
            f", {kill.waiting} deltas not at the rail" if kill.waiting else ""
        )
        with self._lock:
            self.kills.append(kill)
            self._open.append((kill, has_moved))
        return kill

    def run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                for entry in list(self._open):
                    kill, has_moved = entry
                    if has_moved():
                        kill.recovered_s = round(time.monotonic() - self.began - kill.at_s, 1)
                        self._open.remove(entry)
            self._ended.wait(SAMPLE_S)

    def await_all(self, deadline_s: float = RECOVER_DEADLINE_S) -> list[str]:
        """Wait for what still stands still. What is wrong: kills after which the work never moved again."""
        until = time.monotonic() + deadline_s
        while self._open and time.monotonic() < until:
            time.sleep(SAMPLE_S)
        self._ended.set()
        self.join()
        return [f"{kill.process}: {kill.how} at {kill.at_s} s: its work never moved again" for kill, _ in self._open]
