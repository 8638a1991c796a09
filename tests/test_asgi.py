"""One line makes a service metered: every request, however it ends, and nothing about the service changes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from tests.asgi_site import serving, until
from tests.issuer import AUDIENCE, issuing
from tests.test_identity import WRONG
from tollway.connectors.asgi import CALL, MeterMiddleware
from tollway.connectors.call import current_call
from tollway.connectors.denied import Denied
from tollway.connectors.errors import Refused
from tollway.connectors.identity import Bearer
from tollway.connectors.meter import Meter
from tollway.connectors.principal import ANONYMOUS, SCOPE_KEY, ClaimedAccount, Principal
from tollway.connectors.sinks import MemorySink

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def say(request: Request) -> Response:
    return PlainTextResponse(f"hello {request.path_params.get('name', '')}")


async def used(request: Request) -> Response:
    call = current_call()
    assert call is not None
    assert call is request.scope[CALL]
    call.add(tokens_out=7)
    call.principal = Principal("user", "u-handler", "acme")

    async def later() -> None:
        call.add(late=1)

    return JSONResponse({"path": request.url.path}, background=BackgroundTask(later))


async def fail(request: Request) -> Response:
    raise ValueError("broken")


async def status(request: Request) -> Response:
    return Response(status_code=int(request.path_params["code"]))


async def stream(request: Request) -> Response:
    count = int(request.query_params.get("count", "3"))

    async def chunks() -> AsyncIterator[bytes]:
        call = current_call()
        assert call is not None
        for _ in range(count):
            call.add(tokens_out=2)
            yield b"x" * 10
            await asyncio.sleep(0)
        if "fail" in request.query_params:
            raise ValueError("broken off")
        if "hang" in request.query_params:
            await asyncio.Event().wait()

    return StreamingResponse(chunks())


async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("echo " + await websocket.receive_text())
    await websocket.close()


ROUTES = [
    Route("/hello/{name}", say, methods=["GET", "POST"]),
    Route("/used", used),
    Route("/fail", fail),
    Route("/status/{code:int}", status),
    Route("/stream", stream),
    Mount("/below", routes=[Route("/deep/{key}", say)]),
    Mount("/files", app=PlainTextResponse("a file")),
    WebSocketRoute("/chat", chat),
]


def service(**arguments: Any) -> tuple[Starlette, MemorySink, Meter]:
    sink = MemorySink()
    meter = Meter(sink)
    app = Starlette(routes=list(ROUTES))
    app.add_middleware(MeterMiddleware, meter, **arguments)
    return app, sink, meter


async def ask(url: str, method: str = "GET", **arguments: Any) -> tuple[int, bytes, Any]:
    async with aiohttp.ClientSession() as session, session.request(method, url, **arguments) as answer:
        return answer.status, await answer.read(), answer.headers


async def test_requests_are_metered_by_their_route() -> None:
    """Operation is the route's template, also below mounts; paths and methods that a caller makes up add none."""
    app, sink, _ = service()
    paths = (
        "GET /hello/ann", "POST /hello/bob", "PUT /hello/bob", "HEAD /hello/x", "GET /below/deep/7", "GET /below/nothing",
        "GET /files/a/b", "GET /nowhere/1", "GET /nowhere/2", "BREW /hello/x", "GET /used/",
    )  # fmt: skip
    async with serving(app) as url:
        for path in paths:
            method, _, rest = path.partition(" ")
            await ask(url + rest, method, allow_redirects=False)
        await until(lambda: len(sink.events()) == len(paths))
    assert [(event["operation"], event["status"]) for event in sink.events()] == [
        ("GET /hello/{name}", "ok"), ("POST /hello/{name}", "ok"), ("PUT /hello/{name}", "error"), ("HEAD /hello/{name}", "ok"),
        ("GET /below/deep/{key}", "ok"), ("GET /below/(unmatched)", "error"), ("GET /files/{path}", "ok"),
        ("GET (unmatched)", "error"), ("GET (unmatched)", "error"), ("OTHER /hello/{name}", "error"),
        ("GET (unmatched)", "error"),
    ]  # fmt: skip
    assert {(e["principal_kind"], e["principal"], e["account"]) for e in sink.events()} == {ANONYMOUS[:3]}


