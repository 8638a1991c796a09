"""ASGI middleware: every HTTP request attributed, asked, metered and settled. Pure ASGI: one line for a service.

app.add_middleware(MeterMiddleware, meter=Meter(emitter), identity=Bearer(…))
"""

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

from tollway.connectors.call import Amounts, Call, Count
from tollway.connectors.context import Origin, origin_from, within
from tollway.connectors.denied import MEDIA_TYPE, Denied
from tollway.connectors.errors import Refused
from tollway.connectors.identity import Identity, problem
from tollway.connectors.meter import Meter
from tollway.connectors.principal import SCOPE_KEY, Principal
from tollway.connectors.routes import UNMATCHED, Routes, operation_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALL = "tollway.call"
"""Key of the ASGI scope: the call, as `current_call()` gives it."""


class MeterMiddleware:
    """Meters HTTP; websockets and lifespan pass through untouched, also by identity and gate."""

    def __init__(
        self,
        app: App,
        meter: Meter,
        *,
        identity: Identity | None = None,
        principal: Callable[[Scope], Principal | None] | None = None,
        ask: Mapping[str, Amounts] | Callable[[Scope, str], Amounts | None] | None = None,
        count: Count | None = None,
        operation: Callable[[Scope], str] | None = None,
        unmetered: Collection[str] = (),
        call_id_header: str | None = None,
        baggage: bool = True,
        refusals_only: bool = False,
    ) -> None:
        """identity: who calls, by the Authorization header; whom it refuses gets 401, 403 or 503.

        principal: who calls, by a service's own middleware, read from the scope: after the call, or before it where a gate
        must be asked. Without either it is the meter's principal, or whom the handler sets in `current_call().principal`.
        ask: operation → what a gate is asked beside the one call. count: each chunk of the response's body → what it used.
        operation: for applications without routes; keep its values few. unmetered: operations that pass by, such as `GET /health`.
        call_id_header: such as `idempotency-key`; a second request with one is then refused by the gate, not executed: as a
        duplicate where method, path and query are the same (the body is not read), else as a conflict.
        baggage: False where callers must not say which run or session a call is part of.
        refusals_only: identify, and meter whom that refuses; what is let through is metered further in, as by MCP.
        """
        if identity is not None and principal is not None:
            raise Refused("identity and principal are both given: only one can say who calls")
        self.app, self.meter, self.identity, self.principal = app, meter, identity, principal
        self._ask, self._count, self._own_operation = ask, count, operation
        self._unmetered = frozenset(unmetered)
        self._call_id_header = call_id_header.lower().encode() if call_id_header else None
        self._baggage, self._refusals_only = baggage, refusals_only
        self._routes = Routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        operation = self.operation(scope)
        if operation in self._unmetered:
            await self.app(scope, receive, send)
            return
        with within(origin_of(scope) if self._baggage else Origin()):
            call = self.meter.observe(operation, surface="rest", ask=self._amounts(scope, operation))
            exchange = _Exchange(call, receive, send, self._count)
            try:
                await self._admit(scope, call)
            except Denied as denied:
                await exchange.answer(denied)
                return
            if self._refusals_only:
                await self.app(scope, receive, send)
            else:
                await self._run(scope, call, exchange)

    async def _admit(self, scope: Scope, call: Call) -> None:
        """Raises Denied, metered."""
        call.begin()
        if self.identity is not None:
            try:
                call.principal = await self.identity.identify(authorization_of(scope))
            except Denied as denied:
                raise self.meter.refuse(call, denied) from denied
            scope[SCOPE_KEY] = call.principal
        elif self.principal is not None and self.meter.gate is not None:
            call.principal = self.principal(scope)
        if self._refusals_only:
            return
        if self._call_id_header is not None and (given := header(scope, self._call_id_header)):
            who = call.principal or self.meter.principal
            call.call_id = _digest(who.account, who.kind, who.id, given)
            call.fingerprint = _digest(scope["method"], scope["path"], scope.get("query_string", b"").decode("latin-1"))
        await self.meter.authorize(call)

    async def _run(self, scope: Scope, call: Call, exchange: "_Exchange") -> None:
        scope[CALL] = call
        call.enter()
        error: BaseException | None = None
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Denied as denied:  # by a metered function of the service
            error = denied
            if exchange.code is not None:
                raise
            await exchange.answer(denied)
        except BaseException as raised:
            error = raised
            raise
        finally:
            call.leave()
            self._attribute(scope, call)
            exchange.ended(error)
            call.end(error)

    def _attribute(self, scope: Scope, call: Call) -> None:
        if self.principal is not None and call.principal is None:
            try:
                call.principal = self.principal(scope)
            except Exception as error:  # noqa: BLE001 - the service's own reading of its scope; the call is answered already
                self.meter.fault("unattributed", error)

    def operation(self, scope: Scope) -> str:
        """`GET /users/{id}`: few, however many paths there are."""
        if self._own_operation is not None:
            return self._own_operation(scope)
        routes = getattr(self.app, "routes", None)
        if routes is None:
            routes = getattr(scope.get("app"), "routes", None)
        if routes is None:
            return operation_of(scope["method"], "*")
        path, root = scope["path"], scope.get("root_path", "")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            path = path[len(root) :]
        return operation_of(scope["method"], self._routes.template(routes, scope["method"], path))

    def _amounts(self, scope: Scope, operation: str) -> Amounts | None:
        if self._ask is None:
            return None
        return self._ask(scope, operation) if callable(self._ask) else self._ask.get(operation)


