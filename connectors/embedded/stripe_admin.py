"""The stand-in's own paths, `/_admin/…`: its clock, its faults, and what it has accepted, for tests and the oracle."""

import json
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from tollway.connectors.embedded.stripe_http import EVENTS, FAULTS, Server

EVENT_FIELDS = ("identifier", "customer", "event_name", "value", "timestamp", "received_at", "error", "cancelled")
FAULTS_MAX = 1_000


def look_routes(server: Server) -> Iterable[web.RouteDef]:
    """GET health, _admin/events, error_reports, counters, clock."""

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "now_s": server.clock.now_s()})

    async def events(request: web.Request) -> web.Response:
        await server.durable()
        after = int(request.query.get("after", "0"))
        rows = [{name: event[name] for name in EVENT_FIELDS} for event in server.state.events[after:]]
        return web.json_response({"data": rows, "next": after + len(rows)})

    async def error_reports(_: web.Request) -> web.Response:
        return web.json_response({"data": server.state.errors})

    async def counters(_: web.Request) -> web.Response:
        return web.json_response(dict(server.counters))

    async def clock(_: web.Request) -> web.Response:
        return web.json_response(_clock(server))

    return [
        web.get("/health", health),
        web.get("/_admin/events", events),
        web.get("/_admin/error_reports", error_reports),
        web.get("/_admin/counters", counters),
        web.get("/_admin/clock", clock),
    ]


def order_routes(server: Server) -> Iterable[web.RouteDef]:
    """POST _admin/clock, faults, away, settings; DELETE _admin/faults."""

    async def set_clock(request: web.Request) -> web.Response:
        body = await _body(request, "set_s", "advance_s", "rate")
        at_s = body.get("set_s")
        if "advance_s" in body:
            at_s = server.clock.now_s() + body["advance_s"]
        server.record(server.clock.moved(at_s, body.get("rate")))
        await server.durable()
        return web.json_response(_clock(server))

    async def add_fault(request: web.Request) -> web.Response:
        body = await _body(request, "fault", "count", "path", "method")
        if body.get("fault") not in FAULTS:
            return _refused(f"fault is {body.get('fault')!r}: give one of {', '.join(FAULTS)}")
        if len(server.faults) >= FAULTS_MAX:
            return _refused(f"{FAULTS_MAX} faults wait already: let some happen or DELETE them")
        server.faults.append({"count": 1, "path": EVENTS, "method": "POST", **body})
        return web.json_response({"faults": server.faults})

    async def clear_faults(_: web.Request) -> web.Response:
        server.faults.clear()
        server.away_until_s = None
        return web.json_response({"faults": []})

    async def away(request: web.Request) -> web.Response:
        body = await _body(request, "until_s", "for_s")
        server.away_until_s = server.clock.now_s() + body["for_s"] if "for_s" in body else body.get("until_s")
        return web.json_response({"away_until_s": server.away_until_s})

    async def settings(request: web.Request) -> web.Response:
        body = await _body(request, *server.settings)
        server.record({"kind": "settings", "settings": {**server.settings, **body}})
        await server.durable()
        return web.json_response(server.settings)

    return [
        web.post("/_admin/clock", set_clock),
        web.post("/_admin/faults", add_fault),
        web.delete("/_admin/faults", clear_faults),
        web.post("/_admin/away", away),
        web.post("/_admin/settings", settings),
    ]


def _clock(server: Server) -> dict[str, Any]:
    return {"now_s": server.clock.now_s(), "rate": server.clock.entry["rate"]}


async def _body(request: web.Request, *names: str) -> dict[str, Any]:
    try:
        body = json.loads(await request.text())
    except ValueError:
        body = None
    if not isinstance(body, dict) or set(body) - set(names):
        raise web.HTTPBadRequest(text=f"give a JSON object with some of {', '.join(names)}")
    return body


def _refused(message: str) -> web.Response:
    return web.json_response({"error": message}, status=400)
