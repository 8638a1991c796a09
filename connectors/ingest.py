"""HTTP ingest: CloudEvents in, answered only once the broker has them. For services that are not Python.

Safe to repeat: an event is known by its `source` + `id` for an hour. What was not accepted is said for each event.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tollway.connectors.cloudevents import BATCH, SINGLE, parse, usage_of
from tollway.connectors.denied import Denied
from tollway.connectors.errors import Unavailable
from tollway.connectors.identity import Identity
from tollway.connectors.ingest_openapi import openapi
from tollway.schemas.usage import FieldError

BODY_BYTES_MAX = 1 << 20
EVENTS_MAX = 1_000
"""Of one batch."""
WAITING_MAX = 20_000
"""Events between arrival and the broker's answer; beyond it callers are told to come back."""
DEADLINE_S = 10.0
RETRY_AFTER_S = 1


class Log(Protocol):
    """Where accepted usage goes."""

    async def append(self, account: str, value: bytes) -> None:
        """Returns once the broker has it. Raises Unavailable."""
        ...


@dataclass
class Ingest:
    """What the endpoints share. `webhooks`: path → handler of a provider's signed events."""

    log: Log
    identity: Identity
    attributes: Collection[str] = ()
    webhooks: dict[str, Callable[[bytes, Request], Awaitable[Response]]] = field(default_factory=dict)
    body_bytes_max: int = BODY_BYTES_MAX
    events_max: int = EVENTS_MAX
    waiting_max: int = WAITING_MAX
    deadline_s: float = DEADLINE_S
    clock_us: Callable[[], int] = lambda: time.time_ns() // 1000
    waiting: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """accepted, unavailable, and refused events by reason, since the start."""

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/events", self._events, methods=["POST"]),
            Route("/openapi.json", self._openapi),
            Route("/health", self._health),
        ]
        for path, handler in self.webhooks.items():
            routes.append(Route(path, self._webhook(handler), methods=["POST"]))
        return Starlette(routes=routes, exception_handlers={Refusal: _refused, Denied: _denied})

    async def _events(self, request: Request) -> Response:
        caller = await self.identity.identify(request.headers.get("authorization"))
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (SINGLE, BATCH):
            raise Refusal(415, "unsupported_media_type", f"content-type is {kind!r}: give {SINGLE} or {BATCH}")
        try:
            found = parse(await self._body(request))
        except FieldError as error:
            raise Refusal(400, error.reason, str(error)) from error
        events = found if kind == BATCH else [found]
        if not isinstance(events, list):
            raise Refusal(400, "bad_batch", f"the body is {type(found).__name__}: give a JSON array of CloudEvents")
        if len(events) > self.events_max:
            raise Refusal(400, "too_many_events", f"the batch has {len(events)} events: give at most {self.events_max}")
        if self.waiting + len(events) > self.waiting_max:
            raise Refusal(429, "busy", f"{self.waiting} events wait for the broker: come back", RETRY_AFTER_S)
        self.waiting += len(events)
        try:
            results = await asyncio.gather(*(self._one(event, caller) for event in events))
        finally:
            self.waiting -= len(events)
        return answer(results, single=kind == SINGLE)

    async def _one(self, event: Any, caller: Any) -> dict[str, Any]:
        named = {name: event.get(name) for name in ("id", "source")} if isinstance(event, dict) else {}
        try:
            usage, value = usage_of(event, caller, self.clock_us(), self.attributes)
            async with asyncio.timeout(self.deadline_s):
                await self.log.append(usage["account"], value)
        except FieldError as error:
            self.counts[error.reason] += 1
            return {**named, "status": "refused", "reason": error.reason, "field": error.field, "detail": str(error)}
        except (Unavailable, TimeoutError):
            self.counts["unavailable"] += 1
            return {**named, "status": "unavailable", "detail": "the broker has not answered: send it again, unchanged"}
        self.counts["accepted"] += 1
        return {**named, "status": "accepted"}

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than its bound."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.body_bytes_max:
                raise Refusal(
                    413, "too_large", f"the body is larger than {self.body_bytes_max} bytes: send fewer events"
                )
            chunks.append(chunk)
        return b"".join(chunks)

    def _webhook(
        self, handler: Callable[[bytes, Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await handler(await self._body(request), request)

        return endpoint

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(self.events_max))

    async def _health(self, request: Request) -> Response:
        """What it is doing; whether Kafka answers shows in `unavailable`."""
        return JSONResponse({"waiting": self.waiting, "counts": dict(self.counts)})


class Refusal(Exception):
    """A request that is refused whole."""

    def __init__(self, status: int, reason: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.reason, self.detail, self.retry_after_s = status, reason, detail, retry_after_s


def answer(results: Sequence[dict[str, Any]], *, single: bool) -> Response:
    """202 all accepted; 503 some must be sent again; 422 none can be taken; 207 some of each."""
    statuses = {result["status"] for result in results}
    if "unavailable" in statuses:
        code = 503
    elif "refused" in statuses:
        code = 207 if "accepted" in statuses else 422
    else:
        code = 202
    headers = {"Retry-After": str(RETRY_AFTER_S)} if code == 503 else None
    return JSONResponse(results[0] if single else {"results": list(results)}, code, headers)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    problem = {"type": "about:blank", "title": refusal.reason, "status": refusal.status, "detail": refusal.detail}
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s is not None else None
    return JSONResponse(problem, refusal.status, headers, media_type="application/problem+json")


async def _denied(request: Request, denied: Exception) -> Response:
    assert isinstance(denied, Denied)
    return JSONResponse(denied.problem, denied.status, dict(denied.headers), media_type="application/problem+json")
