"""The emitter: a service's usage, on disk before the call goes on, in Kafka soon after.

async with Emitter("broker:9092") as emitter:
    emitter.emit(surface="mcp", operation="search", account="acme", principal_kind="user", principal="u-1",
                 status="ok", latency_us=1200, quantities={"tokens_out": 311})
"""

import asyncio
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from tollway.connectors.acknowledged import Acknowledged
from tollway.connectors.emitter_options import (
    SPOOL_EVENTS_MAX,
    Limits,
    check_security,
    elapsed_s,
    spool_folder,
    unwritable,
)
from tollway.connectors.errors import Refused
from tollway.connectors.event import complete
from tollway.connectors.flush import Flushes, outstanding
from tollway.connectors.frame import pack
from tollway.connectors.outbox import Outbox
from tollway.connectors.spool import End, Spool, unforked
from tollway.connectors.tally import Tally
from tollway.schemas import encoder
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane
from tollway.schemas.topics import USAGE
from tollway.schemas.usage import FieldError

if TYPE_CHECKING:
    from tollway.connectors.sender import Sender

log = logging.getLogger("tollway.emitter")

SOURCE_S = 86_400
"""A source is minted anew after this; the fold forgets it 5 days after its birth."""
CLOSE_DEADLINE_S = 10.0
"""Of a context manager's end: what is not acknowledged by then stays for the successor."""
_RETRY_S = 1.0
_STEP_BACK_US = 1_000_000
"""A clock that is set back by more than this begins a new life: of the new time, and times ascend in each spool."""


class Emitted(NamedTuple):
    """Who emitted, in which lane, and the how manieth there: the event's identity in the log."""

    source: str
    lane: int
    sequence: int


