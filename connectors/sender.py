"""Spools → Kafka: in order, idempotent, acks=all, whole batches with their partition named.

One producer at a time. When it fails (aiokafka's idempotent producer cannot go on after a batch it gave up), what is not
acknowledged goes to a new one; the fold recognises what then arrives twice by (source, lane, sequence).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from tollway.connectors.acknowledged import Acknowledged
from tollway.connectors.adoption import ADOPTED_MAX, adopt_dead
from tollway.connectors.errors import Unavailable
from tollway.connectors.flush import Flushes
from tollway.connectors.frame import Frame
from tollway.connectors.hush import hush
from tollway.connectors.open_log import open_log
from tollway.connectors.outbox import Batch, Outbox
from tollway.connectors.spool import Position, Spool
from tollway.connectors.tally import Tally
from tollway.schemas import lane as lanes
from tollway.schemas.usage import RESEND_S

TURN_S = 0.02
"""A turn gathers what was emitted meanwhile; a backlog is sent as fast as it is acknowledged."""
BATCH_BYTES_MAX = 64 << 10
SLICES_A_TURN = 16
BACKOFF_S, BACKOFF_MAX_S = 0.1, 5.0
ADOPT_S = 30.0
REMOVE_AGAIN_S = 5.0
KEEP_S = 1.0
"""How often the place up to which all is acknowledged is written down."""
CONNECT_DEADLINE_S = 30.0
STOP_DEADLINE_S = 2.0
RETRY_MS = 250
REQUEST_TIMEOUT_MS = 30_000

log = logging.getLogger("tollway.emitter")


class Taken(Enum):
    """How a turn's taking from the spools ended."""

    ALL = "nothing is left in them"
    SOME = "the turn was long enough"
    NO_ROOM = "the outbox waits for acknowledgements"


