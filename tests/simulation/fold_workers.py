"""Workers: the product's own engine, folds, view and seat of one group, on the world's ports. One process each."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from tests.simulation.fold_group import Consumer
from tests.simulation.fold_kafka import TopicIds
from tests.simulation.fold_loop import Killed, Process
from tests.simulation.fold_sinks import Store
from tollway.connectors.errors import TollwayError
from tollway.schemas import codec
from tollway.schemas.topics import METER_EVENTS
from tollway.streams import (
    accounts,
    audit_fold,
    checkpoint_log,
    engine,
    quota_jobs,
    quota_view,
    same_log,
    seat,
    stripe_fold,
)
from tollway.streams.failpoint import Failpoints
from tollway.streams.hand import Hand
from tollway.streams.settings import Settings

GROUPS = ("accounts", "audit", "stripe")
PACE_MS = 800
SESSION_MS = 6_000
TICK_IDLE_S = 6.0
SWEEP_S = 8.0
"""As often as a world of a minute can show."""
SETTINGS = Settings(kafka_bootstrap="in memory", stripe_key="sk_test_simulation")


class Broken(Exception):
    """What a fold's thinking may raise for no reason of the log's, such as a lack of memory."""


class Channel:
    """A Faust app's channel of one place: a rebalance of Faust's own consumer empties it."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._came = asyncio.Event()

    async def send(self, *, value: Any) -> None:
        while self._items:
            await asyncio.sleep(0.01)
        self._items.append(value)
        self._came.set()

    def clear(self) -> None:
        self._items.clear()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            while not self._items:
                self._came.clear()
                await self._came.wait()
            yield self._items.pop(0)


class Armed(Failpoints):
    """Kills the process where the world says so."""

    def __init__(self, worker: "Worker") -> None:
        super().__init__()
        self._worker = worker
        self.name, self.left = "", 0

    def hit(self, name: str) -> None:
        self._worker.world.stats[f"passed {name}"] += 1
        if name != self.name:
            return
        self.left -= 1
        if self.left <= 0:
            self._worker.world.stats[f"killed at {name}"] += 1
            self._worker.kill()
            raise Killed


class Worker:
    """One life of one group's worker. It starts at once; a world kills, stops and wakes it."""

    def __init__(self, world: Any, group: str, instance: str) -> None:
        self.world, self.group, self.instance = world, group, instance
        self.process = Process(f"{group}-{instance}-{world.name('life')}")
        self.fail = Armed(self)
        self.channels: list[Channel] = []
        self.broken = 0
        """How many thoughts will fail."""
        self.failure: BaseException | None = None
        self.ended = False
        self.view: Any = None
        self.seat = seat.Seat(group, self._engine)
        world.loop.spawn(self.process, self._live())

    def kill(self) -> None:
        """kill −9."""
        self.process.kill()
        self.ended = True

    @property
    def alive(self) -> bool:
        return self.process.alive and not self.ended

    @property
    def engine(self) -> Any:
        return self.seat.engine

    def stop(self) -> None:
        """SIGTERM."""
        self.world.loop.spawn(self.process, self.seat.stop())

    async def _live(self) -> None:
        try:
            await self.seat.work()
        except (TollwayError, Broken) as error:
            self.failure = error
        finally:
            self.ended = True
            self.process.kill()

    async def _engine(self) -> Any:
        fold = await self._fold()
        config = engine.EngineConfig(
            bootstrap="in memory",
            epoch=self.world.epoch,
            partitions=self.world.width,
            instance_id=self.instance,
            pace_ms=PACE_MS,
            session_timeout_ms=SESSION_MS,
            checkpoint_s=self.world.profile.checkpoint_s,
            checkpoint_records=40,
            tick_idle_s=TICK_IDLE_S,
        )
        return engine.Engine(fold, config, self.fail, self.world.clock_ms)

    async def _fold(self) -> Any:
        world, key = self.world, self.world.signer.public_key
        if self.group == "accounts":
            if self.view is None:
                self.view = quota_view.QuotaView(world.redis, world.epoch, pace_s=0.2, instance=self.process.name)
                await self.view.start()
            hands = self._hand(accounts.quota), self._hand(accounts.billing)
            return accounts.AccountsFold(world.epoch, world.width, key, *hands, self.view, self.fail)
        if self.group == "audit":
            hand, store = self._hand(audit_fold.audit), Store(world.clickhouse)
            return audit_fold.AuditFold(world.epoch, world.width, key, hand, store, self.fail)
        hand = self._hand(stripe_fold.stripe)
        return stripe_fold.StripeFold(
            world.epoch, hand, cast(Any, world.stripe), SETTINGS, self.fail, lambda: world.clock_ms() // 1000
        )

    def _hand(self, agent: Any) -> Any:
        channel = Channel()
        self.channels.append(channel)
        self.world.loop.spawn(self.process, agent(channel))
        hand, dice = Hand(channel), self.world.dice

        async def think(subject: Any) -> Any:
            late = dice.random() < 0.5
            if self.broken and not late:
                self._break()
            thought = await hand(subject)
            if self.broken and late:  # after the state was touched
                self._break()
            return thought

        return think

    def _break(self) -> None:
        self.broken -= 1
        self.world.stats["thoughts that failed"] += 1
        raise Broken("no memory")


@contextmanager
def wired(world: Any) -> Iterator[None]:
    """The product's modules talk to this world's ports, and read its clock."""
    loop, cluster, redis = world.loop, world.cluster, world.redis
    clock = SimpleNamespace(monotonic=lambda: loop.now, time_ns=lambda: world.clock_ms() * 1_000_000, time=time.time)

    def consumer(**config: Any) -> Consumer:
        _, _, group = config["group_id"].rpartition(".")
        return Consumer(world, world.groups[group], config["group_instance_id"], config["heartbeat_interval_ms"] / 1000)

    async def meter_events_since(_: str, __: Any, partition: int, account: str, since_s: int) -> list[Any]:
        values = await cluster.values_since((METER_EVENTS.name, partition), account.encode())
        return [codec.decode(value)[1] for value in values]

    TopicIds.cluster = cluster
    ports: list[tuple[Any, str, Any]] = [
        (engine, "AIOKafkaConsumer", consumer),
        (engine, "started_producer", cluster.started_producer),
        (engine, "time", clock),
        (seat, "time", clock),
        (checkpoint_log, "read_checkpoints", cluster.read_checkpoints),
        (same_log, "TopicIds", TopicIds),
        (quota_jobs, "SWEEP_S", SWEEP_S),
        (quota_view, "fly", redis.fly),
        (quota_view, "check", redis.check),
        (quota_view, "time", clock),
        (quota_view, "IDLE_S", 2.0),
        (stripe_fold, "started_producer", cluster.started_producer),
        (stripe_fold, "meter_events_since", meter_events_since),
        (stripe_fold, "random", SimpleNamespace(Random=lambda: random.Random(world.seed))),
    ]
    with replaced(*ports):
        yield


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name, value): for as long as the block runs."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
