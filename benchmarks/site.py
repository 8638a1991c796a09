"""Where a benchmark happens: a broker and a Valkey (or the whole local stack), a log, and our workers on it."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from redis import Redis

from benchmarks.machine import cpu_s, say
from benchmarks.traffic import TOPIC, Made, Sums, produce
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded import die_with_parent
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.stack import Stack
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.kafka import started_producer
from tollway.schemas.lane import lane, tag
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create, new_command_id
from tollway.streams.local import prepare_log
from tollway.streams.settings import Settings

DEADLINE_S = 300.0
LOOK_S = 0.05
ARRIVE_S = 15.0
SAFE_S = 2.0
"""Seconds between two checkpoints of ours, as between two commits of the peers."""
READ_AT_ONCE = 1_000
Command = tuple[str, str, dict[str, Any]]


@dataclass
class Site:
    """The parts by address; `pids` of those that a benchmark watches."""

    settings: Settings
    pids: dict[str, int]
    _clients: dict[str, Consumer] = field(default_factory=dict)

    @property
    def bootstrap(self) -> str:
        return self.settings.kafka_bootstrap

    @property
    def redis_url(self) -> str:
        return self.settings.redis_url.get_secret_value()

    @property
    def partitions(self) -> range:
        return range(self.settings.partitions)

    def _consumer(self, group: str) -> Consumer:
        """One that only asks: it never joins."""
        if group not in self._clients:
            self._clients[group] = Consumer({"bootstrap.servers": self.bootstrap, "group.id": group, "log_level": 0})
        return self._clients[group]

    def ends(self) -> dict[int, int]:
        """partition → offset behind its last record."""
        consumer = self._consumer("bench")

        def end(number: int) -> int:
            found: tuple[int, int] = consumer.get_watermark_offsets(TopicPartition(TOPIC, number), timeout=30)
            return found[1]

        return {number: patiently(partial(end, number)) for number in self.partitions}

    def append(self, made: list[Made]) -> dict[int, int]:
        """Where they begin. Raises RuntimeError where the broker did not take all."""
        starts = self.ends()
        produce(self.bootstrap, len(self.partitions), made)
        taken = sum(self.ends().values()) - sum(starts.values())
        if taken != len(made):
            raise RuntimeError(f"the broker took {taken} of {len(made)} events")
        return starts

    def committed(self, group: str) -> dict[int, int]:
        """Offsets committed behind the newest checkpoints of our group; 0 where there is none."""
        asked = [TopicPartition(TOPIC, number) for number in self.partitions]
        consumer = self._consumer(f"tollway.{group}")
        found = patiently(lambda: consumer.committed(asked, timeout=30))
        return {part.partition: max(0, part.offset) for part in found}

    def command(self, commands: Iterable[Command]) -> None:
        """Append signed commands."""
        asyncio.run(self._command(list(commands)))

    async def _command(self, commands: list[Command]) -> None:
        producer = await started_producer(self.bootstrap, {})
        signer = Signer.read(self.settings.data / "control.key")
        control = Control(producer, signer, len(self.partitions), new_command_id)
        try:
            for account, kind, body in commands:
                await control.send(account, kind, body)
        finally:
            await producer.stop()


def patiently(ask: Callable[[], Any]) -> Any:
    """The broker's answer; a leader or coordinator that is still being found is asked again. Raises KafkaException."""
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            return ask()
        except KafkaException:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_S)


@contextmanager
def light(partitions: int = 8) -> Iterator[Site]:
    """A broker and a Valkey, a new log on them."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        kafka, valkey = KafkaBroker(data), ValkeyServer(data)
        try:
            for part in (kafka, valkey):
                part.start()
                part.wait_ready()
            given: dict[str, Any] = {"data": data, "kafka_bootstrap": kafka.bootstrap, "redis_url": valkey.url}
            settings = settings_module.read(**given, partitions=partitions, replication=1, auto_open=True)
            asyncio.run(create(settings))
            yield Site(settings, {"kafka": kafka.pid or 0, "valkey": valkey.pid or 0})
        finally:
            valkey.kill()
            kafka.kill()


@contextmanager
def whole(partitions: int = 16, **told: Any) -> Iterator[Site]:
    """All parts of the local stack, a new log on them; `told` are settings of that log."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)

        def read() -> Settings:
            return settings_module.read(data=data, partitions=partitions, auto_open=True, **told)

        with Stack(data, prepare=lambda _: asyncio.run(prepare_log(read(), say)), progress=lambda _: None) as stack:
            yield Site(read(), {name: stack.pid(name) or 0 for name in ("kafka", "valkey", "clickhouse", "stripe")})


