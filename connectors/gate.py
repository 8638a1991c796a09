"""The gate: may this call pass, and up to what amount? (design §6; docs/gate.md)

async with Gate("redis://…", emitter) as gate:
    decision = await gate.authorize(Ask("acme", scopes_of("user", "u-1"), {"calls": 1, "tokens_out": (4000, 200)}, call=id))
    if decision.allowed:
        …                                       # the call
        await gate.settle(decision, surface="llm", operation="chat", …, quantities={"tokens_out": 311})
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from redis.asyncio.cluster import RedisCluster

from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.gate_calls import (
    authorize_call,
    capture_call,
    extend_call,
    fields_of,
    granted,
    refused,
    standing,
    void_call,
)
from tollway.connectors.gate_decision import (
    ALLOWED,
    CLOSED,
    CONFLICT,
    DENIED,
    DUPLICATE,
    FROZEN,
    UNKNOWN,
    Ask,
    Decision,
    Extension,
    Hold,
    Left,
    scopes_of,
)
from tollway.connectors.gate_holds import HOLDS_MAX, LaneMemory, Memory
from tollway.connectors.gate_keeper import Keeper, reassert
from tollway.connectors.gate_policy import Outages
from tollway.connectors.gate_wire import (
    AUTHORIZE,
    CAPTURE,
    EXTEND,
    VOID,
    Busy,
    ClusterWire,
    PooledWire,
    Slow,
    Wire,
)
from tollway.schemas.command import OUTAGES
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.usage import COUNTED_STATUSES

__all__ = ["Ask", "Decision", "Extension", "Gate", "Hold", "Left", "scopes_of"]

DEADLINE_S = 0.05
"""Of a decision, a re-assertion on the way included; then the policy's outage answer."""
GRACE_S = 900
"""An uncaptured hold expires this long after its time, by the lane's log time (the log's `hold_grace_s`)."""

log = logging.getLogger(__name__)

COUNTERS = ("late", "queued", "restored", "expired", "orphans", "unrecorded")
OUTAGE_WORDS = {"COLD": "cold", "GEN": "generation", "CLOCK": "clock", "STALE": "stale"}


