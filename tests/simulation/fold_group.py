"""A consumer group in memory: joins, sessions that expire, partitions that move, records fetched before a move that come after it."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from tests.simulation.fold_kafka import Cluster, Record
from tests.simulation.fold_loop import Process
from tests.simulation.fold_network import virtual

REJOIN_S = 9.0
"""Members that have not joined again by then are left out."""
GATHER_S = 0.3
"""How long a rebalance waits for further members."""


@dataclass
class Member:
    token: object
    heard_at: float
    joined: asyncio.Future[Any] | None = None


class Group:
    """The coordinator's side of one group."""

    def __init__(self, cluster: Cluster, topic: str, partitions: list[int], session_s: float) -> None:
        self.cluster, self.topic, self.partitions, self.session_s = cluster, topic, partitions, session_s
        self.members: dict[str, Member] = {}
        self.owners: dict[str, list[int]] = {}
        self.committed: dict[int, int] = {}
        self.generation = 0
        self._gathering = False
        self._began = 0.0

    @property
    def _loop(self) -> Any:
        return self.cluster.network.loop

    def join(self, instance: str, token: object) -> asyncio.Future[Any]:
        """(generation, partitions) once all have joined. A known instance with a new token takes its former self's place."""
        joined: asyncio.Future[Any] = self._loop.create_future()
        self.members[instance] = Member(token, self._loop.now, joined)
        self._rebalance()
        return joined

    def heartbeat(self, instance: str, token: object, generation: int) -> str:
        member = self.members.get(instance)
        if member is None or member.token is not token:
            return "unknown"
        member.heard_at = self._loop.now
        return "rebalance" if self._gathering or generation != self.generation else "ok"

    def leave(self, instance: str, token: object) -> None:
        member = self.members.get(instance)
        if member is not None and member.token is token:
            del self.members[instance]
            self._rebalance()

    def _rebalance(self) -> None:
        if not self._gathering:
            self._gathering, self._began = True, self._loop.now
            self._loop.after(GATHER_S, self._complete)

    def expire(self) -> None:
        """Members that have been silent for a session are dead."""
        now = self._loop.now
        silent = [name for name, m in self.members.items() if m.joined is None and now - m.heard_at > self.session_s]
        for name in silent:
            del self.members[name]
        if silent:
            self._rebalance()

    def _complete(self) -> None:
        now, late = self._loop.now, [name for name, member in self.members.items() if member.joined is None]
        if late and now - self._began < REJOIN_S:
            self._loop.after(GATHER_S, self._complete)
            return
        for name in late:
            del self.members[name]
        self._gathering = False
        self.generation += 1
        names = sorted(self.members)
        self.cluster.network.dice.shuffle(names)
        self.owners = {name: self.partitions[place :: len(names)] for place, name in enumerate(names)}
        for name, member in self.members.items():
            assert member.joined is not None
            member.heard_at = now
            if not member.joined.done():
                member.joined.set_result((self.generation, self.owners[name]))
            member.joined = None


class Consumer:
    """In place of aiokafka's, for one worker of a group."""

    def __init__(self, world: Any, group: Group, instance: str, heartbeat_s: float) -> None:
        self.world, self.group, self.instance, self.heartbeat_s = world, group, instance, heartbeat_s
        self.cluster: Cluster = group.cluster
        self.dice: random.Random = self.cluster.network.dice
        self.token = object()
        self.generation = -1
        self.listener: Any = None
        self.positions: dict[TopicPartition, int | None] = {}
        self.paused: set[TopicPartition] = set()
        self._seeks = 0
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def subscribe(self, topics: list[str], listener: Any) -> None:
        self.listener = listener

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coordinate())
        await self._started.wait()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            await self._ask(lambda: self.group.leave(self.instance, self.token))
        except KafkaError:
            return  # the session expires

    async def _ask(self, serve: Callable[[], Any]) -> Any:
        return await self.cluster.call(serve)

    async def _coordinate(self) -> None:
        while True:
            await self._join()
            word = "ok"
            while word == "ok":
                await asyncio.sleep(self.heartbeat_s)
                try:
                    word = await self._ask(lambda: self.group.heartbeat(self.instance, self.token, self.generation))
                except KafkaError:
                    continue
            await self.listener.on_partitions_revoked(list(self.positions))

    async def _join(self) -> None:
        while True:
            try:
                joined = await self._ask(lambda: self.group.join(self.instance, self.token))
                self.generation, numbers = await asyncio.wait_for(joined, 30)
            except (KafkaError, TimeoutError):
                continue
            break
        places = [TopicPartition(self.group.topic, number) for number in numbers]
        # Committed offsets are where aiokafka begins by itself; the engine is not to trust them.
        self.positions = {tp: self.group.committed.get(tp.partition) for tp in places}
        self.paused.clear()
        await self.listener.on_partitions_assigned(places)
        self._started.set()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Record]]:
        Process.current()
        if any(position is None for position in self.positions.values()):
            await virtual(0.01)
            raise NoOffsetForPartitionError(list(self.positions))
        before, seeks = self.positions, self._seeks
        beyond = {
            tp: at
            for tp, at in before.items()
            if tp not in self.paused and at is not None and not self._log(tp).start <= at <= self._log(tp).end
        }
        if beyond:
            await virtual(0.01)
            raise OffsetOutOfRangeError(beyond)
        got = self._fetch(max_records)
        await virtual(timeout_ms / 1000 if not got else 0.002)
        Process.current()
        if before is not self.positions:  # moved meanwhile: what is here is of the time before
            return got if self.dice.random() < 0.5 else {}
        if seeks != self._seeks:
            return {}
        for tp, records in got.items():
            self.positions[tp] = records[-1].offset + 1
        return got

    def _log(self, tp: TopicPartition) -> Any:
        return self.cluster.partitions[tp.topic, tp.partition]

    def _fetch(self, most: int) -> dict[TopicPartition, list[Record]]:
        if self.cluster.away:
            return {}
        got = {}
        for tp, at in self.positions.items():
            if tp not in self.paused and at is not None:
                found = self._log(tp).fetch(at, min(most, self.dice.choice((1, 4, 50, 50))))
                if found:
                    got[tp] = found
        return got

    def seek(self, tp: TopicPartition, offset: int) -> None:
        if tp not in self.positions:
            raise IllegalStateError(f"no assignment for {tp}")
        self.positions[tp] = offset
        self._seeks += 1

    def pause(self, tp: TopicPartition) -> None:
        self._mine(tp)
        self.paused.add(tp)

    def resume(self, tp: TopicPartition) -> None:
        self._mine(tp)
        self.paused.discard(tp)

    def _mine(self, tp: TopicPartition) -> None:
        if tp not in self.positions:
            raise IllegalStateError(f"no assignment for {tp}")

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        def serve() -> None:
            member = self.group.members.get(self.instance)
            if member is None or member.token is not self.token or self.generation != self.group.generation:
                raise CommitFailedError("not of this generation")
            self.group.committed |= {tp.partition: offset for tp, offset in offsets.items()}

        await self._ask(serve)

    async def end_offsets(self, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        found: dict[TopicPartition, int] = await self._ask(lambda: {tp: self._log(tp).end for tp in places})
        return found