async def test_fastapi_s_included_routers_have_their_whole_template() -> None:
    """Prefixes of included routers, routers in routers and mounted applications are part of the operation."""
    sink = MemorySink()
    app, inner, outer, below = FastAPI(), APIRouter(prefix="/inner"), APIRouter(prefix="/v1"), FastAPI()

    @inner.get("/things/{id}")
    async def thing(id: int) -> dict[str, int]:
        if id == 404:
            raise HTTPException(404)
        return {"id": id}

    @below.get("/other/{id}")
    async def other(id: int) -> int:
        return id

    outer.include_router(inner)
    app.include_router(outer, prefix="/orgs/{org}")
    app.mount("/below", below)
    app.add_middleware(MeterMiddleware, Meter(sink))
    async with serving(app) as url:
        for path in (
            "/orgs/a/v1/inner/things/1",
            "/orgs/a/v1/inner/things/404",
            "/orgs/a/v1/inner/things/x",
            "/below/other/1",
        ):
            await ask(url + path)
    assert [(event["operation"], event["status"]) for event in sink.events()] == [
        ("GET /orgs/{org}/v1/inner/things/{id}", "ok"),
        ("GET /orgs/{org}/v1/inner/things/{id}", "error"),
        ("GET /orgs/{org}/v1/inner/things/{id}", "error"),
        ("GET /below/other/{id}", "ok"),
    ]


async def test_a_status_is_that_of_the_answer() -> None:
    """What the caller was told is the usage's status; refusals of the service's own are folded."""
    app, sink, meter = service()
    async with serving(app) as url:
        for code in (200, 204, 304, 400, 401, 402, 403, 429, 500, 503):
            assert (await ask(f"{url}/status/{code}"))[0] == code
    meter.close_refusals()
    found = sorted((event["status"], event["quantities"]["calls"]) for event in sink.events())
    counted = {status: sum(calls for each, calls in found if each == status) for status, _ in found}
    assert counted == {"ok": 3, "error": 3, "denied": 2, "payment_required": 1, "rate_limited": 1}


async def test_a_handler_adds_to_its_call() -> None:
    """Quantities, also of a background task, and the principal that a handler found are in the event."""
    app, sink, _ = service()
    async with serving(app) as url:
        await ask(f"{url}/used")
        await until(sink.events)
    (event,) = sink.events()
    assert (event["principal"], event["quantities"]) == ("u-handler", {"calls": 1, "tokens_out": 7, "late": 1})


