"""quota totals → Redis: a view, never awaited by the fold. What Redis has not acknowledged stays dirty (design §6).

One task a worker. The engine notes each offset whose totals may show; a turn takes what is due (`quota_jobs`) as it stands at
the noted offset, and sends it in flights of at most eight calls and a thousand totals: no gate waits longer than about a
millisecond. A Redis that is away, flushed, restarted from an older copy or taken over by another fold is found by the answers.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any

from redis.asyncio import Redis

from tollway.connectors.errors import TollwayError, Unavailable
from tollway.connectors.redis import FLIGHT_CALLS_MAX, check, fly
from tollway.streams.quota_jobs import Figures, Job, View, due
from tollway.streams.quota_lane import WHOLE, Phase
from tollway.streams.quota_lots import WEIGHT_MAX
from tollway.streams.state import PartitionState

log = logging.getLogger(__name__)

PACE_S = 0.05
"""Shortest time between two turns: a busy total is written twenty times a second, not at every batch."""
IDLE_S = 0.5
"""Longest time between two turns: sweeps, ends of rewrites and halted lanes come due without news."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
OTHER_LOG = "Redis holds the lanes of another log: give this log a database of its own, or flush that one"
LAST_WORDS_S = 0.5
"""A revoked partition's totals get this long to reach Redis; its next owner refreshes them anyway."""


