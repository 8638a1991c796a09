"""`tollway topics grow FROM TO`: a log of more partitions takes over, under traffic (docs/decisions/0010-growing.md).

Each step looks at what Kafka has already, so that a run that was interrupted anywhere is finished by the next. What a step
needs to remember is in Kafka's own metadata: the successor's topic and its count, and how narrow the old topic is.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError

from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import Admin, CurrentLog, current_log, epoch_of, started_producer
from tollway.schemas.lane import LANES
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, TICK_KEY, log_topic, topics_of
from tollway.streams.bootstrap import new_command_id
from tollway.streams.directory import Directory
from tollway.streams.handover import Parent, children_of, parents_at, tail_of
from tollway.streams.settings import Settings
from tollway.streams.status import checkpoints_of
from tollway.streams.topic_faults import refuse_replication
from tollway.streams.wiring import kafka_admin

TICKS_ONLY, NOTHING = 80, 1
"""Limits of a record batch, in bytes: a tick's is 72, the smallest usage or command has more than 120 whatever compresses it."""
PROBE_BYTES = 64
LOOK_S = 1.0
TOLD_S = 5.0
GROUPS = ("accounts", "audit")

Progress = Callable[[str], None]


def counts_fault(log: CurrentLog, start: int, to: int, successor: int | None) -> str | None:
    """Why a log cannot grow so, in a sentence with its cure; None where it can, or has. `successor`: its count, if it is there."""
    if not 0 < to <= LANES or to & (to - 1):
        return f"TO is {to}: give a power of two of at most {LANES}"
    if to <= start:
        return f"TO is {to}: a log only grows, give more than {start}"
    if log.partitions == to:
        return None
    if log.partitions != start:
        return f"FROM is {start}: the log has {log.partitions} partitions"
    if successor not in (None, to):
        return f"TO is {to}: growing to {successor} is under way, finish it: tollway topics grow {start} {successor}"
    return None


async def grow(settings: Settings, start: int, to: int, progress: Progress) -> dict[str, Any]:
    """Grow the log from `start` to `to` partitions; returns when the new one takes usage. Raises Refused before it changes anything.

    Meanwhile emitters keep usage in their spools, and gates see an older state: about as long as the groups' lag, a tick and a
    checkpoint take.
    """
    refuse_replication(settings.replication)
    signer = Signer.read(settings.data / "control.key")
    admin = kafka_admin(settings)
    present, log = await admin.partitions(), await current_log(admin)
    topic = log_topic(log.growth + 1)
    if (fault := counts_fault(log, start, to, present.get(topic))) is not None:
        raise Refused(fault)
    answer = {"from": start, "partitions": to}
    if log.partitions == to:
        return {**answer, "epoch": log.epoch, "topic": log.topic, "grown": False}
    run = _Growing(settings, admin, log, to, signer, progress)
    await run.refuse_key()
    epoch = await run.make(topic, present)
    await run.close_for_usage()
    parents = await run.drained()
    await run.hand_over(epoch, parents)
    await run.open(topic, epoch)
    return {**answer, "epoch": epoch, "topic": topic, "grown": True}


