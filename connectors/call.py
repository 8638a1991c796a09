"""One call while it runs: what it is, what it has used so far, and how it ended."""

import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tollway.connectors.denied import Denied, status_of_http
from tollway.connectors.principal import Principal

if TYPE_CHECKING:
    from tollway.connectors.gate_decision import Decision
    from tollway.connectors.meter import Meter

T = TypeVar("T")
Amounts = Mapping[str, int | tuple[int, int]]
"""Meter → units, or (ask, least): up to `ask`, not below `least`."""
Count = Callable[[Any], Mapping[str, int]]
"""A result, or one item of a stream → what it used."""

_current: "ContextVar[Call | None]" = ContextVar("tollway_call", default=None)


def current_call() -> "Call | None":
    """The call that the asking code is part of; None outside of one."""
    return _current.get()


class Call:
    """A call under way: `Meter.observe` makes one, `with` or `async with` runs it. For one task or thread at a time.

    `principal`, `operation` and `status` may be set until it ends, `fields` takes any other field of UsageEvent.
    """

    def __init__(
        self,
        meter: "Meter",
        operation: str,
        surface: str,
        principal: Principal | None,
        ask: Amounts | None,
        fields: dict[str, Any],
    ) -> None:
        self.meter, self.operation, self.surface, self.principal = meter, operation, surface, principal
        self.ask, self.fields = ask, fields
        self.record_as: str | None = None
        """What its usage calls it, where that is not `operation`: names that callers make up must not be many."""
        self.call_id = self.fingerprint = ""
        """For a gate: the same id at every retry of a call, and what is called."""
        self.status: str | None = None
        """Set by hand it stands, whatever is raised."""
        self.quantities: dict[str, int] = {}
        self.attributes: dict[str, str] = {}
        self.decision: Decision | None = None
        """The gate's, where one was asked."""
        self.unused = False
        """Set to True where nothing was executed: no usage is recorded, and the hold is given back."""
        self.ended_ns: int | None = None
        """Set by `stop`: where the clock stops before the call has ended."""
        self.begun_us = self.begun_ns = 0
        self._token: Token[Call | None] | None = None

    def add(self, **units: int) -> None:
        """Count more of these meters: `add(tokens_out=12)`."""
        quantities = self.quantities
        for meter, more in units.items():
            quantities[meter] = quantities.get(meter, 0) + more

    def set(self, **units: int) -> None:
        """These meters are so much in all, as providers report it at the end of a stream."""
        self.quantities.update(units)

    def http(self, code: int) -> None:
        """It ended with this HTTP status."""
        self.status = status_of_http(code)

    def granted(self, meter: str) -> int | None:
        """What the gate allows of a meter; None where none was asked for it."""
        return self.decision.up_to.get(meter) if self.decision is not None else None

    def count(self, count: Count | None, item: Any) -> None:
        """Add what `count` finds in an item. A fault in it is the meter's, not the call's."""
        if count is not None:
            try:
                self.add(**count(item))
            except Exception as error:  # noqa: BLE001 - the service's own counting; counted and logged by the meter
                self.meter.fault("uncounted", error)

    def counted(self, items: Iterable[T], count: Count) -> Iterator[T]:
        """The same items, each counted as it passes."""
        for item in items:
            self.count(count, item)
            yield item

    async def counted_async(self, items: AsyncIterable[T], count: Count) -> AsyncIterator[T]:
        """`counted` for an async stream."""
        async for item in items:
            self.count(count, item)
            yield item

    def stop(self) -> None:
        """The caller has its answer: what comes after counts, but is no latency."""
        if self.ended_ns is None:
            self.ended_ns = self.meter.clock_ns()

    def begin(self) -> None:
        """Start the clock, without becoming the current call."""
        self.begun_us, self.begun_ns = self.meter.clock_us(), self.meter.clock_ns()

    async def begin_asking(self) -> None:
        """Start the clock and ask the gate, where there is one. Raises Denied, metered."""
        self.begin()
        if self.meter.gate is None:
            self.meter.admit(self)
        else:
            await self.meter.authorize(self)

    def end(self, error: BaseException | None) -> None:
        """Record it, once. Never raises."""
        if error is not None and self.status is None:
            self.status = self._status_of(error)
        self.meter.finish(self)

    def _status_of(self, error: BaseException) -> str:
        if isinstance(error, GeneratorExit):
            self.attributes.setdefault("ended", "closed")
            return "ok"
        if not isinstance(error, Exception):
            self.attributes.setdefault("ended", "cancelled")
        if isinstance(error, Denied):
            self.attributes.setdefault("refused", error.reason)
        return status_of_exception(error, self.meter.statuses)

    def enter(self) -> None:
        """Become the current call."""
        self._token = _current.set(self)

    def leave(self) -> None:
        token, self._token = self._token, None
        if token is not None:
            with suppress(ValueError):  # a generator that is closed elsewhere: that context never had it
                _current.reset(token)

    def __enter__(self) -> Self:
        """Raises Denied, metered, for an operation that the principal is not bound to; Refused where the meter has a gate."""
        self.begin()
        self.meter.admit(self)
        self.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self.leave()
        self.end(e)

    async def __aenter__(self) -> Self:
        """Ask the gate, where there is one. Raises Denied, metered, where the call may not go on."""
        await self.begin_asking()
        self.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.leave()
        self.end(e)


def status_of_exception(error: BaseException, statuses: Mapping[type[BaseException], str]) -> str:
    """The status of a call that raised: as `statuses` says, by the code of our own or Starlette's exceptions, else error.

    Other exceptions with a status code are somebody else's answer to us, not ours to the caller.
    """
    for kind in type(error).__mro__:
        if kind in statuses:
            return statuses[kind]
    if isinstance(error, Denied):
        return error.usage_status
    starlette = sys.modules.get("starlette.exceptions")
    if starlette is not None and isinstance(error, starlette.HTTPException):
        return status_of_http(error.status_code)
    return "error"