class Sender:
    """Sends the spools of an emitter and those of dead processes under `root`, until it is stopped."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        security: Mapping[str, Any],
        root: Path | None,
        spools: list[Spool],
        outbox: Outbox,
        tally: Tally,
        acknowledged: Acknowledged,
        flushes: Flushes,
        *,
        clock_us: Callable[[], int],
        elapsed_s: Callable[[], float],
        fsync_interval_s: float | None,
    ) -> None:
        self._bootstrap, self._topic, self._security = bootstrap, topic, security
        self._root, self._spools, self._outbox = root, spools, outbox
        self._tally, self._acknowledged, self._flushes = tally, acknowledged, flushes
        self._clock_us, self._elapsed_s, self._fsync_interval_s = clock_us, elapsed_s, fsync_interval_s
        self.problem: str | None = None
        """Why nothing is being sent just now."""
        self._complaint = ""
        self.others_bytes = 0
        """Bytes that other processes have in the folder, as of the last look."""
        self.idle = False
        """The emitter calls `wake` when it has appended something and finds this set."""
        self.ended: Future[None] = Future()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._wake, self._adopt_now = asyncio.Event(), asyncio.Event()
        self._crowded = False
        """There were more spools than could be adopted."""
        self._remove_again_s = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._stopping = self._connecting = False
        self._failure: BaseException | None = None
        self._log, self._partitions = topic, 1
        self._producer: AIOKafkaProducer | None = None

    def wake(self) -> None:
        """From any thread."""
        self.idle = False
        if self.loop is not None:
            with suppress(RuntimeError):  # its loop was closed: `ended` says so
                self.loop.call_soon_threadsafe(self._wake.set)

    def stop(self) -> None:
        """From any thread; `ended` is resolved when it has stopped. Nothing is waited for."""
        self._stopping = True
        self.wake()
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._stop_connecting)

    def _stop_connecting(self) -> None:
        if self._connecting and self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Until `stop`, or until its loop cancels it."""
        self.loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        tasks = [asyncio.create_task(self._every(KEEP_S, self._keep))]
        if self._root is not None:
            tasks.append(asyncio.create_task(self._every(ADOPT_S, self._adopt, self._adopt_now)))
            if self._fsync_interval_s:
                tasks.append(asyncio.create_task(self._every(self._fsync_interval_s, self._sync)))
        try:
            await self._send_for_ever()
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            self.idle = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.has_ended()

    def has_ended(self, _: object = None) -> None:
        """Also when its task was cancelled before it began."""
        if not self.ended.done():
            self.ended.set_result(None)

    async def _every(
        self, interval_s: float, work: Callable[[], Awaitable[None]], sooner: asyncio.Event | None = None
    ) -> None:
        while True:
            if sooner is not None:
                sooner.clear()
            try:
                await work()
            except OSError as error:
                if str(error) != self._complaint:
                    log.warning("the spool is not looked after: %s", error)
                self._complaint = str(error)
            except Exception:
                log.exception("the spool is not looked after")
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await (sooner or asyncio.Event()).wait()

    async def _keep(self) -> None:
        for spool in list(self._spools):
            spool.save_position()

    async def _sync(self) -> None:
        for spool in list(self._spools):
            if spool.own:
                await asyncio.to_thread(spool.sync)

    async def _adopt(self) -> None:
        assert self._root is not None
        own = {spool.source for spool in self._spools if spool.own}
        adopted = {spool.source for spool in self._spools if not spool.own}
        found = partial(adopt_dead, self._root, self._tally, own, adopted, self._spools.append)
        looking = asyncio.create_task(asyncio.to_thread(found))
        try:
            self.others_bytes, self._crowded = await asyncio.shield(looking)
        except asyncio.CancelledError:
            await looking  # a spool it locks after the end would stay locked
            raise
        self._wake.set()

    @property
    def _adopted(self) -> int:
        return sum(not spool.own for spool in list(self._spools))

    async def _send_for_ever(self) -> None:
        backoff_s = BACKOFF_S
        while not self._stopping:
            before = self._tally.acknowledged + self._tally.resumed
            try:
                await self._one_producer()
            except (Unavailable, KafkaError, OSError, TimeoutError, ValueError) as error:
                self._report(str(error) or type(error).__name__)
            except Exception as error:  # a sender that ends would leave the spool to fill
                log.exception("unexpected while sending")
                self._report(f"{type(error).__name__}: {error}")
            if self._stopping:
                return
            progress = self._tally.acknowledged + self._tally.resumed > before
            backoff_s = BACKOFF_S if progress else min(2 * backoff_s, BACKOFF_MAX_S)
            await self._wait(backoff_s)

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("usage waits in the spool: %s", problem)
        self.problem = problem

    async def _wait(self, timeout_s: float) -> None:
        """For a wake-up, at most `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()

    async def _one_producer(self) -> None:
        """Send with one producer until it fails. Raises Unavailable, KafkaError, OSError, TimeoutError, ValueError."""
        hush()
        producer = self._producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            enable_idempotence=True,
            acks="all",
            max_batch_size=BATCH_BYTES_MAX,
            retry_backoff_ms=RETRY_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            **self._security,
        )
        try:
            if await self._connect(producer):
                self._failure = None
                self._outbox.open(self._partitions, producer.create_batch)
                for spool in list(self._spools):
                    spool.rewind()
                await self._turns(producer)
        finally:
            await discard(producer)
            self._producer = None

    async def _connect(self, producer: AIOKafkaProducer) -> bool:
        """False when stopped first. Raises Unavailable; ValueError for a partition count that would tear lanes apart."""
        self._connecting = True
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await producer.start()
            return await self._is_open(producer)
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable(f"no Kafka at {self._bootstrap}: {error or 'it does not answer'}") from error
        finally:
            self._connecting = False

    async def _is_open(self, producer: AIOKafkaProducer) -> bool:
        """Find the log to send to; wait until one has its first record, the `log.open`, in every partition."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self._bootstrap, enable_auto_commit=False, **self._security)
        backoff_s = BACKOFF_S
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await consumer.start()
            while not self._stopping:
                if (found := await open_log(producer, consumer, self._topic)) is not None:
                    self._log, self._partitions = found
                    lanes.partition(0, self._partitions)
                    return True
                self._report(f"topic {self._topic} is not open: every partition needs its log.open first")
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
                await self._wait(backoff_s)
            return False
        finally:
            await consumer.stop()

    async def _turns(self, producer: AIOKafkaProducer) -> None:
        while not self._stopping:
            taken = await self._take(producer)
            await self._send(producer)
            if self._failure is not None:
                raise self._failure
            self._settle()
            if taken is Taken.NO_ROOM:
                await self._wait(KEEP_S)
            elif taken is Taken.ALL:
                await self._rest()
                await asyncio.sleep(TURN_S)

    async def _send(self, producer: AIOKafkaProducer, *, full_only: bool = False) -> None:
        for batch in self._outbox.to_send(time.monotonic(), full_only=full_only):
            future = await producer.send_batch(batch.builder, self._log, partition=batch.partition)
            future.add_done_callback(partial(self._answered, producer, batch))

    async def _take(self, producer: AIOKafkaProducer) -> "Taken":
        """From the spools, a slice of each in turn, into the outbox."""
        slices = 0
        while unread := [spool for spool in self._spools if spool.unread]:
            for spool in unread:
                if not self._outbox.has_room(time.monotonic()):
                    return Taken.NO_ROOM
                if slices == SLICES_A_TURN:
                    return Taken.SOME
                slices += 1
                frames, position = spool.take()
                if frames:
                    self._put(spool, frames, position)
                    await self._send(producer, full_only=True)  # small requests: copying large ones is dear
                    await asyncio.sleep(0)  # the loop is the service's, too
        return Taken.ALL

    def _put(self, spool: Spool, frames: list[Frame], position: Position) -> None:
        oldest_ms = self._clock_us() // 1000 - RESEND_S * 1000
        # Times ascend in a spool: the emitter begins another where its clock goes back.
        if frames[0][0] < oldest_ms and not self._is_young(spool):
            old = [frame for frame in frames if frame[0] < oldest_ms]
            self._tally.expire(len(old), own=spool.own)
            spool.progress.expire(old)
            frames = [frame for frame in frames if frame[0] >= oldest_ms]
        self._outbox.put(spool, frames, position)

    def _is_young(self, spool: Spool) -> bool:
        """Whether nothing in it can be too old, whatever a clock that was set forward says."""
        return spool.own and self._elapsed_s() - spool.begun_s < RESEND_S

    async def _rest(self) -> None:
        """Until the emitter or an answer wakes us, where there is nothing to do."""
        self.idle = True  # before the look: what is appended after it wakes us
        if not self._outbox.sendable and not any(spool.unread for spool in self._spools):
            await self._wait(KEEP_S)
        self.idle = False

    def _answered(self, producer: AIOKafkaProducer, batch: Batch, answer: asyncio.Future[Any]) -> None:
        """The broker has a batch, or the producer has given it up."""
        error = ConnectionAbortedError("the producer was closed") if answer.cancelled() else answer.exception()
        if producer is not self._producer:
            return  # given up with its producer: the next one has the batch
        if isinstance(error, MessageSizeTooLargeError):
            error = Unavailable(
                f"{self._log} takes no usage: the log grows, or this user may not write to its successor"
            )
        if error is not None:
            self._failure = self._failure or error
        else:
            self._outbox.done(batch)
            self._tally.acknowledge(len(batch.marks), own=batch.spool.own)
            offset = answer.result().offset
            if offset >= 0:  # a broker that recognised a duplicate may not know where the first one is
                self._acknowledged.remember(batch.spool.source, batch.partition, self._partitions, offset, batch.marks)
            if self.problem is not None:
                log.info("usage is sent again")
                self.problem = None
        self._wake.set()

    def _settle(self) -> None:
        """Delete what is acknowledged, and spools that are done."""
        for spool in list(self._spools):
            try:
                spool.settle(self._outbox.settled(spool))
                if spool.retired and spool.all_settled and self._elapsed_s() >= self._remove_again_s:
                    spool.remove()
                    self._spools.remove(spool)
                    self._outbox.forget(spool)
            except OSError as error:  # at worst it is sent again by a successor
                self._remove_again_s = self._elapsed_s() + REMOVE_AGAIN_S
                if str(error) != self._complaint:
                    log.warning("what is acknowledged cannot be removed from the spool: %s", error)
                self._complaint = str(error)
        if self._crowded and self._adopted <= ADOPTED_MAX // 2:
            self._crowded = False
            self._adopt_now.set()
        self._flushes.notify()


async def discard(producer: AIOKafkaProducer) -> None:
    """Close a producer, after STOP_DEADLINE_S even one that cannot deliver what it holds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_DEADLINE_S):
            await producer.stop()
            return
    # stop() waits for delivery and has no other way out: end the tasks that are its.
    parts = (producer._sender, producer._message_accumulator, producer.client)
    tasks = [task for task in asyncio.all_tasks() if any(_owner(task) is part for part in parts)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_DEADLINE_S)
    await producer.client.close()


def _owner(task: asyncio.Task[Any]) -> object:
    """The object whose method a task runs."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame.f_locals.get("self") if frame is not None else None