async def test_what_a_handler_raises_is_raised_and_metered() -> None:
    """The server's own error handling sees the exception, as without the middleware."""
    app, sink, _ = service()
    seen: list[BaseException] = []

    async def outside(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except ValueError as error:
            seen.append(error)
            raise

    async with serving(outside) as url:
        assert (await ask(f"{url}/fail"))[0] == 500
    assert [str(error) for error in seen] == ["broken"]
    assert [event["status"] for event in sink.events()] == ["error"]


async def test_streams_are_counted_as_they_pass() -> None:
    """A streamed answer passes unbuffered; its chunks and what the handler says are counted, also where it breaks off."""
    app, sink, _ = service(count=lambda chunk: {"bytes_out": len(chunk)})
    async with serving(app) as url, aiohttp.ClientSession() as session:
        async with session.get(f"{url}/stream?hang=1") as answer:
            assert await answer.content.readexactly(30) == b"x" * 30
            assert sink.events() == []
        await until(sink.events)
        assert (await ask(f"{url}/stream?count=5"))[1] == b"x" * 50
        with pytest.raises(aiohttp.ClientError):
            await ask(f"{url}/stream?fail=1")
        await until(lambda: len(sink.events()) == 3)
    gone, whole, broken = sink.events()
    assert (gone["quantities"], gone["status"]) == ({"calls": 1, "tokens_out": 6, "bytes_out": 30}, "ok")
    assert gone["attributes"] == {"ended": "disconnected"}
    assert (whole["quantities"], whole["status"]) == ({"calls": 1, "tokens_out": 10, "bytes_out": 50}, "ok")
    assert (broken["quantities"], broken["status"]) == ({"calls": 1, "tokens_out": 6, "bytes_out": 30}, "error")


async def test_a_server_that_raises_when_the_client_has_gone() -> None:
    """Where the server tells of a lost client by an exception, it goes through, and what was sent until then is usage."""
    app, sink, _ = service()
    sent: list[Any] = []
    scope = {
        "type": "http", "asgi": {"spec_version": "2.4"}, "method": "GET", "path": "/stream", "query_string": b"", "headers": [],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            raise OSError("gone")

    with pytest.raises(ClientDisconnect):
        await app(scope, receive, send)
    (event,) = sink.events()
    assert (event["status"], event["attributes"], event["quantities"]["tokens_out"]) == (
        "ok",
        {"ended": "disconnected"},
        4,
    )


async def test_websockets_and_lifespan_pass_through() -> None:
    """A websocket works as before and is no call; the application's lifespan runs once, with its state."""
    steps: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, int]]:
        steps.append("start")
        yield {"answer": 42}
        steps.append("stop")

    async def state(request: Request) -> Response:
        return JSONResponse(request.state.answer)

    sink = MemorySink()
    app = MeterMiddleware(Starlette(routes=[*ROUTES, Route("/state", state)], lifespan=lifespan), Meter(sink))
    async with serving(app, lifespan="on") as url, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{url}/chat") as websocket:
            await websocket.send_str("hi")
            assert await websocket.receive_str() == "echo hi"
        assert (await ask(f"{url}/state"))[1] == b"42"
    assert steps == ["start", "stop"]
    assert [event["operation"] for event in sink.events()] == ["GET /state"]


