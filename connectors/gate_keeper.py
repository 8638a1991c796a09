"""A gate's background duties: look at its lanes, re-assert, retry captures and voids, forget what is settled, keep leases."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tollway.connectors.emitter import Emitter
from tollway.connectors.errors import Unavailable
from tollway.connectors.gate_calls import (
    Standing,
    authorize_call,
    capture_call,
    granted,
    meta_call,
    reassert_call,
    standing,
    void_call,
)
from tollway.connectors.gate_decision import Ask
from tollway.connectors.gate_holds import CAPTURED_KEEP_S, LaneMemory, Memory, Open
from tollway.connectors.gate_policy import LEASE_S, Key, Lease, Outages
from tollway.connectors.gate_wire import AUTHORIZE, CAPTURE, META, REASSERT, VOID, Wire

LOOK_S = 1.0
"""Lanes with open holds are looked at this often: a rewrite waits 2 s for gates."""
RETRY_S = 0.1
DEADLINE_S = 0.5
"""Of one call of the keeper: nobody waits for it."""
AT_ONCE = 100
"""Calls of the keeper under way at the same time."""
CAPTURED = {"OK": "captured", "LATE": "late", "DUP": "captured", "CONFLICT": "conflict", "GONE": "closed"}

log = logging.getLogger(__name__)


async def reassert(
    wire: Wire, memory: LaneMemory, gate: str, grace_ms: int, counters: "Counter[str]", deadline_s: float
) -> None:
    """Tell Redis all open holds of a lane, then adopt its generation. Raises Unavailable; then nothing is adopted."""
    before = memory.gen
    async with memory.turn:
        while memory.gen == before:  # else somebody else has just done it
            waiting = [each for each in memory.holds.values() if not each.voided]
            answers: list[Standing] = []
            for start in range(0, len(waiting), AT_ONCE):
                some = [
                    _reassert_one(wire, memory, each, gate, grace_ms, deadline_s)
                    for each in waiting[start : start + AT_ONCE]
                ]
                answers += await asyncio.gather(*some)
            if not answers:
                answers = [standing(await wire.call(META, *meta_call(memory.number, gate), deadline_s))]
            gens = {found.gen for found in answers}
            if "" in gens:
                raise Unavailable("Redis has no such lane yet: its fold has to write it first")
            if len(gens) == 1:
                counters["restored"] += sum(found.word == "MADE" for found in answers)
                last = max(answers, key=lambda found: found.count)
                memory.gen, memory.floor, memory.off = last.gen, last.count, last.off


async def _reassert_one(
    wire: Wire, memory: LaneMemory, each: Open, gate: str, grace_ms: int, deadline_s: float
) -> Standing:
    me = memory.me(gate, grace_ms)
    keys, arguments = reassert_call(me, each.hold, each.used, each.source, each.sequence)
    found = standing(await wire.call(REASSERT, keys, arguments, deadline_s))
    if each.used is not None and found.word in ("OK", "MADE", "DUP"):
        each.told = True
    return found


class Keeper:
    """One task, started with the first hold."""

    def __init__(
        self,
        wire: Wire,
        memory: Memory,
        outages: Outages,
        counters: "Counter[str]",
        emitter: Emitter | None,
        grace_ms: int,
        new_id: Callable[[], str],
    ) -> None:
        self._wire, self._memory, self._outages, self._counters = wire, memory, outages, counters
        self._emitter, self._grace_ms, self._new_id = emitter, grace_ms, new_id
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def awake(self) -> None:
        """There is something to keep."""
        if (self._task is None or self._task.done()) and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="gate keeper")

    def hurry(self) -> None:
        """Redis was not told something: try again soon."""
        self.awake()
        self._news.set()

    async def close(self) -> None:
        """One last try of what waits; unused leases are given back."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for lease in self._outages.leases.values():
            if not lease.drawn:
                self._memory.take(lease.hold, 0, 0).voided = True
        await self._retry()

    async def _run(self) -> None:
        looked_at = 0.0
        while not self._closed:
            try:
                waits = await self._retry()
                now = time.monotonic()
                if now - looked_at >= LOOK_S:
                    looked_at = now
                    await self._look(now)
                    await self._take_leases(now)
            except Unavailable:
                waits = True
            except Exception:
                log.exception("gate keeper")
                self._counters["keeper_failures"] += 1
                waits = True
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if waits else LOOK_S):
                    if waits:
                        await asyncio.Event().wait()
                    else:
                        await self._news.wait()

    async def _retry(self) -> bool:
        """Captures and voids that Redis has not answered, in order; whether any still waits."""
        waiting = [
            (memory, each)
            for memory, each in self._memory.all()
            if each.voided or (each.used is not None and not each.told)
        ]
        for memory, each in waiting:
            try:
                await self._tell(memory, each)
            except Unavailable:
                return True
        return False

    async def _tell(self, memory: LaneMemory, each: Open) -> None:
        if each.used is None:
            await self._wire.call(VOID, *void_call(each.hold), DEADLINE_S)
            self._memory.drop(each.hold)
            return
        me = memory.me(self._memory.gate, self._grace_ms)
        call = capture_call(me, each.hold, each.used, each.source, each.sequence)
        self.captured(memory, each, standing(await self._wire.call(CAPTURE, *call, DEADLINE_S)))

    def captured(self, memory: LaneMemory, each: Open, found: Standing) -> str:
        """A capture was answered; the hold stays remembered until its usage is folded."""
        each.told = True
        current = memory.learn(found)
        if not current:
            self.hurry()
        if found.word == "LATE":
            self._counters["late"] += 1
        if found.word == "CONFLICT" or (found.word == "GONE" and current and found.gen == memory.gen):
            self._memory.drop(each.hold)  # closed by its usage, or not ours; nothing to re-assert
        return CAPTURED.get(found.word, found.word.lower())

    async def _look(self, now: float) -> None:
        """Where lanes with open holds stand; re-assert where Redis has forgotten, forget what is settled."""
        for memory in [memory for memory in self._memory.lanes.values() if memory.holds]:
            found = standing(await self._wire.call(META, *meta_call(memory.number, self._memory.gate), DEADLINE_S))
            if not memory.learn(found):
                await reassert(self._wire, memory, self._memory.gate, self._grace_ms, self._counters, DEADLINE_S)
            for each in list(memory.holds.values()):
                if self._settled(memory, each, now):
                    self._memory.drop(each.hold)

    def _settled(self, memory: LaneMemory, each: Open, now: float) -> bool:
        if each.used is None:
            expired = now >= each.ends_at
            self._counters["expired"] += expired
            return expired
        if not each.told:
            return False
        offset = None
        if self._emitter is not None:
            offset = self._emitter.acknowledged(each.source, memory.number, each.sequence)
        return memory.off > offset if offset is not None else now - each.since_at > CAPTURED_KEEP_S

    async def _take_leases(self, now: float) -> None:
        wanted, self._outages.wanted = self._outages.wanted, {}
        for key, (ask, shares) in wanted.items():
            await self._take_lease(key, ask, shares, now)
        for key, lease in list(self._outages.leases.items()):
            if lease.ends_at <= now:
                del self._outages.leases[key]
                if not lease.drawn:
                    self._memory.take(lease.hold, now, now).voided = True

    async def _take_lease(self, key: Key, ask: Ask, shares: dict[str, int], now: float) -> None:
        former = self._outages.leases.pop(key, None)
        if former is not None and not former.drawn:
            self._memory.take(former.hold, now, now).voided = True
        memory = self._memory.lane(ask.account)
        call = self._new_id()
        amounts: dict[str, int | tuple[int, int]] = {meter: (units, 1) for meter, units in shares.items()}
        own = replace(ask, call=call, amounts=amounts, ttl_s=LEASE_S)
        me = memory.me(self._memory.gate, self._grace_ms)
        reply = await self._wire.call(AUTHORIZE, *authorize_call(me, own, call, self._new_id(), ""), DEADLINE_S)
        found = standing(reply)
        if not memory.learn(found) or found.word != "OK":
            return
        taken = granted(own, call, reply[7])
        self._memory.take(taken.hold, now, now + LEASE_S + self._grace_ms // 1000)
        self._outages.leases[key] = Lease(taken.hold, now + LEASE_S, dict(taken.up_to))
