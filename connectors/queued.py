"""A sink that talks to a network: a bounded queue in memory, sent in order by a task of its own."""

import asyncio
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from tollway.connectors.errors import TollwayError, Unavailable
from tollway.connectors.sinks import Local

EVENTS_MAX = 100_000
BATCH_MAX = 500
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 10.0

log = logging.getLogger("tollway.sinks")


class Queued(Local, ABC):
    """`record` never waits. What is queued is gone when the process dies: the emitter's spool is what survives that."""

    def __init__(self, name: str, events_max: int, clock_us: Callable[[], int]) -> None:
        super().__init__(clock_us)
        self.name, self._events_max = name, events_max
        self._queue: deque[dict[str, Any]] = deque()
        self._sending = asyncio.Lock()
        self._news: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._guard = threading.Lock()
        self.lost: Counter[str] = Counter()
        """Reason → events refused or given up; `full` = the queue was."""
        self.failure = ""
        """Why the last attempt failed; empty after one that did not."""

    async def start(self) -> None:
        """Begin to send, in this loop. Until then events queue up."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"sink.{self.name}")

    async def close(self) -> None:
        """Stop sending at once: `flush` first. Connections are the caller's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    def record(self, **fields: Any) -> bool:
        """False where the queue is full. Thread-safe; raises FieldError for content that no one could bill."""
        event = self._completed(fields)
        with self._guard:
            if len(self._queue) >= self._events_max:
                self.lost["full"] += 1
                return False
            self._queue.append(event)
        if self._loop is not None and self._news is not None:
            self._loop.call_soon_threadsafe(self._news.set)
        return True

    async def flush(self, deadline_s: float) -> int:
        """Send now, for at most so long; returns how many events still wait."""
        until = time.monotonic() + deadline_s
        delay_s = RETRY_FIRST_S
        while self._queue and time.monotonic() < until:
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await self._send_some()
                    delay_s = RETRY_FIRST_S
            except TimeoutError:
                break
            except Unavailable as error:
                self._failed(error)
                await asyncio.sleep(min(delay_s, max(0.0, until - time.monotonic())))
                delay_s = min(2 * delay_s, RETRY_MAX_S)
        return len(self._queue)

    @abstractmethod
    async def send(self, events: list[dict[str, Any]]) -> None:
        """Send a batch of at most BATCH_MAX. Raises Unavailable to be called again with the same, or with more behind it."""

    async def _send_some(self) -> None:
        async with self._sending:
            some = [self._queue[at] for at in range(min(BATCH_MAX, len(self._queue)))]
            if some:
                await self.send(some)
                for _ in some:
                    self._queue.popleft()
        self.failure = ""

    async def _run(self) -> None:
        assert self._news is not None
        delay_s = RETRY_FIRST_S
        while True:
            if not self._queue:
                self._news.clear()
                if not self._queue:
                    await self._news.wait()
            try:
                await self._send_some()
                delay_s = RETRY_FIRST_S
            except Unavailable as error:
                self._failed(error)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    def _failed(self, error: TollwayError) -> None:
        if str(error) != self.failure:  # a sink that is down would fill the log
            log.warning("sink %s: %s; %d events wait", self.name, error, len(self._queue))
        self.failure = str(error)
