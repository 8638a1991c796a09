"""A meter with a gate: asked before, recorded, then settled with what was used; refused calls are usage too."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.asgi_site import serving, until
from tests.gate_site import ShownEmitter, forget, held, limit, may_call
from tests.test_asgi import ask
from tollway.connectors.asgi import MeterMiddleware
from tollway.connectors.call import current_call
from tollway.connectors.context import run
from tollway.connectors.denied import Denied
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Refused
from tollway.connectors.gate import Gate
from tollway.connectors.meter import Meter
from tollway.connectors.metered import metered
from tollway.connectors.principal import Principal
from tollway.connectors.sinks import MemorySink


class Site:
    """A gate, an emitter, a meter, and an account of its own for each test."""

    def __init__(self, url: str, gate: Gate) -> None:
        self.url, self.gate, self.emitter = url, gate, ShownEmitter()
        self.account = f"acct-{uuid.uuid4().hex[:8]}"
        self.ann = Principal("user", "u-ann", self.account)
        self.meter = Meter(self.emitter, gate=gate, principal=self.ann)

    async def settled(self) -> None:
        await self.meter.flush(5)


@pytest.fixture
async def site(valkey: ValkeyServer) -> AsyncIterator[Site]:
    async with Gate(valkey.url, deadline_s=5) as gate:
        found = Site(valkey.url, gate)
        yield found
        await found.settled()
        await found.emitter.close(0)


async def test_a_call_is_asked_for_recorded_and_captured(site: Site) -> None:
    """The hold is taken in the caller's scopes before the call, its usage names it, and what was used is what stays held."""
    may_call(site.url, site.account, limit("acct", 100, meter="tokens_out"), limit("run", 10), limit("user", 10))
    with run("r-1"):
        async with site.meter.observe("chat", ask={"tokens_out": (60, 10)}) as call:
            assert call.granted("tokens_out") == 60
            assert held(site.url, site.account) == {"tokens_out": 60}
            call.add(tokens_out=42)
    await site.settled()
    (event,) = site.emitter.taken
    assert call.decision is not None
    assert call.decision.hold is not None
    assert (event["hold"], event["occurred_at"]) == (call.decision.hold.id, call.decision.hold.at_us)
    assert held(site.url, site.account) == {"tokens_out": 42}
    assert held(site.url, site.account, "run:r-1") == held(site.url, site.account, "user:u-ann") == {"calls": 1}


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        ([limit("user", 1)], "rate_limited", 429),
        ([limit("acct", 1, "L")], "payment_required", 402),
        ([limit("run", 1, "L")], "denied", 403),
    ],
)
async def test_a_refused_call_does_not_run_and_is_metered(site: Site, limits: Any, status: str, code: int) -> None:
    """Past the limit the gate's problem is raised instead of the call, and the refusal is usage with its status, without hold."""
    may_call(site.url, site.account, *limits)
    ran = 0
    with run("r-1"):
        for _ in range(3):
            with suppress(Denied):
                async with site.meter.observe("search"):
                    ran += 1
        with pytest.raises(Denied) as raised:
            async with site.meter.observe("search"):
                ran += 1
    assert ran == 1
    assert (raised.value.status, raised.value.problem["violated-policies"] != []) == (code, True)
    await site.settled()
    first, *refused = site.emitter.taken
    assert first["status"] == "ok"
    assert {event["status"] for event in refused} == {status}
    assert sum(event["quantities"]["calls"] for event in refused) == 3
    assert all("hold" not in event and event["attributes"] == {"refused": "limit"} for event in refused)


@pytest.mark.parametrize("case", ["frozen", "unknown", "away"])
async def test_what_no_limit_refused_is_denied(site: Site, case: str) -> None:
    """A frozen or unknown account, and a gate that cannot look, are answered as such and counted nowhere."""
    gate = site.gate
    if case == "frozen":
        may_call(site.url, site.account, frozen=True)
    elif case == "unknown":
        may_call(site.url, site.account)
        forget(site.url, site.account)
    else:
        gate = Gate("redis://127.0.0.1:9", deadline_s=0.05)
    meter = Meter(site.emitter, gate=gate, principal=site.ann)
    with pytest.raises(Denied) as raised:
        async with meter.observe("search"):
            pytest.fail("it ran")
    assert raised.value.status == {"frozen": 403, "unknown": 403, "away": 503}[case]
    await meter.flush(5)
    assert [event["status"] for event in site.emitter.taken] == ["denied"]
    if gate is not site.gate:
        await gate.close()


async def test_a_call_that_failed_is_captured_and_one_that_was_not_made_is_given_back(site: Site) -> None:
    """An error counts, as in the fold; a refusal half-way holds nothing any more; an unused call leaves no trace."""
    may_call(site.url, site.account, limit("acct", 10))
    with suppress(ValueError):
        async with site.meter.observe("search"):
            raise ValueError
    await site.settled()
    assert held(site.url, site.account) == {"calls": 1}
    async with site.meter.observe("search") as call:
        call.unused = True
    with suppress(Denied):
        async with site.meter.observe("search"):
            raise Denied(403, {"title": "not yours"})
    await site.settled()
    assert held(site.url, site.account) == {"calls": 1}
    assert [event["status"] for event in site.emitter.taken] == ["error", "denied"]
    assert ["hold" in event for event in site.emitter.taken] == [True, True]


async def test_a_cancelled_call_is_captured(site: Site) -> None:
    """Cancelling a task in the middle of its call leaves usage and capture in order."""
    may_call(site.url, site.account, limit("acct", 100, meter="tokens_out"))
    started = asyncio.Event()

    async def work() -> None:
        async with site.meter.observe("chat", ask={"tokens_out": 60}) as call:
            call.add(tokens_out=5)
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await site.settled()
    assert held(site.url, site.account) == {"tokens_out": 5}