class Emitter:
    """Thread-safe; after fork() a child has its own source and spool. Do not emit from a signal handler."""

    def __init__(
        self,
        bootstrap: str,
        *,
        spool_dir: str | Path | None = None,
        topic: str = USAGE.name,
        durability: Literal["disk", "memory"] = "disk",
        spool_bytes_max: int | None = None,
        spool_events_max: int = SPOOL_EVENTS_MAX,
        when_full: Literal["refuse", "drop_oldest"] = "refuse",
        fsync_interval_s: float | None = None,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        elapsed_s: Callable[[], float] = elapsed_s,
        **security: Any,
    ) -> None:
        """Nothing is sent before `start`.

        spool_dir: by default `default_spool_dir()`. Processes that share one send what a dead one of them left.
        durability: `disk` survives the death of the process, and that of the machine but for the last fsync_interval_s
        (None: the system's own write-back, some 30 s); `memory` survives nothing.
        spool_bytes_max: for the whole folder, as of at most 30 s ago (1 GiB; in memory 64 MiB); spool_events_max: for what
        this process has waiting. Beyond either: `refuse` the new event, or `drop_oldest`; both are counted.
        clock_us: the time of day; it may be set forward and back. elapsed_s: one that is never set.
        security: aiokafka's arguments named in SECURITY.
        Raises Refused where the folder cannot be written or an argument is out of range.
        """
        check_security(security)
        self._limits = Limits(durability, spool_bytes_max, spool_events_max, when_full, fsync_interval_s)
        self._bootstrap, self._topic, self._security = bootstrap, topic, security
        self._clock_us, self._elapsed_s = clock_us, elapsed_s
        self._root = spool_folder(spool_dir) if durability == "disk" else None
        self._autostart = False
        self._new_process()
        _emitters.add(self)
        try:
            self._new_life(clock_us())
        except OSError as error:
            raise unwritable(self._root, error) from error

    def _new_process(self) -> None:
        """Nothing of the parent's."""
        self._lock = threading.Lock()
        self._spools: list[Spool] = []
        self._life: Spool | None = None
        self._last_us = self._life_ends_us = 0
        self._life_ends_s = self._retry_s = 0.0
        self._tally, self._acknowledged, self._flushes = Tally(), Acknowledged(), Flushes()
        self._outbox = Outbox(self._limits.segment_bytes, self._limits.segment_events)
        self._sender: Sender | None = None
        self._closed = False

    def emit(self, **fields: Any) -> Emitted | None:
        """Take one call's usage: the fields of UsageEvent without `source` and `sequence`.

        Filled in where missing: event_id, occurred_at (now), quantities' `calls` (1).
        Returns None where it was refused (spool full, disk, closed: see `counters`): a call never fails for that.
        Raises FieldError for content that no one could bill: naming field, value and bound.
        """
        if "source" in fields or "sequence" in fields:
            name = "source" if "source" in fields else "sequence"
            raise FieldError(name, fields[name], "unknown_field", "the emitter sets it")
        with self._lock:
            now_us = self._clock_us()
            spool = self._life
            if spool is None or self._is_over(now_us):
                spool = self._renew(now_us)
            complete(fields, now_us, self._random_bits)
            account = fields.get("account")
            in_lane = lane(account) if account.__class__ is str and account.isascii() else 0
            sequence = self._sequences[in_lane] + 1
            fields["source"], fields["sequence"] = self._source, sequence
            value = encoder.encode(fields)
            if spool is None:
                return None
            frame = pack(now_us // 1000, sequence, in_lane, fields["account"].encode(), value)
            # Claimed first: what a signal handler raises in here may leave a sequence out, never use one twice.
            self._last_us = now_us
            self._sequences[in_lane] = sequence
            self._tally.emitted += 1
            taken = self._append(spool, frame, in_lane)
            if not taken:
                self._sequences[in_lane] = sequence - 1
                self._tally.emitted -= 1
            sender = self._sender
        if sender is not None and sender.idle:
            sender.wake()
        return Emitted(spool.source, in_lane, sequence) if taken else None

    def _is_over(self, now_us: int) -> bool:
        """Whether this life's day has passed, by either clock, or the clock was set back."""
        in_time = self._last_us - _STEP_BACK_US <= now_us < self._life_ends_us
        return not in_time or self._elapsed_s() >= self._life_ends_s

    def _append(self, spool: Spool, frame: bytes, in_lane: int) -> bool:
        """Make room if need be, then append; what is refused is counted. Under the lock."""
        while self._is_full(spool, len(frame)):
            if not (
                self._limits.when_full == "drop_oldest" and any(own.drop_oldest() for own in self._spools if own.own)
            ):
                self._tally.refused["full"] += 1
                return False
        try:
            spool.append(frame, in_lane)
        except OSError:
            self._tally.refused["disk"] += 1
            spool.make_room()
            return False
        return True

    def _is_full(self, spool: Spool, more: int) -> bool:
        if self._tally.waiting > self._limits.events_max:
            return True
        held = spool.size_bytes if len(self._spools) == 1 else sum(s.size_bytes for s in self._spools if s.own)
        others = self._sender.others_bytes if self._sender is not None else 0
        return held + others + more > self._limits.room_bytes

    def _renew(self, now_us: int) -> Spool | None:
        """A new source and spool: after a fork, and daily. None, counted, where that fails. Under the lock."""
        if self._closed:
            self._tally.refused["closed"] += 1
            return None
        try:
            if self._elapsed_s() < self._retry_s:
                raise OSError
            self._new_life(now_us)
        except OSError:
            self._tally.refused["disk"] += 1
            if (elapsed_s := self._elapsed_s()) >= self._retry_s:
                self._retry_s = elapsed_s + _RETRY_S
            return None
        if self._autostart and self._sender is None:
            self._start_in_thread()
        return self._life

    def _new_life(self, now_us: int) -> None:
        """Raises OSError."""
        source = uuid7_hex(now_us // 1000, int.from_bytes(os.urandom(10)))
        sizes = (self._limits.segment_bytes, self._limits.segment_events)
        with unforked:
            if self._root is None:
                spool = Spool(source, None, self._tally, sizes)
            else:
                spool = Spool.create(self._root, source, self._tally, sizes)
            self._spools.append(spool)
        spool.begun_s = self._elapsed_s()
        self._life_ends_s = spool.begun_s + SOURCE_S
        if self._life is not None:
            self._life.retired = True
        self._life, self._last_us, self._life_ends_us = spool, now_us, now_us + SOURCE_S * 1_000_000
        self._source, self._sequences = source, spool.sequences
        self._random_bits = random.Random(os.urandom(32)).getrandbits

    def start(self) -> Awaitable[None]:
        """Send in the background: in the running loop, or, where there is none, in a thread. Never waits for the broker."""
        if self._closed:
            raise Refused("the emitter is closed: make a new one")
        if self._sender is None or self._sender.ended.done():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self._start_in_thread()
            else:
                sender = self._new_sender()
                sender.loop = loop
                self._task = loop.create_task(sender.run())
                self._task.add_done_callback(sender.has_ended)
        return _Done()

    def _start_in_thread(self) -> None:
        run = self._new_sender().run
        threading.Thread(target=lambda: asyncio.run(run()), name="tollway-emitter", daemon=True).start()

    def _new_sender(self) -> "Sender":
        from tollway.connectors.sender import Sender  # aiokafka takes its time

        self._autostart = True
        self._sender = Sender(
            self._bootstrap,
            self._topic,
            self._security,
            self._root,
            self._spools,
            self._outbox,
            self._tally,
            self._acknowledged,
            self._flushes,
            clock_us=self._clock_us,
            elapsed_s=self._elapsed_s,
            fsync_interval_s=self._limits.fsync_interval_s,
        )
        return self._sender

    async def flush(self, deadline_s: float) -> dict[int, int]:
        """Wait until all that was emitted before is acknowledged; returns lane → events that are not, {} when all are."""
        ends, waiter = self._flushing()
        if waiter is not None:
            try:
                await asyncio.wait_for(asyncio.wrap_future(waiter), deadline_s)
            except TimeoutError:
                waiter.cancel()
        return outstanding(ends)

    def flush_sync(self, deadline_s: float) -> dict[int, int]:
        """`flush` for code without a loop."""
        ends, waiter = self._flushing()
        if waiter is not None:
            self._must_not_block()
            try:
                waiter.result(deadline_s)
            except TimeoutError:
                waiter.cancel()
        return outstanding(ends)

    def _flushing(self) -> tuple[list[End], Future[None] | None]:
        with self._lock:
            ends = [spool.end for spool in list(self._spools) if spool.own]
        running = self._sender is not None and not self._sender.ended.done()
        return ends, self._flushes.wait(ends) if running and outstanding(ends) else None

    def _must_not_block(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._sender is not None and self._sender.loop is loop:
            raise Refused("the emitter sends in this loop, which must not be blocked: await flush() or close()")

    async def close(self, deadline_s: float) -> dict[int, int]:
        """Refuse further events, flush, stop. What is not acknowledged (returned by lane) stays on disk for a successor."""
        self._close_intake()
        left = await self.flush(deadline_s)
        if self._sender is not None:
            self._sender.stop()
            await asyncio.wait([asyncio.wrap_future(self._sender.ended)], timeout=CLOSE_DEADLINE_S)
        self._leave()
        return left

    def close_sync(self, deadline_s: float) -> dict[int, int]:
        """`close` for code without a loop."""
        self._must_not_block()
        self._close_intake()
        left = self.flush_sync(deadline_s)
        if self._sender is not None:
            self._sender.stop()
            futures.wait([self._sender.ended], timeout=CLOSE_DEADLINE_S)
        self._leave()
        return left

    def _close_intake(self) -> None:
        with self._lock:
            self._closed, self._life = True, None

    def _leave(self) -> None:
        """Let go of the spools, so that a successor can take what is left."""
        _emitters.discard(self)
        for spool in self._spools:
            try:
                spool.settle(self._outbox.settled(spool))
                spool.close()
            except OSError as error:  # a full or broken disk: what is sent again counts once
                log.warning("the spool is left as it is: %s", error)
                spool.abandon()
        self._spools.clear()

    def acknowledged(self, source: str, lane: int, sequence: int) -> int | None:
        """Offset of an acknowledged event, of one of the newest 100,000; None where it is not acknowledged or older.

        None also where the broker recognised a repetition and no longer knew its place: `flush` counts it as acknowledged.
        """
        return self._acknowledged.offset(source, lane, sequence)

    @property
    def counters(self) -> dict[str, Any]:
        """See `Tally`; `refused` by reason (full, disk, closed), `waiting` events and `spooled_bytes` of this process."""
        spooled_bytes = sum(spool.waiting_bytes for spool in self._spools if spool.own)
        return {**self._tally.counts(), "waiting": self._tally.waiting, "spooled_bytes": spooled_bytes}

    @property
    def problem(self) -> str | None:
        """Why nothing is being sent just now, in one sentence."""
        return self._sender.problem if self._sender is not None else "not started"

    def _forked(self) -> None:
        closed = self._closed
        for spool in self._spools:
            spool.abandon()
        self._new_process()
        self._closed = closed

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        await self.close(CLOSE_DEADLINE_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self.close_sync(CLOSE_DEADLINE_S)


class _Done:
    """Awaitable, and done: `start` serves code with and without a loop."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


_emitters: "weakref.WeakSet[Emitter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    unforked.release()
    for emitter in list(_emitters):
        emitter._forked()


os.register_at_fork(before=unforked.acquire, after_in_parent=unforked.release, after_in_child=_after_fork_in_child)
