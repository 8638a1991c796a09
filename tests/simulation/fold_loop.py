"""An event loop of virtual time and processes: one seed decides who runs next; a process is killed, stopped and woken at will."""

import asyncio
import contextvars
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

HANDLES_MAX = 400_000
"""More callbacks than this in one `run_until` and nothing waits for time any more."""
SLICE_MAX = 12
"""Most callbacks of one process in a row."""


class Killed(BaseException):
    """The process is gone: nothing of it goes on, not even its handlers of ordinary errors."""


class Process:
    """What dies or stands still as one: its callbacks are its own, whoever schedules them."""

    def __init__(self, name: str) -> None:
        self.name, self.alive, self.frozen = name, True, False
        self.ready: deque[asyncio.Handle] = deque()

    def kill(self) -> None:
        """kill −9."""
        self.alive = False
        self.ready.clear()

    @staticmethod
    def current() -> "Process":
        """Whose code runs; the world's own outside of all. Raises Killed where it is dead."""
        process = _CURRENT.get()
        if not process.alive:
            raise Killed
        return process


OUTSIDE = Process("outside")
_CURRENT: contextvars.ContextVar[Process] = contextvars.ContextVar("process", default=OUTSIDE)


class Loop(asyncio.AbstractEventLoop):
    """Enough of an event loop for asyncio's own tasks, locks and timeouts. `now` is in seconds and never waits."""

    def __init__(self, dice: random.Random) -> None:
        self.now = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self._dice, self._count = dice, itertools.count()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._active: list[Process] = []
        self.failures: list[str] = []
        self.unended = 0
        self._closing = False
        OUTSIDE.ready.clear()

    # What asyncio asks for.

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._put(handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._count), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        if self._closing:
            coro.close()
            raise RuntimeError("the world is over")
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """At once: there are no threads here."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it goes to whoever awaits
            done.set_exception(error)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Killed):
            self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    # The world's hands.

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of a process."""
        context = contextvars.copy_context()
        context.run(_CURRENT.set, process)
        return self.create_task(coro, context=context)

    def after(self, delay: float, callback: Callable[[], Any]) -> None:
        """The world's own callback, whoever asks for it."""
        context = contextvars.copy_context()
        context.run(_CURRENT.set, OUTSIDE)
        self.call_later(delay, callback, context=context)

    def thaw(self, process: Process) -> None:
        """A stopped process goes on; what came due meanwhile is due now."""
        process.frozen = False
        if process.ready and process not in self._active:
            self._active.append(process)

    def run_until(self, when: float) -> None:
        """Run all that is due up to a time."""
        asyncio.events._set_running_loop(self)
        try:
            self._run(when)
        finally:
            asyncio.events._set_running_loop(None)
        self.now = max(self.now, when)

    def _run(self, when: float) -> None:
        left = HANDLES_MAX
        while True:
            if self._active:
                left -= self._slice(self._active[self._dice.randrange(len(self._active))])
                if left < 0:
                    raise RuntimeError("nothing waits for time any more")
                continue
            while self._timers and self._timers[0][2].cancelled():
                heapq.heappop(self._timers)
            if not self._timers or self._timers[0][0] > when:
                return
            self.now = max(self.now, self._timers[0][0])
            while self._timers and self._timers[0][0] <= self.now:
                handle = heapq.heappop(self._timers)[2]
                if not handle.cancelled():
                    self._put(handle)

    def _put(self, handle: asyncio.Handle) -> None:
        process: Process = handle._context.get(_CURRENT, OUTSIDE)  # type: ignore[attr-defined]
        if not process.alive:
            return
        process.ready.append(handle)
        if not process.frozen and process not in self._active:
            self._active.append(process)

    def _slice(self, process: Process) -> int:
        count = self._dice.randint(1, SLICE_MAX)
        for done in range(count):
            if not process.ready or process.frozen:
                self._active.remove(process)
                return done + 1
            handle = process.ready.popleft()
            if not handle.cancelled():
                handle._run()  # type: ignore[attr-defined]
        return count

    def close(self) -> None:
        """Tasks that will never end are ended without a word."""
        self._closing = True
        asyncio.events._set_running_loop(self)
        try:
            self._end_tasks()
        finally:
            asyncio.events._set_running_loop(None)

    def _end_tasks(self) -> None:
        for task in list(self.tasks):
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                try:
                    task.get_coro().close()  # type: ignore[union-attr]
                except (RuntimeError, Killed):
                    self.unended += 1  # it wanted to wait once more
            elif not task.cancelled():
                task.exception()