class Gate:
    """One process life of a gate; make it in the process that uses it (after fork), in its loop."""

    def __init__(
        self,
        redis: str | RedisCluster,
        emitter: Emitter | None = None,
        *,
        deadline_s: float = DEADLINE_S,
        outage: str = "closed",
        unknown: str = "refuse",
        grace_s: int = GRACE_S,
        holds_max: int = HOLDS_MAX,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """redis: URL, or a cluster client, which the gate then closes. emitter: of the same process; settles what `settle` says.

        outage: the answer for accounts whose policy was never read. unknown: "refuse", or "default" (no limits; development).
        grace_s: the log's `hold_grace_s`. clock_ms: for the ids of holds and calls alone; windows and expiry are Redis' time.
        Raises Refused where an argument is out of range. Connects at the first call.
        """
        if outage not in OUTAGES:
            raise Refused(f"outage is {outage!r}: give one of {', '.join(OUTAGES)}")
        if unknown not in ("refuse", "default"):
            raise Refused(f"unknown is {unknown!r}: give refuse or default")
        self.emitter, self._deadline_s, self._unknown = emitter, deadline_s, "default" if unknown == "default" else ""
        self._grace_s, self._clock_ms = grace_s, clock_ms
        self._random_bits = random.Random(os.urandom(32)).getrandbits
        self.id = self._new_id()
        self._wire: Wire = PooledWire(redis) if isinstance(redis, str) else ClusterWire(redis)
        self._memory, self._outages = Memory(self.id, holds_max), Outages(outage)
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        """Decisions by verdict and by source; late, queued, restored (holds that Redis had lost), expired, orphans."""
        self._keeper = Keeper(
            self._wire, self._memory, self._outages, self.counters, emitter, grace_s * 1000, self._new_id
        )

    def _new_id(self) -> str:
        return uuid7_hex(self._clock_ms(), self._random_bits(74))

    async def authorize(self, ask: Ask) -> Decision:
        """One round trip; two where Redis has forgotten something. Raises nothing: an outage is a decision too."""
        started = time.monotonic()
        decision = await self._authorize(ask, started)
        self.counters[decision.verdict] += 1
        if decision.source != "gate":
            self.counters[decision.source] += 1
        return decision

    async def _authorize(self, ask: Ask, started: float) -> Decision:
        memory = self._memory.lane(ask.account)
        call, hold = ask.call or self._new_id(), self._new_id()
        if self._memory.full:
            return self._outages.answer(ask, "busy", started)
        try:
            reply = await self._answered(memory, lambda: self._ask(ask, call, hold, memory, started))
        except TimeoutError:
            return self._outages.answer(ask, "slow", started)
        except Unavailable as error:
            return self._outages.answer(ask, _reason(error), started)
        return self._decided(ask, call, hold, reply, started)

    async def _answered(self, memory: LaneMemory, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer of a Redis that knows what this gate holds: one that has forgotten is told, and asked again.

        A grant is not kept waiting for that: it stands, and the keeper tells. Raises Unavailable, TimeoutError.
        """
        ends_at = asyncio.get_running_loop().time() + self._deadline_s
        reply = await call()
        found = standing(reply)
        known = memory.learn(found)
        if known and found.word != "GEN":
            return reply
        if found.word == "OK":
            self._keeper.hurry()
            return reply
        async with asyncio.timeout_at(ends_at):
            if not known:
                await self._reassert(memory)
            if found.word == "GEN":
                reply = await call()
                if not memory.learn(standing(reply)):
                    self._keeper.hurry()
        return reply

    async def _reassert(self, memory: LaneMemory) -> None:
        await reassert(self._wire, memory, self._memory.gate, self._grace_s * 1000, self.counters, self._deadline_s)

    async def _ask(self, ask: Ask, call: str, hold: str, memory: LaneMemory, started: float) -> Any:
        keys, arguments = authorize_call(
            memory.me(self._memory.gate, self._grace_s * 1000), ask, call, hold, self._unknown
        )
        return await self._wire.call(
            AUTHORIZE, keys, arguments, self._deadline_s, lambda reply: self._orphan(ask, call, hold, reply, started)
        )

    def _orphan(self, ask: Ask, call: str, hold: str, reply: Any, started: float) -> None:
        """A grant came after its caller had been answered otherwise: the call is not executed under this hold."""
        if standing(reply).word == "OK":
            self.counters["orphans"] += 1
            found = granted(ask, call, reply[7]).hold
            self._memory.take(found, started, started + ask.ttl_s + self._grace_s).voided = True
            self._keeper.hurry()

    def _decided(self, ask: Ask, call: str, hold: str, reply: Any, started: float) -> Decision:
        word, outage, at_us, stale = reply[0].decode(), reply[4].decode(), int(reply[5]), reply[6]
        if outage:
            self._outages.learn(ask.account, outage)
        if word in OUTAGE_WORDS:
            return self._outages.answer(ask, OUTAGE_WORDS[word], started)
        common: dict[str, Any] = {"at_us": at_us, "staleness_ms": int(stale) if stale else None}
        if word in ("UNKNOWN", "FROZEN"):
            return Decision(UNKNOWN if word == "UNKNOWN" else FROZEN, ask, **common)
        if word in ("DENY", "CLOSED"):
            by, rows = refused(reply[7])
            return Decision(DENIED, ask, "limit" if word == "DENY" else CLOSED, refused_by=by, left=rows, **common)
        if word == "CONFLICT":
            return Decision(CONFLICT, ask, **common)
        found = granted(ask, call, reply[7])
        known = {"hold": found.hold, "up_to": found.up_to, "left": found.left, **common, "at_us": found.hold.at_us}
        if word == "DUP" and found.hold.id != hold:
            return Decision(DUPLICATE, ask, **known)
        self._memory.take(found.hold, started, started + ask.ttl_s + self._grace_s)
        if outage == "lease":
            self._outages.wants(ask, found.left, started)
        self._keeper.awake()
        return Decision(ALLOWED, ask, **known)

    async def settle(self, decision: Decision, **fields: Any) -> Emitted | None:
        """Emit the usage of an allowed call, then capture its hold. `fields` as of `Emitter.emit`.

        Sets account, hold, occurred_at and the stamp. None = the emitter refused it (its counters say why): the hold then
        stays until it expires. Raises Refused without an emitter, FieldError for content that no one could bill.
        """
        if self.emitter is None:
            raise Refused("the gate has no emitter: Gate(redis, emitter), or emit yourself and then capture()")
        hold = decision.hold if decision.allowed else None
        fields = {"account": decision.ask.account, **fields}
        if hold is not None:
            fields |= {"hold": hold.id, "occurred_at": hold.at_us}
        if decision.stamp:
            fields["attributes"] = {**(fields.get("attributes") or {}), **decision.stamp}
        emitted = self.emitter.emit(**fields)
        if hold is None:
            return emitted
        if emitted is None:
            self.counters["unrecorded"] += 1
            return None
        counts = fields.get("status") in COUNTED_STATUSES
        await self.capture(hold, {"calls": 1, **(fields.get("quantities") or {})} if counts else {}, emitted)
        return emitted

    async def capture(self, hold: Hold, used: Mapping[str, int], emitted: Emitted) -> str:
        """The hold becomes what the emitted usage used; call it after `emit()`. Safe to call again.

        Gives captured, late (it had expired; counted all the same), closed (its usage is folded already), conflict (captured
        for other usage), or queued: Redis did not answer, and the gate goes on trying.
        """
        now = time.monotonic()
        known = self._memory.take(hold, now, now + self._grace_s)
        if known.used is not None and (known.source, known.sequence) != (emitted.source, emitted.sequence):
            return "conflict"
        known.used, known.source, known.sequence = dict(used), emitted.source, emitted.sequence
        known.since_at = now
        self._keeper.awake()
        memory = self._memory.lane(hold.account)
        keys, arguments = capture_call(
            memory.me(self._memory.gate, self._grace_s * 1000), hold, known.used, emitted.source, emitted.sequence
        )
        try:
            found = standing(await self._wire.call(CAPTURE, keys, arguments, self._deadline_s))
        except Unavailable:
            self.counters["queued"] += 1
            self._keeper.hurry()
            return "queued"
        return self._keeper.captured(memory, known, found)

    async def void(self, hold: Hold) -> str:
        """The call will not be executed: gives voided, gone (expired), captured (refused), or queued. Not for a call that
        was sent and then timed out: that may have run."""
        now = time.monotonic()
        known = self._memory.take(hold, now, now + self._grace_s)
        if known.used is not None:
            return "captured"
        known.voided = True
        self._keeper.awake()
        keys, arguments = void_call(hold)
        try:
            found = standing(await self._wire.call(VOID, keys, arguments, self._deadline_s))
        except Unavailable:
            self._keeper.hurry()
            return "queued"
        self._memory.drop(hold)
        return {"OK": "voided", "DONE": "captured"}.get(found.word, "gone")

    async def extend(self, hold: Hold, totals: Mapping[str, int], ttl_s: int = 60) -> Extension:
        """Hold these totals (meter → units, not additions), for ttl_s from now. What is not granted changes nothing."""
        memory = self._memory.lane(hold.account)

        def call() -> Awaitable[Any]:
            me = memory.me(self._memory.gate, self._grace_s * 1000)
            return self._wire.call(EXTEND, *extend_call(me, hold, totals, ttl_s), self._deadline_s)

        try:
            reply = await self._answered(memory, call)
        except TimeoutError:
            return Extension(hold, False, "slow")
        except Unavailable as error:
            return Extension(hold, False, _reason(error))
        word = standing(reply).word
        if word != "OK":
            return Extension(hold, False, OUTAGE_WORDS.get(word, word.lower()))
        now = time.monotonic()
        longer = Hold(hold.id, hold.account, hold.call, hold.at_us, int(reply[4]), fields_of(reply[5]))
        known = self._memory.take(hold, now, now)
        known.hold, known.ends_at = longer, now + ttl_s + self._grace_s
        return Extension(longer, True)

    def stats(self) -> dict[str, Any]:
        """Counters, open holds, leases, and captures and voids that wait for Redis."""
        waiting = sum(each.voided or (each.used is not None and not each.told) for _, each in self._memory.all())
        return {**self.counters, "open": self._memory.open, "leases": len(self._outages.leases), "waiting": waiting}

    async def close(self) -> None:
        """Tell Redis what it was not told yet, once, give back unused leases, and disconnect. Open holds stay: their
        calls may still run, in another process."""
        await self._keeper.close()
        await self._wire.close()

    async def start(self) -> None:
        """Connect and load the scripts beforehand; a Redis that is away is met at the first call."""
        try:
            await self._wire.warm()
        except Unavailable as error:
            log.warning("gate: %s", error)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        await self.close()


def _reason(error: Unavailable) -> str:
    return "busy" if isinstance(error, Busy) else "slow" if isinstance(error, Slow) else "away"
