"""The loop that every fold runs on: fetch → think → effects acknowledged → checkpoint → commit (design §2.5, §3).

Offsets come from checkpoints, never from commits. A crash anywhere repeats effects, which their sinks recognise. What a
fold thinks is a function of the log; what the engine does with time (pacing, back-off, ticks) changes no result.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from tollway.connectors.closing import close
from tollway.connectors.errors import Fatal, TollwayError, Unavailable
from tollway.connectors.kafka import started_producer
from tollway.connectors.parsed_records import as_parsed
from tollway.schemas.topics import CHECKPOINTS, METER_EVENTS, TICK_KEY
from tollway.streams import checkpoint
from tollway.streams.checkpoint_log import newest_checkpoints
from tollway.streams.failpoint import Failpoints
from tollway.streams.fold import Fold, Message, NewerFold
from tollway.streams.owned import RETRY_FIRST_S, Owned, as_records
from tollway.streams.same_log import SameLog
from tollway.streams.ticks import Ticks
from tollway.streams.waiting import Waiting

log = logging.getLogger(__name__)

FETCH_RECORDS_MAX = 20_000
RETRY_MAX_S = 10.0
REVOKE_WAIT_S = 3.0
LAST_SAVES_S = 3.0
"""Partitions that are let go get so long for their last checkpoints; without them more is read again, nothing else."""
COMMIT_S = 5.0
CLOSE_S = 2.0
BLOCKED_RED_S = 30
CLOCK_AHEAD_MAX_S = 300
SEND_TIMEOUT_S = 30


@dataclass
class EngineConfig:
    """What the engine is told. Times end in their unit."""

    bootstrap: str
    epoch: str
    partitions: int
    instance_id: str
    security: dict[str, Any] = field(default_factory=dict)
    pace_ms: int = 100
    session_timeout_ms: int = 6_000
    max_poll_interval_ms: int = 300_000
    checkpoint_s: float = 10.0
    checkpoint_records: int = 500_000
    tick_idle_s: float = 10.0


class Engine(ConsumerRebalanceListener):  # type: ignore[misc]
    """Runs one fold over the partitions that its consumer group gives it. `work()` returns after `stop()`, or raises."""

    def __init__(
        self,
        fold: Fold,
        config: EngineConfig,
        failpoints: Failpoints,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.fold, self.config, self.fail = fold, config, failpoints
        self._clock_ms = clock_ms
        self.owned: dict[int, Owned] = {}
        self.generation = 0
        self.waiting = Waiting()
        self.losses: list[float] = []
        self.events = 0
        self.joined = False
        self._lock = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._turn: asyncio.Task[None] | None = None
        self._fatal: BaseException | None = None
        self._assigned: list[int] = []  # not loaded yet
        self._ticks = Ticks(config.tick_idle_s)
        of_log = config.epoch.partition("-")[2] if fold.topic != METER_EVENTS.name else None
        self._log = SameLog(config.bootstrap, config.security, fold.topic, of_log)
        self.consumer: AIOKafkaConsumer | None = None
        self.producer: AIOKafkaProducer | None = None
        if fold.fencing is not None:
            fold.fencing.bind(self.save)

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Fetch and fold until stopped. Raises Fatal where going on would mix or lose units."""
        try:
            await self._start()
            while not self._stopping.is_set():
                began = time.monotonic()
                await self._fetch()
                self._reap()
                if self._turn is None:
                    self._turn = asyncio.create_task(self._one_turn(), name=f"{self.fold.group}.turn")
                self._flow()
                rest = self.config.pace_ms / 1000 - (time.monotonic() - began)
                if rest > 0:
                    await asyncio.sleep(rest)
        finally:
            await self._finish()

    async def stop(self) -> None:
        """Ask `work` to end: last checkpoint, offsets committed, group left."""
        self._stopping.set()
        self._changed.set()

    def health(self) -> dict[str, Any]:
        """Red with reasons where a partition is stopped or effects are not acknowledged; green otherwise."""
        reasons = {str(number): problem for number, problem in self.fold.problems().items()}
        reasons |= {str(number): owned.stopped for number, owned in self.owned.items() if owned.stopped}
        if not self.joined:
            reasons["group"] = "not joined yet"
        if (waits := self.waiting.shown(self._clock_ms())) and waits["for_s"] >= BLOCKED_RED_S:
            reasons["effects"] = waits["reason"]
        if large := [number for number, owned in self.owned.items() if owned.size > checkpoint.RED_BYTES]:
            reasons["checkpoint"] = f"partitions {large} keep more than {checkpoint.RED_BYTES} bytes: grow the log"
        return {
            "group": self.fold.group,
            "healthy": not reasons,
            "reasons": reasons,
            "partitions": sorted(self.owned),
            "events": self.events,
            "generation": self.generation,
            "blocked": waits,
        }

    async def _start(self) -> None:
        config = self.config
        self.producer = await started_producer(config.bootstrap, config.security)
        self.consumer = AIOKafkaConsumer(
            bootstrap_servers=config.bootstrap,
            group_id=f"tollway.{self.fold.group}",
            group_instance_id=f"{self.fold.group}-{config.instance_id}",
            auto_offset_reset="none",
            value_deserializer=as_parsed,
            enable_auto_commit=False,
            session_timeout_ms=config.session_timeout_ms,
            heartbeat_interval_ms=max(100, config.session_timeout_ms // 6),
            max_poll_interval_ms=config.max_poll_interval_ms,
            rebalance_timeout_ms=config.max_poll_interval_ms,
            **config.security,
        )
        self.consumer.subscribe([self.fold.topic], listener=self)
        try:
            await asyncio.wait_for(self.consumer.start(), 60)
        except (KafkaError, TimeoutError) as error:
            if self._fatal:
                raise self._fatal from error
            raise Unavailable(f"group {self.fold.group} cannot be joined: {error}") from error

    async def _fetch(self) -> None:
        assert self.consumer is not None
        if self._fatal:
            raise self._fatal
        try:
            got = await self.consumer.getmany(timeout_ms=self.config.pace_ms, max_records=FETCH_RECORDS_MAX)
        except NoOffsetForPartitionError:
            return  # assigned, not sought yet: the listener is on its way
        except OffsetOutOfRangeError as error:
            try:
                await self._log.confirm()
            except Unavailable:
                return  # asked again: this error comes with every call
            for tp, offset in error.args[0].items():
                self._halt(
                    tp.partition,
                    f"offset {offset} is not in the log any more: never jump; restore or rebuild",
                    final=True,
                )
            return
        for tp, records in got.items():
            self._stash(tp, records)

    def _stash(self, tp: TopicPartition, records: list[ConsumerRecord]) -> None:
        """Keep contiguous records only: what was fetched before a rebalance or a seek is asked for again."""
        owned = self.owned.get(tp.partition)
        if owned is None or owned.stopped or not records:
            return
        assert self.consumer is not None
        if max(record.timestamp for record in records) > self._clock_ms() + CLOCK_AHEAD_MAX_S * 1000:
            raise Fatal("the broker's clock is more than 5 minutes ahead of this worker's: set the clocks")
        if not owned.put(records, time.monotonic()):
            self.consumer.seek(tp, owned.fetch_next)

    def _flow(self) -> None:
        """Pause what is full or stopped, resume what is not: getmany goes on either way."""
        assert self.consumer is not None
        for number, owned in self.owned.items():
            wanted = bool(owned.full or owned.stopped)
            if wanted != owned.paused:
                owned.paused = wanted
                tp = TopicPartition(self.fold.topic, number)
                try:
                    (self.consumer.pause if wanted else self.consumer.resume)(tp)
                except IllegalStateError:
                    return  # a rebalance is under way: the next assignment starts afresh

    def _reap(self) -> None:
        if self._turn is not None and self._turn.done():
            turn, self._turn = self._turn, None
            if not turn.cancelled() and (error := turn.exception()) is not None:
                raise error

    # -- one turn ----------------------------------------------------------------------------------------------------

    async def _one_turn(self) -> None:
        async with self._lock:
            generation = self.generation
            self._changed.clear()
            if self._assigned and not await self._take_over():
                return
            effects: list[Any] = []
            worked: list[int] = []
            for number in list(self.owned):
                if generation != self.generation:
                    return  # what was thought is thought again by the next owner
                await self._think(number, effects, worked)
            if worked:
                self.fail.hit(f"{self.fold.group}.before_effects")
                if not await self._settle(effects, generation):
                    return
                self.fail.hit(f"{self.fold.group}.after_effects")
                for number in worked:
                    self.owned[number].unsettled = False
                    self.fold.settled(number, self.owned[number].state)
            try:
                await self.fold.tend({number: owned.state for number, owned in self.owned.items() if owned.settled})
                await self._checkpoint_due()
                await self._tick()
                await self._retry_stopped()
            except Unavailable as error:  # nothing is lost: the next turn tries again
                self._block(error)
                await self._pause_between_tries(RETRY_FIRST_S * 5)
            else:
                self.waiting.over()

    async def _think(self, number: int, effects: list[Any], worked: list[int]) -> None:
        owned = self.owned[number]
        if not (owned.settled and owned.stash):
            return
        try:
            if not (count := self.fold.ready(owned.state, owned.stash)):
                return
            owned.unsettled = True
            effects.append(await self.fold.take(owned.state, as_records(owned.stash[:count])))
        except NewerFold:
            raise  # the others of the group may know it
        except Exception as error:
            log.exception("%s: partition %d cannot go on", self.fold.group, number)
            self._halt(number, f"{type(error).__name__}: {error}")
            return
        owned.drop(count)
        self.events += count
        worked.append(number)
        await asyncio.sleep(0)

    async def _settle(self, effects: list[Any], generation: int) -> bool:
        """Send until acknowledged; False where the partitions went away meanwhile."""
        delay_s = RETRY_FIRST_S
        self.waiting.sent()
        while True:
            try:
                await self._log.confirm()
                await self.fold.settle(effects, self.send)
            except Unavailable as error:
                self._block(error)
            else:
                return generation == self.generation
            await self._pause_between_tries(delay_s)
            delay_s = min(delay_s * 2, RETRY_MAX_S)
            if generation != self.generation or self._stopping.is_set():
                return False

    def _block(self, error: Unavailable) -> None:
        """Effects wait; health turns red when they wait for long."""
        self.waiting.failed(str(error))
        log.warning("%s: not acknowledged, tried again: %s", self.fold.group, error)

    async def _pause_between_tries(self, delay_s: float) -> None:
        """Wait, but not longer than until the partitions change or the engine stops."""
        try:
            await asyncio.wait_for(self._changed.wait(), delay_s)
        except TimeoutError:
            return

    def _halt(self, number: int, reason: str, *, final: bool = False) -> None:
        """Stop one partition, red; the others go on. Its state is doubtful: it is loaded again before a retry."""
        owned = self.owned.get(number)
        if owned is None or owned.stopped:
            return
        log.error("%s: partition %d stopped: %s", self.fold.group, number, reason)
        owned.stop(reason, time.monotonic(), final=final)

    async def _retry_stopped(self) -> None:
        due = [n for n, o in self.owned.items() if o.stopped and not o.final and o.retry_at <= time.monotonic()]
        if not due:
            return
        assert self.consumer is not None
        before = {number: self.owned[number] for number in due}
        await self._load(due)
        for number in due:
            self.owned[number].retry_s, self.owned[number].paused = before[number].retry_s, before[number].paused
        await self.fold.assigned({number: self.owned[number].state for number in due})

    # -- checkpoints -------------------------------------------------------------------------------------------------

    async def _checkpoint_due(self) -> None:
        now = time.monotonic()
        for number, owned in self.owned.items():
            due = now >= owned.due_at or owned.since >= self.config.checkpoint_records
            if due and owned.settled and owned.state.next_offset != owned.checkpointed:
                await self.save(number)

    async def save(self, number: int) -> None:
        """Write one partition's state and wait for the broker. Raises Unavailable."""
        owned = self.owned[number]
        self.fail.hit(f"{self.fold.group}.before_checkpoint")
        owned.turn += 1
        stats = self.fold.stats(owned.state)
        records = owned.checkpoint(self.fold.group, self.config.epoch, number, self._clock_ms(), stats)
        owned.size = sum(len(value) for _, value in records)
        offset = owned.state.next_offset
        await self.write_checkpoint(number, records)
        self.fail.hit(f"{self.fold.group}.after_checkpoint")
        owned.slot = (owned.slot + 1) % checkpoint.SLOTS
        owned.checkpointed, owned.since = offset, 0
        owned.due_at = time.monotonic() + self.config.checkpoint_s
        await self._commit(number, offset)

    async def write_checkpoint(self, number: int, records: list[tuple[bytes, bytes]]) -> None:
        """Append checkpoint records and wait; folds with fenced checkpoints bring their own writer."""
        if self.fold.fencing is not None:
            await self.fold.fencing.write_checkpoint(number, records)
            return
        await self.send([(CHECKPOINTS.name, number, key, value, ()) for key, value in records])

    async def send(self, records: list[Message]) -> None:
        """Append (topic, partition, key, value, headers) in order and wait for all. Raises Unavailable."""
        if self.producer is None:
            self.producer = await started_producer(self.config.bootstrap, self.config.security)
        try:
            sent = [
                await self.producer.send(topic, value, key=key, partition=partition, headers=list(headers))
                for topic, partition, key, value, headers in records
            ]
            await asyncio.wait_for(asyncio.gather(*sent), SEND_TIMEOUT_S)
        except (KafkaError, TimeoutError) as error:
            await self._renew_producer()
            raise Unavailable(f"Kafka did not acknowledge: {type(error).__name__} {error}") from error

    async def _renew_producer(self) -> None:
        """An idempotent producer that failed once may be dead for good."""
        old, self.producer = self.producer, None
        if old is not None:
            await close(old, CLOSE_S)
        self.producer = await started_producer(self.config.bootstrap, self.config.security)

    async def _commit(self, number: int, offset: int) -> None:
        """For lag displays alone."""
        assert self.consumer is not None
        try:
            # aiokafka tries for as long as Kafka is away
            await asyncio.wait_for(self.consumer.commit({TopicPartition(self.fold.topic, number): offset}), COMMIT_S)
        except (KafkaError, TimeoutError) as error:
            log.warning("%s: offset of partition %d not committed: %r", self.fold.group, number, error)

    async def _tick(self) -> None:
        now = time.monotonic()
        if idle := self._ticks.due(self.fold, self.owned, now):
            await self.send([(self.fold.topic, number, TICK_KEY, None, ()) for number in idle])
            self._ticks.sent(idle, now)

    # -- assignment --------------------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: list[TopicPartition]) -> None:
        """Finish or abandon the turn, checkpoint what is settled, let go: within 7 s."""
        self.generation += 1
        self._changed.set()
        if revoked and not self._stopping.is_set():
            self._count_loss()
        await self._end_turn()
        async with self._lock:
            await self._let_go()

    async def on_partitions_assigned(self, assigned: list[TopicPartition]) -> None:
        """Note what is ours: the next turn loads it. aiokafka sends no heartbeat until this returns, and a load may outlast
        the session: the group would expel us, give us the partitions again, and so on for ever."""
        self.generation += 1
        self._assigned, self.joined = sorted(tp.partition for tp in assigned), self.joined or not assigned

    async def _take_over(self) -> bool:
        """Load all new partitions at once and seek to their checkpoints' next offsets; False where Kafka was away."""
        try:
            await self._load(self._assigned)
            await self.fold.assigned({number: owned.state for number, owned in self.owned.items()})
        except Unavailable as error:
            self._block(error)
            await self._pause_between_tries(RETRY_FIRST_S * 5)
            return False
        self._assigned, self.joined = [], True
        return True

    async def _end_turn(self) -> None:
        if self._turn is None:
            return
        _, late = await asyncio.wait({self._turn}, timeout=0 if self._assigned else REVOKE_WAIT_S)
        for turn in late:
            turn.cancel()
            await asyncio.wait({turn}, timeout=1)

    async def _let_go(self) -> None:
        until = time.monotonic() + LAST_SAVES_S
        for number, owned in self.owned.items():
            if self._assigned or not owned.settled or owned.state.next_offset == owned.checkpointed:
                continue
            try:
                await asyncio.wait_for(self.save(number), max(0.0, until - time.monotonic()))
            except (TollwayError, TimeoutError) as error:
                log.warning("%s: no last checkpoint of partition %d: %s", self.fold.group, number, error)
        gone = sorted({*self.owned, *self._assigned})
        self.owned, self._assigned = {}, []
        await self.fold.revoked(gone)

    async def _load(self, partitions: list[int]) -> None:
        if not partitions:
            return
        assert self.consumer is not None
        if self.fold.fencing is not None:
            await self.fold.fencing.fence(partitions)
        groups = {self.fold.group: self.fold.fencing is not None}
        config = self.config
        found = await newest_checkpoints(config.bootstrap, config.security, config.epoch, groups, partitions)
        loads = {number: found.of(self.fold.group, number) for number in partitions}
        await self._log.confirm()  # before anything is replaced: a load that fails leaves all as it was
        now = time.monotonic()
        for place, (number, loaded) in enumerate(loads.items()):
            state = self.fold.load(number, loaded.state)
            stagger_s = self.config.checkpoint_s * (place + 1) / len(partitions)
            self.owned[number] = Owned.loaded(state, loaded, now, now + stagger_s)
            self.consumer.seek(TopicPartition(self.fold.topic, number), state.next_offset)

    def _count_loss(self) -> None:
        """aiokafka does not notice a twin with our instance id: they steal from each other for ever."""
        now = time.monotonic()
        self.losses = [at for at in self.losses if now - at < 60] + [now]
        if len(self.losses) > 12:
            self._fatal = Fatal("partitions were lost more than 12 times in a minute: is there a twin of this replica?")

    async def _finish(self) -> None:
        await self._end_turn()
        async with self._lock:
            await self._let_go()
        for part in (self.consumer, self.producer):
            if part is not None:
                await close(part, CLOSE_S)
        await self._log.close()
