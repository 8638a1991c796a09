"""The meter: every call is timed, counted and recorded, however it ends, and never fails for it.

meter = Meter(emitter)
async with meter.observe("summarise", surface="agent", principal=principal) as call:
    call.add(tokens_out=311)
"""

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from tollway.connectors.call import Amounts, Call
from tollway.connectors.context import Origin, current_origin
from tollway.connectors.denied import Denied
from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.errors import Refused
from tollway.connectors.gating import ask_for, bind, denied_by, not_allowed
from tollway.connectors.principal import ANONYMOUS, Principal
from tollway.connectors.refusals import SECOND_US, Refusals
from tollway.connectors.sinks import KafkaSink, Sink
from tollway.schemas.usage import COUNTED_STATUSES, OPERATION_BYTES_MAX, STATUSES, SURFACES, FieldError

if TYPE_CHECKING:
    from tollway.connectors.gate import Gate

OPEN_REFUSALS_MAX = 10_000
HOLD_S = 60
REFUSED = frozenset(("denied", "rate_limited", "payment_required"))
_ONE_CALL = {"calls": 1}

log = logging.getLogger("tollway.meter")


class Meter:
    """Thread-safe. After fork() a child has folds of its own; those of the parent are the parent's."""

    def __init__(
        self,
        sink: Sink | Emitter,
        *,
        gate: "Gate | None" = None,
        principal: Principal = ANONYMOUS,
        surface: str = "rest",
        statuses: Mapping[type[BaseException], str] | None = None,
        attributes: Mapping[str, str] | None = None,
        hold_s: int = HOLD_S,
        open_refusals_max: int = OPEN_REFUSALS_MAX,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """gate: asked before each call, told after it what was used; the sink is then an emitter of the same process.

        principal: who calls where nobody else is named: a batch job's own, or the stranger of a service.

        statuses: exception type → the status of a call that raised it. attributes: of every event.
        hold_s: how long a call may take before its hold expires, 1 to 3,600. open_refusals_max: folds of refused calls kept for up to a second; beyond, the oldest is recorded early.
        Raises Refused for a surface or status that does not exist.
        """
        for name, values, known in (
            ("surface", [surface], SURFACES),
            ("statuses", list((statuses or {}).values()), STATUSES),
        ):
            for value in values:
                if value not in known:
                    raise Refused(f"{name} has {value!r}: give one of {', '.join(known)}")
        if open_refusals_max < 1:
            raise Refused(f"open_refusals_max is {open_refusals_max!r}: give at least 1")
        self.sink, self.principal, self.surface = sink, principal, surface
        self.statuses, self.attributes = dict(statuses or {}), dict(attributes or {})
        self.clock_us, self.clock_ns = clock_us, clock_ns
        self.gate, self.hold_s = gate, hold_s
        emitter = sink.emitter if isinstance(sink, KafkaSink) else sink
        self._record: Callable[..., Emitted | bool | None]
        self._record = emitter.emit if isinstance(emitter, Emitter) else emitter.record
        if gate is not None and not isinstance(emitter, Emitter):
            raise Refused(f"sink is a {type(sink).__name__}: a gate needs an Emitter, whose sequence settles its holds")
        self._open_refusals_max = open_refusals_max
        self._new_process()
        _meters.add(self)

    def _new_process(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refusals = Refusals(self._open_refusals_max)
        self._armed_until = 0.0
        self._settling: set[asyncio.Task[str]] = set()
        self.failure: str | None = None
        """The last thing that went wrong in metering itself, in one sentence."""

    def observe(
        self,
        operation: str,
        *,
        surface: str | None = None,
        principal: Principal | None = None,
        ask: Amounts | None = None,
        **fields: Any,
    ) -> Call:
        """A call, to be run by `with` or `async with`: timed, recorded once at its end, what it raised raised again.

        ask: meter → units, or (ask, least), that a gate is asked for beside the one call. fields: any other of UsageEvent.
        """
        return Call(self, operation, surface or self.surface, principal, ask, fields)

    def admit(self, call: Call) -> None:
        """Raises Denied, metered, for an operation that the principal is not bound to; Refused where a gate must be asked."""
        if self.gate is not None:
            raise Refused("the meter has a gate, which only `async with` can ask: use it, or a meter without a gate")
        self._admit(call, current_origin())

    def _admit(self, call: Call, origin: Origin) -> Principal:
        principal = call.principal or self.principal
        if principal.scopes:
            bind(call.fields, principal, origin)
        if principal.operations and not principal.may(call.operation):
            raise self.refuse(call, not_allowed(principal, call.operation))
        return principal

    async def authorize(self, call: Call) -> None:
        """Ask the gate. Raises Denied, metered, where it refuses; Refused for an `ask` that no gate takes."""
        origin = current_origin()
        principal = self._admit(call, origin)
        if self.gate is not None:
            decision = await self.gate.authorize(ask_for(call, principal, origin, self.hold_s))
            call.decision = decision
            if not decision.allowed:
                raise self.refuse(call, denied_by(decision))

    def refuse(self, call: Call, denied: Denied) -> Denied:
        """Record a call that is not executed; gives what to raise."""
        call.status = denied.usage_status
        call.attributes["refused"] = denied.reason
        self.finish(call)
        return denied

    def finish(self, call: Call) -> None:
        """Record a call that has ended. What goes wrong here is counted, never raised."""
        try:
            gate, decision = self.gate, call.decision
            hold = decision.hold if decision is not None and decision.allowed else None
            if call.unused:
                self._tell("unused")
                if gate is not None and hold is not None:
                    self._later_on(gate.void(hold))
                return
            fields = self._fields(call)
            if gate is not None and hold is not None:
                fields["hold"], fields["occurred_at"], fields["account"] = hold.id, hold.at_us, hold.account
                used = fields["quantities"] if fields["status"] in COUNTED_STATUSES else {}
                emitted = self._take(fields)
                if emitted is not None:  # else it stays until it expires: the call did run
                    self._later_on(gate.capture(hold, used, emitted))
            elif fields["status"] in REFUSED and not call.quantities:
                self._fold(fields)
            else:
                self._take(fields)
        except Exception as error:  # noqa: BLE001 - a call never fails for its metering; counted and logged
            self.fault("failed", error)

    def _fields(self, call: Call) -> dict[str, Any]:
        ended_ns = call.ended_ns if call.ended_ns is not None else self.clock_ns()
        kind, name, account = (call.principal or self.principal)[:3]
        fields: dict[str, Any] = current_origin().fields()
        fields.update(call.fields)
        fields["occurred_at"] = call.begun_us
        fields["surface"], fields["operation"] = call.surface, bounded(call.record_as or call.operation)
        fields["account"], fields["principal_kind"], fields["principal"] = account, kind, name
        fields["status"] = call.status or "ok"
        fields["latency_us"] = max(0, ended_ns - call.begun_ns) // 1000
        fields["quantities"] = {**_ONE_CALL, **call.quantities}
        stamp = call.decision.stamp if call.decision is not None else None
        if self.attributes or call.attributes or stamp:
            given = fields.get("attributes") or {}
            fields["attributes"] = {**given, **self.attributes, **call.attributes, **(stamp or {})}
        return fields

    def _later_on(self, settling: Coroutine[Any, Any, str]) -> None:
        """Tell the gate without making the call wait; the gate itself goes on trying where Redis does not answer."""
        task = asyncio.get_running_loop().create_task(settling)
        self._settling.add(task)
        task.add_done_callback(self._has_settled)

    def _has_settled(self, task: "asyncio.Task[str]") -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fault("unsettled", error)

    def _take(self, fields: dict[str, Any]) -> Emitted | None:
        """To the sink; the emitter's answer where there is one."""
        try:
            taken = self._record(**fields)
        except FieldError as error:
            self.fault("invalid", error)
            return None
        except Exception as error:  # noqa: BLE001 - whatever a sink raises is its own; counted and logged
            self.fault("failed", error)
            return None
        self._tell("recorded" if taken else "refused")
        return taken if isinstance(taken, Emitted) else None

    def _tell(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def fault(self, name: str, error: BaseException) -> None:
        """Count a fault in metering; log it where it is another one than the last."""
        text = f"{type(error).__name__}: {error}"
        with self._lock:
            self._counts[name] += 1
            told, self.failure = self.failure == text, text
        if not told:  # one that stays would fill the log
            log.error("metering %s: %s", name, text, exc_info=error)

    def _fold(self, fields: dict[str, Any]) -> None:
        with self._lock:
            ready = self._refusals.add(fields)
            ready += self._refusals.due(self.clock_us())
            delay_s = self._arm()
        for event in ready:
            self._take(event)
        if delay_s:
            self._later(delay_s)

    def _arm(self) -> float:
        """Seconds until the open folds are due, where nobody is waiting for that already; else 0. Under the lock."""
        now = time.monotonic()
        if not len(self._refusals) or now < self._armed_until:
            return 0.0
        delay_s = 1.0 - self.clock_us() % SECOND_US / SECOND_US + 0.01
        self._armed_until = now + delay_s + 1.0  # a loop that ends before its timer fires is not waited for again
        return delay_s

    def _later(self, delay_s: float) -> None:
        try:
            asyncio.get_running_loop().call_later(delay_s, self._close_due)
        except RuntimeError:
            timer = threading.Timer(delay_s, self._close_due)
            timer.daemon = True
            timer.start()

    def _close_due(self) -> None:
        with self._lock:
            self._armed_until = 0.0
            ready = self._refusals.due(self.clock_us())
            delay_s = self._arm()
        for event in ready:
            self._take(event)
        if delay_s:
            self._later(delay_s)

    def close_refusals(self) -> None:
        """Record the folds that are open, as at the end of a process."""
        with self._lock:
            ready = self._refusals.close()
        for event in ready:
            self._take(event)

    async def flush(self, deadline_s: float) -> int:
        """Record what is folded, tell the gate what it was not told, flush the sink; returns events that are not yet safe."""
        self.close_refusals()
        await self.settled(deadline_s)
        left = await self.sink.flush(deadline_s)
        return left if isinstance(left, int) else sum(left.values())

    async def settled(self, deadline_s: float) -> None:
        """Wait until the gate has heard of every call that has ended: it holds what they used, no more."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=deadline_s)

    @property
    def counters(self) -> dict[str, int]:
        """Events recorded, refused by the sink, failed (the sink raised), invalid (no event); refusals that joined another's

        event, folds closed early; unused calls; results that could not be counted; holds unsettled by a fault.
        """
        with self._lock:
            folds = {"joined": self._refusals.joined, "closed_early": self._refusals.closed_early}
            return {**self._counts, **folds, "open_refusals": len(self._refusals)}


def bounded(operation: str) -> str:
    """At most OPERATION_BYTES_MAX bytes of it."""
    if len(operation) * 4 <= OPERATION_BYTES_MAX:
        return operation
    return operation.encode()[:OPERATION_BYTES_MAX].decode(errors="ignore")


_meters: "weakref.WeakSet[Meter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for meter in list(_meters):
        meter._new_process()


@atexit.register
def _at_exit() -> None:
    for meter in list(_meters):
        meter.close_refusals()


os.register_at_fork(after_in_child=_after_fork_in_child)
