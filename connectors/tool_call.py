"""A tool call of either MCP library: attributed, asked, run, recorded. What differs between the two stays in `mcp`, `fastmcp`."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from tollway.connectors.call import Amounts, Call, Count
from tollway.connectors.context import Origin, origin_from, within
from tollway.connectors.denied import Denied
from tollway.connectors.identity import resolve
from tollway.connectors.meter import Meter
from tollway.connectors.principal import SCOPE_KEY, Directory, Principal
from tollway.connectors.routes import UNMATCHED

NAMES_MAX = 256
"""Names of tools whose refusals and failures are recorded under them; of more, under `(unmatched)`."""

R = TypeVar("R")


class Tools:
    """What both libraries' seams are told, and the way of one call through them."""

    def __init__(
        self,
        meter: Meter,
        *,
        directory: Directory | None = None,
        ask: Mapping[str, Amounts] | None = None,
        count: Count | None = None,
        baggage: bool = True,
    ) -> None:
        """directory: the verified claims of the library's own authentication → principal. Without it: whom `MeterMiddleware`

        identified in front of MCP, else the meter's principal, as on stdio.
        ask: tool → what a gate is asked beside the one call. count: a tool's result → what it used.
        baggage: False where callers must not say which run or session a call is part of.
        """
        self.meter, self.directory, self._ask, self._count = meter, directory, ask or {}, count
        self._baggage = baggage
        self._names: set[str] = set()

    async def run(
        self,
        name: str,
        meta: Mapping[str, Any] | None,
        request: Any,
        claims: Mapping[str, Any] | None,
        execute: Callable[[Call], Awaitable[R]],
    ) -> R:
        """Execute a call. meta: its `_meta`; request: the HTTP request, None on stdio; claims: of its token, where it has one.

        Raises Denied, metered, and what the tool raises.
        """
        with within(origin_of(meta, request) if self._baggage else Origin()):
            call = self.meter.observe(name, surface="mcp", ask=self._ask.get(name))
            call.record_as = self._name(name)
            try:
                call.principal = await self._principal(request, claims)
            except Denied as denied:
                call.begin()
                raise self.meter.refuse(call, denied) from denied
            async with call:
                result = await execute(call)
                if call.record_as == UNMATCHED:
                    self._names.discard(name)
                call.count(self._count, result)
                return result

    def _name(self, name: str) -> str:
        """What is refused, or raises, may be no tool at all: only so many names are taken on trust."""
        if name in self._names or len(self._names) < NAMES_MAX:
            self._names.add(name)
            return name
        return UNMATCHED

    async def _principal(self, request: Any, claims: Mapping[str, Any] | None) -> Principal | None:
        """Raises Denied."""
        if self.directory is not None and claims is not None:
            return await resolve(self.directory, claims)
        found = request.scope.get(SCOPE_KEY) if request is not None else None
        return found if isinstance(found, Principal) else None


def ended(call: Call, *, is_error: bool, unknown: bool = False, unfinished: bool = False) -> None:
    """Tell the call how its tool ended. unknown: there is no such tool; unfinished: it asked its caller for more input."""
    call.record_as = UNMATCHED if unknown else None
    if unfinished and not call.quantities:
        call.unused = True  # the caller calls again with what was asked: that is the call
    if is_error and call.status is None:
        call.status = "error"


def origin_of(meta: Mapping[str, Any] | None, request: Any) -> Origin:
    """What a call is part of: out of `_meta`, where W3C's names stand unprefixed (SEP-414), else out of HTTP's headers."""
    told: Mapping[str, Any] = meta or {}
    if request is not None and "traceparent" not in told and "baggage" not in told:
        told = request.headers
    found = (told.get("traceparent"), told.get("baggage"))
    traceparent, baggage = (value if isinstance(value, str) else None for value in found)
    return origin_from(traceparent, baggage) if traceparent or baggage else Origin()


def claims_of(token: Any) -> dict[str, Any] | None:
    """The claims of a library's AccessToken; None without one. Where it has them they stand alone: a library may give a

    `client_id` of its own making.
    """
    if token is None:
        return None
    known = {"client_id": token.client_id, "sub": token.subject}
    return dict(token.claims or {name: value for name, value in known.items() if value})
