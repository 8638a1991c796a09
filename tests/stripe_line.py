"""The line to Stripe on a bad day: what becomes of each customer's next meter event is the test's to say, and is noted."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web

from tests.stripe_standin import Standin
from tollway.connectors.stripe import Delivered, StripePort

EVENTS = "/v1/billing/meter_events"
ANSWER_S = 2
KEPT = {"authorization", "content-type", "idempotency-key"}
BUSY = {"error": {"type": "rate_limit_error", "code": "rate_limit", "message": "Too many requests."}}
Fate = Literal["not taken", "taken", "killed", "foreign", "unheard", "busy"]
"""Of a customer's meter events while Stripe is away. The first is "not taken" or "taken", and its answer lost; or taken, and
its sender "killed" on the spot; or its identifier was taken already, by a "foreign" event of another customer. All
that follow are "unheard" (never arrive, no answer), those of a killed sender's successor "busy" (429)."""


class Line:
    """Forwards to the stand-in. `fates` not empty: Stripe is away but for what they say; `cut`: nothing else passes either."""

    def __init__(self, standin: Standin, stranger: str, clock_s: Callable[[], int], kill: Callable[[], None]) -> None:
        self._standin, self._stranger, self._clock_s, self._kill = standin, stranger, clock_s, kill
        self.url = ""
        self.cut = False
        self.fates: dict[str, Fate] = {}
        self.first_s: dict[str, int] = {}
        """Customer → when its first meter event of this absence was attempted."""
        self.tries: Counter[str] = Counter()
        """Identifier → attempts seen during this absence."""
        self.settled: set[str] = set()
        """Customers of whom Stripe has said something final since it is back: taken, refused, or how much it counts."""
        self.under_way = 0

    def away(self, customers: list[str]) -> None:
        """From here on Stripe hears of no meter event of theirs; `fates` makes exceptions."""
        self.fates = dict.fromkeys(customers, "unheard")
        self.first_s.clear()
        self.tries.clear()

    def back(self) -> None:
        """Stripe is there again."""
        self.cut, self.fates = False, {}
        self.settled.clear()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        self.under_way += 1
        try:
            body = await request.read()
            if request.path == EVENTS:
                event = dict(parse_qsl(body.decode()))
                return await self._fare(request, body, event, event["payload[stripe_customer_id]"])
            if self.cut or (self.fates and "event_summaries" in request.path):
                return hang_up(request)
            return await self._forward(request, body, request.query.get("customer", ""))
        finally:
            self.under_way -= 1

    async def _fare(
        self, request: web.Request, body: bytes, event: dict[str, str], customer: str
    ) -> web.StreamResponse:
        fate = self.fates.get(customer)
        if fate is None:
            return await self._forward(request, body, customer)
        self.tries[event["identifier"]] += 1
        if fate == "busy":  # also while all else is cut: a 429 puts nothing in doubt, and takes no doubt away
            return web.json_response(BUSY, status=429)
        if fate == "unheard" or self.cut:
            return hang_up(request)
        at_s, answer = self._clock_s(), None
        self.fates[customer] = "busy" if fate == "killed" else "unheard"
        if fate == "foreign":
            await self._take_first(event)
        if fate != "not taken":
            answer = await self._forward(request, body, customer)
        if fate == "killed":
            self._kill()
        self.first_s[customer] = at_s  # now its fate is done
        return answer if fate == "foreign" and answer else hang_up(request)

    async def _forward(self, request: web.Request, body: bytes, customer: str) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() in KEPT}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session,
                session.request(request.method, self._standin.url + request.path_qs, data=body, headers=headers) as got,
            ):
                answer = web.Response(status=got.status, body=await got.read(), content_type="application/json")
        except (aiohttp.ClientError, TimeoutError):
            return hang_up(request)
        if answer.status in (200, 400):
            self.settled.add(customer)
        return answer

    async def _take_first(self, event: dict[str, str]) -> None:
        """An event of the stranger's takes this one's identifier."""
        port = StripePort(self._standin.key, self._standin.url)
        at_s, units = int(event["timestamp"]), int(event["payload[value]"])
        outcome = await port.send(event["identifier"], event["event_name"], self._stranger, units, at_s)
        assert outcome == Delivered(), outcome
        await port.close()


def hang_up(request: web.Request) -> web.Response:
    """No answer: the connection ends."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


@asynccontextmanager
async def serving(line: Line) -> AsyncIterator[None]:
    """The line on a free port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", line.serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=ANSWER_S)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    line.url = f"http://{host}:{port}"
    try:
        yield
    finally:
        await asyncio.shield(runner.cleanup())