class QuotaView:
    """Writes the totals of the assigned partitions to Redis. `start()` it, `close()` it; nothing it does raises into the fold."""

    def __init__(
        self, client: Redis, epoch: str, *, pace_s: float = PACE_S, allow_volatile: bool = False, instance: str = ""
    ) -> None:
        """`instance` names this life of the fold in the parts of its batches; made up unless given."""
        self._client, self._epoch, self._pace_s, self._allow_volatile = client, epoch, pace_s, allow_volatile
        self._tokens = _tokens(instance or uuid.uuid4().hex)
        self._views: dict[int, View] = {}
        self._figures: Figures = Counter()
        self._error: str | None = None
        self._failing_since_ms: int | None = None
        self._checked = False
        self._flying = self._closed = False
        self._news, self._turned = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin. Raises Refused where Redis may forget keys; a Redis that is away is waited for."""
        try:
            await self._check()
        except Unavailable as error:
            self._failed(error)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="quota view")

    async def close(self) -> None:
        """Stop at once and disconnect. What is dirty is refreshed by the next owner of its partition."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._client.aclose()

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """These partitions are ours: all that they hold is refreshed."""
        now = time.monotonic()
        self._views |= {number: View.of(state, now) for number, state in states.items()}
        self._news.set()

    async def revoked(self, partitions: Iterable[int]) -> None:
        """No longer ours: what is dirty gets half a second, unless Redis is away."""
        gone = set(partitions)
        if self._error is None and self._task is not None:
            await self._drained(gone, LAST_WORDS_S)
        for number in gone:
            self._views.pop(number, None)

    def note(self, partition: int, state: PartitionState) -> None:
        """Totals up to the state's next offset may show. Cheap; called after each settled turn of the engine."""
        view = self._views.get(partition)
        if view is None:
            return
        view.note(state)
        if view.owed:  # under load a turn seldom finds totals at a noted offset; here they are at one
            view.owed = False
            try:
                view.jobs = due(view, self._epoch, self._tokens, time.monotonic(), self._figures)
            except Exception as error:  # noqa: BLE001 - a fault of the view is no fault of the fold
                self._failed(error)
        self._news.set()

    async def drained(self, deadline_s: float) -> bool:
        """Wait until Redis shows everything that was noted; False where it does not within `deadline_s`."""
        return await self._drained(set(self._views), deadline_s)

    async def _drained(self, partitions: set[int], deadline_s: float) -> bool:
        until = time.monotonic() + deadline_s
        while not all(self._shown(number) for number in partitions):
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._turned.clear()
            self._news.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._turned.wait()
        return True

    def _shown(self, number: int) -> bool:
        view = self._views.get(number)
        if view is None:
            return True
        live = all(lane.phase is Phase.LIVE and view.off >= lane.begun for lane in view.lanes.values())
        told = not (view.jobs or view.quota.closes or view.quota.policies or view.quota.dirty().any())
        return live and told and view.current and not self._flying

    def stats(self) -> dict[str, Any]:
        """For status and health: counters since the start, dirty totals, lanes by phase, and records that lanes lag behind."""
        dirty: Counter[int] = Counter()
        for view in self._views.values():
            dirty.update({lane: count for lane, count in enumerate(view.quota.dirty().tolist()) if count})
        lanes = [(view, lane) for view in self._views.values() for lane in view.lanes.values()]
        phases = Counter(lane.phase for _, lane in lanes)
        return {
            **self._figures,
            "error": self._error or (OTHER_LOG if phases[Phase.HALTED] else None),
            "failing_since_ms": self._failing_since_ms,
            "dirty": dirty.total(),
            "lanes": {str(phase): count for phase, count in phases.items()},
            "lag": {
                lane.number: view.off - max(lane.expect or 0, 0)
                for view, lane in lanes
                if lane.number in dirty or lane.phase is not Phase.LIVE
            },
        }

    async def _run(self) -> None:
        retry_s = RETRY_FIRST_S
        while not self._closed:  # a cancellation alone may be swallowed by a wait_for below us
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._news.wait()
            self._news.clear()
            started = time.monotonic()
            try:
                await self._turn()
                retry_s, self._error, self._failing_since_ms = RETRY_FIRST_S, None, None
            except Exception as error:  # noqa: BLE001 - the view must outlive anything; it is red meanwhile, and retries
                self._failed(error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
            self._turned.set()
            if self._due_at_once():
                self._news.set()
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(max(0.0, self._pace_s - (time.monotonic() - started)))

    def _due_at_once(self) -> bool:
        """Whether lanes wait for nothing but the next turn, as they do at a start."""
        now = time.monotonic()
        return self._error is None and any(
            not lane.waits(view.off, now)
            and (lane.phase in (*WHOLE, Phase.BEGIN) or (lane.phase is Phase.GATES and now >= lane.end_at))
            for view in self._views.values()
            if view.current
            for lane in view.lanes.values()
        )

    def _failed(self, error: Exception) -> None:
        """Said once a failure, not once a retry."""
        text = str(error) or type(error).__name__
        self._checked = False
        self._figures["failures"] += 1
        if self._failing_since_ms is None:
            self._failing_since_ms = time.time_ns() // 1_000_000
        if text != self._error:
            self._error = text
            log.warning("quota view: %s; retrying", text, exc_info=None if isinstance(error, TollwayError) else error)
        if not isinstance(error, TollwayError):
            for view in self._views.values():  # what was taken when it failed is not known
                view.refresh()
        for view in self._views.values():
            view.ask_again()

    async def _check(self) -> None:
        if not self._checked:
            await check(self._client, allow_volatile=self._allow_volatile)
            self._checked = True

    async def _turn(self) -> None:
        """Everything that is due, once."""
        await self._check()
        now = time.monotonic()
        jobs: list[Job] = []
        for view in self._views.values():
            if view.jobs:
                jobs, view.jobs = jobs + view.jobs, []
            elif view.current:
                jobs += due(view, self._epoch, self._tokens, now, self._figures)
            else:
                view.owed = True
        if not jobs:
            return
        waiting = deque(jobs)
        self._flying = True
        try:
            await self._fly(waiting)
        finally:
            self._flying = False
            for job in waiting:
                job.abandoned()

    async def _fly(self, waiting: deque[Job]) -> None:
        """Flight by flight; a job leaves `waiting` when it is answered for good."""
        while waiting:
            flight: list[Job] = []
            weight = 0
            for job in waiting:
                if flight and (len(flight) == FLIGHT_CALLS_MAX or weight + job.weight > WEIGHT_MAX):
                    break
                flight.append(job)
                weight += job.weight
            replies = await fly(self._client, [job.call for job in flight])
            now = time.monotonic()
            for job, reply in zip(flight, replies, strict=True):
                more = job.answered(reply, now)
                waiting.popleft()
                if more:
                    waiting.append(job)


def _tokens(instance: str) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{instance}-{number}"