def wait_for(met: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true answer. Raises TimeoutError."""
    until = time.monotonic() + deadline_s
    while not (found := met()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(LOOK_S)
    return found


class Worker:
    """One worker process of one of our groups. `told` are settings, by their names without TOLLWAY_."""

    def __init__(self, site: Site, group: str, **told: str) -> None:
        self.site, self.group, self.port = site, group, free_port()
        environment = {
            **os.environ,
            "TOLLWAY_KAFKA_BOOTSTRAP": site.bootstrap,
            "TOLLWAY_REDIS_URL": site.redis_url,
            "TOLLWAY_HEALTH_PORT": str(self.port),
            "TOLLWAY_REPLICATION": "1",
            "TOLLWAY_TICK_IDLE_S": "3600",
            **{f"TOLLWAY_{name}": value for name, value in told.items()},
        }
        argv = [sys.executable, "-m", "tollway.streams.cli", "worker", "--group", group]
        ends_with_us = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())]
        self.log = (site.settings.data / f"worker-{group}.log").open("ab")
        self.before = sum(site.committed(group).values())
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*ends_with_us, *argv, "--data", str(site.settings.data)], env=environment, stdout=self.log, stderr=self.log
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def health(self) -> dict[str, Any] | None:
        """None while it is not up yet. Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            words = Path(self.log.name).read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"the worker of group {self.group} ended with {self.process.returncode}: {words}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as answer:
            return json.loads(answer.read())  # type: ignore[no-any-return]
        except OSError:
            return None

    def events(self) -> int:
        """Records folded since it started."""
        found = self.health()
        return sum(group.get("events", 0) for group in found["groups"]) if found else 0

    def ready(self) -> bool:
        """Whether it has its partitions."""
        return bool((found := self.health()) and all(group["healthy"] for group in found["groups"]))

    def folded(self) -> bool:
        """Whether it has taken everything that is in the log, and has sent Redis all of it."""
        found = self.health() or {"groups": []}
        events = sum(group.get("events", 0) for group in found["groups"])
        return sent(found) and events >= sum(self.site.ends().values()) - self.before

    def safe(self) -> bool:
        """Whether its newest checkpoints stand at the end of the log."""
        return self.site.committed(self.group) == self.site.ends()

    def drain(self) -> dict[str, float]:
        """Events per CPU second from the first ones seen to the last checkpoint, and per second until Redis shows them."""
        first = wait_for(self.events, "the worker's first events")
        cpu, began = cpu_s(self.pid), time.monotonic()
        wait_for(self.folded, "the worker's last events")
        wall = time.monotonic() - began
        wait_for(self.safe, "the worker's last checkpoint")
        events, spent = self.events() - first, cpu_s(self.pid) - cpu
        return {"events": events, "cpu_s": spent, "wall_s": wall}

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.close()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


def sent(health: dict[str, Any]) -> bool:
    """Whether no lane waits to be written whole and no total is dirty; what is in flight has its answer in milliseconds."""
    view = health.get("view", {})
    return not view.get("dirty", 0) and not view.get("lag", {}) and set(view.get("lanes", {})) <= {"live"}


def drained(site: Site, exact: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Group accounts over what has come since its last time, with a checkpoint as often as peers commit.

    `exact` is asked while the worker is there: totals in flight arrive within its deadline or never.
    """
    often = {"CHECKPOINT_S": str(SAFE_S), "CHECKPOINT_RECORDS": "500000"}
    with Worker(site, "accounts", **often) as worker:
        found: dict[str, Any] = worker.drain()
        if exact is None:
            return found
        try:
            wait_for(exact, "the sums that must be", ARRIVE_S)
        except TimeoutError:
            return {**found, "exact": False}
        return {**found, "exact": True}


def our_sums(url: str, shape: Any, principals: Iterable[int]) -> Sums:
    """Minute sums of principals, as our gates see them."""
    names = [(shape.principal(n), shape.account(n)) for n in principals]
    keys = [f"{tag(lane(account))}s:{account}~user:{principal}" for principal, account in names]
    found = hashes(url, keys)
    return {
        name: {field[:-2]: int(value) for field, value in found[key].items() if " m:" in field and field.endswith(" u")}
        for (name, _), key in zip(names, keys, strict=True)
        if key in found
    }


def peer_sums(url: str, name: str) -> Sums:
    """Sums as a peer wrote them; zeros, which some write for meters that an event lacks, left out."""
    with Redis.from_url(url) as client:
        keys = [key.decode() for key in client.scan_iter(match=f"{name}:*", count=5_000)]
    return {key.partition(":")[2]: {f: int(v) for f, v in row.items()} for key, row in hashes(url, keys).items()}


def hashes(url: str, keys: list[str]) -> dict[str, dict[str, str]]:
    """key → fields, of keys that are there."""
    found: dict[str, dict[str, str]] = {}
    with Redis.from_url(url, decode_responses=True) as client:
        for at in range(0, len(keys), READ_AT_ONCE):
            some = keys[at : at + READ_AT_ONCE]
            pipe = client.pipeline(transaction=False)
            for key in some:
                pipe.hgetall(key)
            found |= {key: row for key, row in zip(some, pipe.execute(), strict=True) if row}
    return found


def without_zeros(sums: Sums) -> Sums:
    """A sum of zero and no sum are the same."""
    kept = {name: {field: units for field, units in fields.items() if units} for name, fields in sums.items()}
    return {name: fields for name, fields in kept.items() if fields}