class _Exchange:
    """What goes between server and application, looked at as it passes."""

    def __init__(self, call: Call, receive: Receive, send: Send, count: Count | None) -> None:
        self._call, self._receive, self._send, self._count = call, receive, send, count
        self.code: int | None = None
        self._complete = self._gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.code = message["status"]
            if self._call.decision is not None:
                rows = [(name.lower().encode(), value.encode()) for name, value in self._call.decision.headers()]
                message = {**message, "headers": [*message.get("headers", ()), *rows]}
        elif kind == "http.response.body":
            if self._count is not None and message.get("body"):
                self._call.count(self._count, message["body"])
            if not message.get("more_body", False):
                self._completed()
        elif kind in ("http.response.pathsend", "http.response.zerocopysend") and not message.get("more_body", False):
            self._completed()
        try:
            await self._send(message)
        except OSError:
            self._gone = True
            raise

    def _completed(self) -> None:
        self._complete = True
        self._call.stop()

    def ended(self, error: BaseException | None) -> None:
        """Tell the call how it ended: by what the caller was answered, unless it raised on the way."""
        call = self._call
        if self._gone and not self._complete:
            call.attributes.setdefault("ended", "disconnected")
        if call.status is not None:
            return
        if self.code is not None and (error is None or self._complete or self._gone):
            call.http(self.code)
            if call.status == "ok" and call.operation.endswith(UNMATCHED):
                call.status = "error"
        elif error is None:
            call.status = "error"  # no answer at all

    async def answer(self, denied: Denied) -> None:
        """Refuse, in the caller's words."""
        body = denied.body()
        rows = [("content-type", MEDIA_TYPE), ("content-length", str(len(body))), *denied.headers]
        headers = [(name.lower().encode(), value.encode()) for name, value in rows]
        await self._send({"type": "http.response.start", "status": denied.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value; None where it is missing."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def origin_of(scope: Scope) -> Origin:
    """What the caller says that its call is part of."""
    traceparent = baggage = None
    for key, value in scope["headers"]:
        if key == b"traceparent":
            traceparent = value.decode("latin-1")
        elif key == b"baggage":
            baggage = value.decode("latin-1") if baggage is None else f"{baggage},{value.decode('latin-1')}"
    return origin_from(traceparent, baggage) if traceparent or baggage else Origin()


def authorization_of(scope: Scope) -> str | None:
    """The value of the Authorization header. Raises Denied where there are two: two readers could take one each."""
    values = [value.decode("latin-1") for key, value in scope["headers"] if key == b"authorization"]
    if len(values) > 1:
        raise Denied(400, problem(400, "Who calls is not known", "Give one Authorization header", "two_tokens"))
    return values[0] if values else None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