async def test_a_plain_asgi_application() -> None:
    """An application without routes is metered as one operation a method, or as it says itself."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    for operation, expected in ((None, "GET *"), (lambda scope: "search", "search")):
        sink = MemorySink()
        async with serving(MeterMiddleware(app, Meter(sink), operation=operation), lifespan="off") as url:
            await ask(f"{url}/a/b")
        assert [event["operation"] for event in sink.events()] == [expected]


async def test_what_is_unmetered_passes_by() -> None:
    """A named operation is neither identified nor metered."""
    app, sink, _ = service(unmetered=["GET /hello/{name}"])
    async with serving(app) as url:
        assert (await ask(f"{url}/hello/x"))[0] == 200
    assert sink.events() == []


async def test_what_a_call_is_part_of_comes_in_headers() -> None:
    """Baggage and traceparent say run, session and trace, unless the service does not want to hear it."""
    headers = {"baggage": "tollway.run=r-1,tollway.session=s-1", "traceparent": TRACE}
    for arguments, expected in (({}, ("r-1", "s-1", TRACE[3:35])), ({"baggage": False}, (None, None, None))):
        app, sink, _ = service(**arguments)
        async with serving(app) as url:
            await ask(f"{url}/hello/x", headers=headers)
        (event,) = sink.events()
        assert (event.get("run"), event.get("session"), event.get("trace_id")) == expected


async def test_a_service_s_own_middleware_says_who_calls() -> None:
    """A principal is read from the scope after the call, where an inner middleware put it; a fault in reading is counted."""

    class Own:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["who"] = "u-own"
            await self.app(scope, receive, send)

    app, sink, meter = service(principal=lambda scope: Principal("user", scope["who"], "acme"))
    async with serving(app) as url:
        await ask(f"{url}/hello/x")
        app.user_middleware.append(Middleware(Own))
        app.middleware_stack = None
        await ask(f"{url}/hello/x")
    assert [event["principal"] for event in sink.events()] == ["anonymous", "u-own"]
    assert meter.counters["unattributed"] == 1


async def test_identity_comes_from_the_token_alone() -> None:
    """A verified token's principal is on the event and in the scope; other headers make nobody somebody."""
    with issuing() as issuer:
        who = Bearer(issuer=issuer.url, audience=AUDIENCE, jwks=issuer.jwks_url, directory=ClaimedAccount("org"))
        app, sink, meter = service(identity=who)
        inside: list[Principal] = []

        async def look(request: Request) -> Response:
            inside.append(request.scope[SCOPE_KEY])
            return Response()

        app.routes.append(Route("/look", look))
        forged = {
            "x-user": "u-1",
            "x-tollway-principal": "u-1",
            "baggage": "tollway.principal=u-1,tollway.account=globex",
        }
        async with serving(app) as url:
            token = {"authorization": f"Bearer {issuer.token('k1')}"}
            assert (await ask(f"{url}/look", headers={**forged, **token}))[0] == 200
            code, _, _ = await ask(f"{url}/look", headers=forged)
            assert code == 401
            twice = [("authorization", token["authorization"]), ("authorization", "Bearer other")]
            assert (await ask(f"{url}/look", headers=twice))[0] == 400
        meter.close_refusals()
        good, *refused = sink.events()
        assert (good["principal"], good["account"]) == (inside[0].id, "acme")
        assert {(e["status"], e["principal_kind"], e["account"]) for e in refused} == {
            ("denied", "anonymous", "public")
        }


@pytest.mark.parametrize(("reason", "make"), WRONG)
async def test_a_refused_token_is_answered_and_metered(reason: str, make: Any) -> None:
    """Each wrong token gets 401 with its problem and challenge, runs nothing, and is usage of nobody with status denied."""
    with issuing() as issuer:
        who = Bearer(issuer=issuer.url, audience=AUDIENCE, jwks=issuer.jwks_url, directory=ClaimedAccount("org"))
        app, sink, meter = service(identity=who)
        async with serving(app) as url:
            code, body, headers = await ask(f"{url}/used", headers={"authorization": f"Bearer {make(issuer)}"})
        problem = json.loads(body)
        assert (code, headers["content-type"], problem["reason"]) == (401, "application/problem+json", reason)
        assert headers["www-authenticate"].startswith("Bearer ")
        meter.close_refusals()
        (event,) = sink.events()
        assert (event["status"], event["attributes"], event["account"]) == ("denied", {"refused": reason}, "public")
        assert "tokens_out" not in event["quantities"]


async def test_an_inner_refusal_is_the_answer() -> None:
    """Denied, raised by a metered function of the service, is answered with its problem, not as a fault of the server."""

    async def pay(request: Request) -> Response:
        raise Denied(402, {"title": "Pay first", "status": 402, "reason": "balance"}, [("X-Price", "3")])

    app, sink, meter = service()
    app.routes.append(Route("/pay", pay))
    async with serving(app) as url:
        code, body, headers = await ask(f"{url}/pay")
    assert (code, json.loads(body)["title"], headers["x-price"]) == (402, "Pay first", "3")
    meter.close_refusals()
    assert [(e["status"], e["attributes"]) for e in sink.events()] == [("payment_required", {"refused": "balance"})]


def test_two_ways_to_say_who_are_one_too_many() -> None:
    """identity and principal together are refused."""
    with pytest.raises(Refused, match="identity and principal are both given"):
        MeterMiddleware(Starlette(), Meter(MemorySink()), identity=object(), principal=lambda scope: None)  # type: ignore[arg-type]