class _Growing:
    """One run over one log."""

    def __init__(
        self, settings: Settings, admin: Admin, log: CurrentLog, to: int, signer: Signer, progress: Progress
    ) -> None:
        self._settings, self._admin, self._log, self._to = settings, admin, log, to
        self._signer, self._progress = signer, progress
        self._kafka = settings.kafka_bootstrap, settings.kafka_security()

    async def refuse_key(self) -> None:
        """The new log is opened by the key that opened the old one, which workers know. Raises Refused."""
        found = await checkpoints_of(self._settings, self._log.epoch, self._log.partitions, list(GROUPS))
        if len(found) < len(GROUPS) * self._log.partitions:
            raise Refused(
                "a partition has no valid checkpoint: `tollway rebuild checkpoints`, start the workers, then grow"
            )
        for loaded in found.values():
            config = Directory.load(loaded.state["directory"]).config
            if config is None or config.public_key != self._signer.public_key:
                raise Refused("this control.key is not the one that opened the log: grow with that one")

    async def make(self, topic: str, present: dict[str, int]) -> str:
        """Places for the new log; returns its epoch."""
        if topic not in present:
            await self._admin.make(topics_of(topic)[:1], self._to, self._settings.replication)
        for name in (CHECKPOINTS.name, DEAD_LETTERS.name):  # behind the topic, which says why they are wider
            if present[name] < self._to:
                await self._admin.widen(name, self._to)
        epoch = epoch_of(await self._admin.new_topic_id(topic), self._log.growth + 1)
        self._progress(f"{topic}: {self._to} partitions, log {epoch}")
        return epoch

    async def close_for_usage(self) -> None:
        """From here on the brokers refuse usage and commands; ticks still fit, so that idle partitions end their blocks."""
        limit = (await self._admin.settings_of(self._log.topic))["max.message.bytes"]
        if int(limit) > TICKS_ONLY:
            await self._admin.set(self._log.topic, "max.message.bytes", str(TICKS_ONLY))
        await self._refused_everywhere((("grow", b"\0" * PROBE_BYTES),))
        self._progress(f"{self._log.topic} takes no usage any more: emitters keep it")

    async def _refused_everywhere(self, headers: tuple[tuple[str, bytes], ...]) -> None:
        """Every partition's leader knows the limit: a tick that is too large is refused. One that is taken changes nothing."""
        producer = await started_producer(*self._kafka)
        try:
            for number in range(self._log.partitions):
                while await self._taken(producer, number, headers):  # noqa: ASYNC110 there is nothing to be told by
                    await asyncio.sleep(LOOK_S / 10)
        finally:
            await producer.stop()

    async def _taken(self, producer: AIOKafkaProducer, number: int, headers: tuple[tuple[str, bytes], ...]) -> bool:
        try:
            await producer.send_and_wait(self._log.topic, None, key=TICK_KEY, partition=number, headers=list(headers))
        except MessageSizeTooLargeError:
            return False
        return True

    async def drained(self) -> dict[tuple[str, int], Parent]:
        """What every partition is at the end of the old log, once both groups have folded and written all of it."""
        await self._until(solid=True)
        if int((await self._admin.settings_of(self._log.topic))["max.message.bytes"]) > NOTHING:
            await self._admin.set(self._log.topic, "max.message.bytes", str(NOTHING))
        await self._refused_everywhere(())
        await self._until(solid=False)
        return await parents_at(self._settings, self._log)

    async def _until(self, *, solid: bool) -> None:
        """Both groups' checkpoints are behind the last record (`solid`: that is no tick; of accounts: whatever it is)."""
        told = 0.0
        while True:
            left = await tail_of(self._settings, self._log, solid=solid)
            if not left:
                return
            if time.monotonic() - told >= TOLD_S:
                told = time.monotonic()
                shown = ", ".join(f"{group} {count}" for group, count in sorted(left.items()))
                self._progress(f"partitions that are not folded to their end: {shown}")
            await asyncio.sleep(LOOK_S)

    async def hand_over(self, epoch: str, parents: dict[tuple[str, int], Parent]) -> None:
        """First checkpoints and sealed snapshots of every new partition: the same bytes in every run."""
        producer = await started_producer(*self._kafka)
        try:
            for number in range(self._to):
                for key, value in children_of(parents, self._log.partitions, number, self._to, epoch):
                    await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=number)
        finally:
            await producer.stop()
        self._progress(f"{self._log.partitions} states cut into {self._to}")

    async def open(self, topic: str, epoch: str) -> None:
        """`log.open` where there is none: with the last one the new log is the current one."""
        found = await checkpoints_of(self._settings, self._log.epoch, 1, ["accounts"])
        config = Directory.load(found["accounts", 0].state["directory"]).config
        assert config is not None, "refuse_key has seen it"
        body = {**config.body(), "epoch": epoch, "origin": config.origin or config.epoch}
        empty = [number for number, end in (await self._admin.ends(topic, self._to)).items() if not end]
        producer = await started_producer(*self._kafka)
        try:
            await Control(producer, self._signer, self._to, new_command_id, topic=topic).open(body, sorted(empty))
        finally:
            await producer.stop()
        self._progress(f"{topic} is open")
