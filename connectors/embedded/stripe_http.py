"""The stand-in's HTTP face: Stripe's paths, keys, idempotency, refusals, and the faults that were ordered."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from tollway.connectors.embedded.stripe_journal import Journal
from tollway.connectors.embedded.stripe_state import ApiError, StripeState, page

EVENTS = "/v1/billing/meter_events"
FAULTS = ("500", "429", "hang", "drop", "accept_500", "accept_hang", "accept_drop", "accept_cut")
"""What the next requests get instead of an answer. `accept_…`: the request takes effect, the caller never learns it;
`cut`: the answer ends in the middle."""
HANG_MAX_S = 120
POLL_S = 0.1
Json = dict[str, Any]
Judge = Callable[[Json, int], tuple[Json, Json]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Clock:
    """The stand-in's own time: runs `rate` times as fast as the machine's (0 stands still), and can be set."""

    def __init__(self) -> None:
        self.entry: Json = {"kind": "clock", "machine_s": 0.0, "at_s": 0.0, "rate": 1.0}

    def now_s(self) -> int:
        return int(self._now())

    def _now(self) -> float:
        return float(self.entry["at_s"] + (time.time() - self.entry["machine_s"]) * self.entry["rate"])

    def moved(self, at_s: float | None = None, rate: float | None = None) -> Json:
        """The journal entry of a change made now."""
        return {
            "kind": "clock",
            "machine_s": time.time(),
            "at_s": self._now() if at_s is None else at_s,
            "rate": self.entry["rate"] if rate is None else rate,
        }


class Server:
    """Requests → judged by `StripeState` → journal → answer. One event loop: a request is judged and applied in one go."""

    def __init__(self, journal: Journal, key: str) -> None:
        self.state, self.clock, self._journal, self._key = StripeState(), Clock(), journal, key
        self.counters: Counter[str] = Counter()
        self.settings: dict[str, int] = {"summary_delay_s": 0, "latency_ms": 0}
        self.faults: list[Json] = []
        self.away_until_s: int | None = None
        self._pairs: set[tuple[str, str]] = set()
        self._keys: set[str] = set()
        for entry in journal.read():
            self.apply(entry)

    def apply(self, entry: Json) -> None:
        """Take a journal entry in."""
        if entry["kind"] == "clock":
            self.clock.entry = entry
        elif entry["kind"] == "settings":
            self.settings = entry["settings"]
        else:
            self.state.apply(entry)

    def record(self, *entries: Json) -> None:
        """Apply entries and put them down together."""
        for entry in entries:
            self.apply(entry)
        self._journal.append(list(entries))

    async def durable(self) -> None:
        await self._journal.durable()

    # Requests

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every request: away, key, faults, refusals in Stripe's form."""
        if not request.path.startswith("/v1/"):
            return await handler(request)
        self.counters["requests"] += 1
        if self.away_until_s is not None and self.clock.now_s() < self.away_until_s:
            return await _drop(request)
        try:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self._key.encode()):
                raise ApiError(401, f"Invalid API Key provided: {key[:8]}****")
            return await self._faulty(request, handler)
        except ApiError as error:
            await self.durable()  # a refusal speaks of what others did: that must be on disk first
            self.counters[f"refused_{error.status}"] += 1
            return _answer(error.body, error.status)

    async def _faulty(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        fault = self._next_fault(request)
        if fault == "429":
            raise ApiError(429, "Too many requests.", kind="rate_limit_error", code="rate_limit")
        response = await handler(request) if not fault or fault.startswith("accept_") else web.Response()
        what = (fault or "").removeprefix("accept_")
        if what == "500":
            return _answer({"error": {"type": "api_error", "message": "An error occurred."}}, 500)
        if what == "hang":
            for _ in range(int(HANG_MAX_S / POLL_S)):
                if request.transport is None or request.transport.is_closing():
                    break
                await asyncio.sleep(POLL_S)
        if what == "cut":
            half = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
            await half.prepare(request)
            await half.write(b'{"object":')
        return await _drop(request) if what else response

    def _next_fault(self, request: web.Request) -> str | None:
        for fault in self.faults:
            if request.method == fault["method"] and request.path.startswith(fault["path"]):
                fault["count"] -= 1
                self.faults = [left for left in self.faults if left["count"] > 0]
                self.counters[f"fault_{fault['fault']}"] += 1
                return str(fault["fault"])
        return None

    async def post(self, request: web.Request, judge: Judge) -> web.Response:
        """A POST: replayed by its idempotency key, or judged, applied, on disk, answered."""
        body = await request.text()
        key = request.headers.get("Idempotency-Key")
        fingerprint = hashlib.sha256(f"{request.path}\n{body}".encode()).hexdigest()
        if key is None:
            return _answer(await self._execute(judge, form(body), []))
        if key in self._keys:
            message = "There is currently another in-progress request using this idempotency key."
            raise ApiError(409, message, kind="idempotency_error", code="idempotency_key_in_use")
        self._keys.add(key)
        try:
            reply = self.state.replayed(key, fingerprint, self.clock.now_s())
            if reply:
                await self.durable()
                self.counters["replayed"] += 1
                return _answer(reply["answer"], headers={"Idempotent-Replayed": "true"})
            return _answer(await self._execute(judge, form(body), [{"key": key, "fingerprint": fingerprint}]))
        finally:
            self._keys.discard(key)

    async def _execute(self, judge: Judge, params: Json, keys: list[Json]) -> Json:
        now_s = self.clock.now_s()
        entry, answer = judge(params, now_s)
        self.record(entry, *({"kind": "reply", **key, "at_s": now_s, "answer": answer} for key in keys))
        await self.durable()
        self.counters[entry["kind"]] += 1
        return answer

    async def meter_event(self, request: web.Request) -> web.Response:
        """POST /v1/billing/meter_events: one call at a time for each customer and meter."""
        params = form(await request.text())
        payload = params.get("payload")
        customer = payload.get("stripe_customer_id") if isinstance(payload, dict) else None
        pair = (str(customer), str(params.get("event_name")))
        if pair in self._pairs:
            message = "This object cannot be accessed right now because another API request is accessing it."
            raise ApiError(429, message, code="lock_timeout")
        self._pairs.add(pair)
        try:
            if self.settings["latency_ms"]:
                await asyncio.sleep(self.settings["latency_ms"] / 1000)
            return await self.post(request, lambda params, now_s: self.state.judge_event(params, now_s, _id("mtre_")))
        finally:
            self._pairs.discard(pair)


def form(body: str) -> Json:
    """A form's fields, `a[b]=c` nested, as text."""
    fields: Json = {}
    for name, value in parse_qsl(body, keep_blank_values=True):
        outer, *inner = re.findall(r"[^\[\]]+", name) or [name]
        into = fields
        for deeper in inner:
            into, outer = into.setdefault(outer, {}), deeper
            if not isinstance(into, dict):
                raise ApiError(400, f"Invalid request: {name} is both a value and a hash.", param=name)
        into[outer] = value
    return fields


def api_routes(server: Server) -> Iterable[web.RouteDef]:
    """Stripe's own paths."""
    state, now_s = server.state, server.clock.now_s

    async def create_meter(request: web.Request) -> web.Response:
        return await server.post(request, lambda params, at_s: state.judge_meter(params, at_s, _id("mtr_test_")))

    async def change_meter(request: web.Request) -> web.Response:
        known, change = request.match_info["id"], request.match_info.get("change", "update")
        return await server.post(request, lambda params, at_s: state.judge_meter_change(known, change, params, at_s))

    async def create_customer(request: web.Request) -> web.Response:
        return await server.post(request, lambda params, at_s: state.judge_customer(params, at_s, _id("cus_")))

    async def cancel(request: web.Request) -> web.Response:
        return await server.post(request, state.judge_cancel)

    async def list_meters(request: web.Request) -> web.Response:
        params, meters = form(request.query_string), list(state.meters.values())[::-1]
        status = params.get("status")
        return _answer(page((m for m in meters if status in (None, m["status"])), params, request.path))

    async def list_customers(request: web.Request) -> web.Response:
        params, customers = form(request.query_string), list(state.customers.values())[::-1]
        email = params.get("email")
        return _answer(page((c for c in customers if email in (None, c["email"])), params, request.path))

    async def get_meter(request: web.Request) -> web.Response:
        return _answer(state.meter(request.match_info["id"]))

    async def get_customer(request: web.Request) -> web.Response:
        return _answer(state.customer(request.match_info["id"]))

    async def summaries(request: web.Request) -> web.Response:
        params = form(request.query_string)
        server.counters["summaries"] += 1
        found = state.summaries(request.match_info["id"], params, now_s(), server.settings["summary_delay_s"])
        return _answer(page(found, params, request.path))

    return [
        web.post(EVENTS, server.meter_event),
        web.post("/v1/billing/meter_event_adjustments", cancel),
        web.post("/v1/billing/meters", create_meter),
        web.get("/v1/billing/meters", list_meters),
        web.get("/v1/billing/meters/{id}", get_meter),
        web.post("/v1/billing/meters/{id}", change_meter),
        web.post("/v1/billing/meters/{id}/{change:deactivate|reactivate}", change_meter),
        web.get("/v1/billing/meters/{id}/event_summaries", summaries),
        web.post("/v1/customers", create_customer),
        web.get("/v1/customers", list_customers),
        web.get("/v1/customers/{id}", get_customer),
    ]


def _answer(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    own = {"Request-Id": _id("req_"), "Stripe-Should-Retry": "true" if status >= 500 or status == 409 else "false"}
    return web.json_response(body, status=status, headers={**own, **(headers or {})})


async def _drop(request: web.Request) -> web.StreamResponse:
    """Close the connection without a word."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