async def test_metered_functions_and_generators_are_asked_for(site: Site) -> None:
    """A coroutine and an async generator ask before they begin; a sync function of a gated meter is refused when it is made."""
    may_call(site.url, site.account, limit("acct", 2))
    ran: list[str] = []

    @metered(site.meter, "answer")
    async def answer() -> int:
        ran.append("answer")
        return 42

    @metered(site.meter, "stream")
    async def stream() -> AsyncIterator[int]:
        ran.append("stream")
        yield 1

    assert await answer() == 42
    assert [item async for item in stream()] == [1]
    with pytest.raises(Denied):
        await answer()
    with pytest.raises(Denied):
        async with aclosing(stream()) as items:  # type: ignore[type-var]
            await anext(items)
    assert ran == ["answer", "stream"]
    with pytest.raises(Refused, match="is not async"):
        metered(site.meter)(lambda: 1)
    with pytest.raises(Refused, match="only `async with` can ask"), site.meter.observe("x"):
        pytest.fail("it ran")


async def test_a_gate_needs_an_emitter(site: Site) -> None:
    """Holds are settled by the emitter's sequence: another sink is refused."""
    with pytest.raises(Refused, match="sink is a MemorySink: a gate needs an Emitter"):
        Meter(MemorySink(), gate=site.gate)


async def test_what_a_principal_is_bound_to(site: Site) -> None:
    """A bound principal calls only its operations, and as its agent, whatever its baggage says."""
    may_call(site.url, site.account, limit("agent", 5))
    bound = Principal("client", "c-1", site.account, ("agent:helpdesk",), ("search", "get_*"))
    with run("r-1", agent="somebody"):
        async with site.meter.observe("get_weather", principal=bound):
            pass
        with pytest.raises(Denied) as raised:
            async with site.meter.observe("delete", principal=bound):
                pytest.fail("it ran")
    assert (raised.value.status, raised.value.reason) == (403, "operation")
    await site.settled()
    assert [(event["operation"], event.get("agent")) for event in site.emitter.taken] == [
        ("get_weather", "helpdesk"),
        ("delete", "helpdesk"),
    ]
    assert held(site.url, site.account, "agent:helpdesk") == {"calls": 1}
    assert held(site.url, site.account, "agent:somebody") == {}


async def say(request: Request) -> Response:
    call = current_call()
    assert call is not None
    call.add(tokens_out=7)
    return PlainTextResponse("hello")


async def stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        call = current_call()
        assert call is not None
        for _ in range(3):
            call.add(tokens_out=2)
            yield b"x" * 10
        await asyncio.Event().wait()

    return StreamingResponse(chunks())


def service(site: Site, **arguments: Any) -> Starlette:
    app = Starlette(routes=[Route("/say", say), Route("/stream", stream)])
    app.add_middleware(MeterMiddleware, site.meter, **arguments)
    return app


async def test_a_service_is_gated_by_the_same_line(site: Site) -> None:
    """Allowed answers carry RateLimit fields; refused ones are the gate's problem with its headers; both are metered."""
    may_call(site.url, site.account, limit("user", 1), limit("acct", 50, meter="tokens_out"))
    async with serving(service(site, ask={"GET /say": {"tokens_out": (20, 1)}})) as url:
        code, body, headers = await ask(f"{url}/say")
        assert (code, body) == (200, b"hello")
        assert 'user-calls-d";r=0' in headers["ratelimit"].replace("; ", ";")
        code, body, headers = await ask(f"{url}/say")
        problem = json.loads(body)
        assert (code, problem["status"], problem["scope"]) == (429, 429, "user:u-ann")
        assert int(headers["retry-after"]) > 0
    await site.settled()
    assert [(event["status"], event["quantities"]) for event in site.emitter.taken] == [
        ("ok", {"calls": 1, "tokens_out": 7}),
        ("rate_limited", {"calls": 1}),
    ]
    assert held(site.url, site.account) == {"tokens_out": 7}


async def test_a_stream_broken_off_captures_what_passed(site: Site) -> None:
    """A client that leaves pays for what it got; the rest of the hold is given back."""
    import aiohttp

    may_call(site.url, site.account, limit("acct", 50, meter="tokens_out"))
    async with serving(service(site, ask=lambda scope, operation: {"tokens_out": 20})) as url:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/stream") as answer:
            assert await answer.content.readexactly(30) == b"x" * 30
            assert held(site.url, site.account) == {"tokens_out": 20}
        await until(lambda: site.emitter.taken)
    await site.settled()
    assert held(site.url, site.account) == {"tokens_out": 6}


async def test_a_retry_with_one_key_runs_once(site: Site) -> None:
    """With call_id_header a second request with the key is refused with 409, for another call with another problem."""
    may_call(site.url, site.account, limit("acct", 10))
    async with serving(service(site, call_id_header="Idempotency-Key")) as url:
        key = {"idempotency-key": "order 7/ü"}
        codes = [(await ask(f"{url}{path}", headers=key)) for path in ("/say", "/say", "/say?other=1")]
        assert [code for code, _, _ in codes] == [200, 409, 409]
        assert [json.loads(body)["title"] for _, body, _ in codes[1:]] == [
            "This call id has been decided before",
            "This call id was used for another call",
        ]
        assert (await ask(f"{url}/say", headers={"idempotency-key": "order 8"}))[0] == 200
    await site.settled()
    assert held(site.url, site.account) == {"calls": 2}
