"""One line makes an MCP server metered, with either library and over either transport, under real clients."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from mcp import Client, MCPError
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from tests.asgi_site import serving, until
from tests.gate_site import ShownEmitter, held, limit, may_call
from tests.issuer import AUDIENCE, issuing
from tests.mcp_site import ANN, FLAVOURS, http_app, server
from tollway.connectors.asgi import MeterMiddleware
from tollway.connectors.context import outgoing, run
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.gate import Gate
from tollway.connectors.identity import Bearer
from tollway.connectors.meter import Meter
from tollway.connectors.principal import ClaimedAccount, Principal
from tollway.connectors.sinks import MemorySink, read_jsonl
from tollway.connectors.tool_call import NAMES_MAX

ROOT = Path(__file__).resolve().parent.parent


async def use(client: Client) -> None:
    """Each way that a call can end, and one that names no tool; as part of a run."""
    with run("r-1", session="s-1"):
        meta: Any = outgoing()
    said = await client.call_tool("echo", {"text": "hello"}, meta=meta)
    assert not said.is_error
    added = await client.call_tool("add", {"a": 2, "b": 3})
    assert added.structured_content == {"sum": 5}
    failed = await client.call_tool("broken", {})
    assert failed.is_error
    try:
        nothing = await client.call_tool("no such tool", {})
    except MCPError:
        return
    assert nothing.is_error


USED = [
    ("echo", "ok", {"calls": 1, "letters": 5}, "r-1"),
    ("add", "ok", {"calls": 1}, None),
    ("broken", "error", {"calls": 1}, None),
    ("(unmatched)", "error", {"calls": 1}, None),
]


def seen(events: Any) -> list[Any]:
    assert {(event["surface"], event["account"], event["principal"]) for event in events} == {("mcp", "acme", "u-ann")}
    return [(event["operation"], event["status"], event["quantities"], event.get("run")) for event in events]


@pytest.mark.parametrize("flavour", ["sdk", "fastmcp"])
async def test_tools_are_metered_over_stdio(flavour: str, tmp_path: Path) -> None:
    """A server that a client starts as its own process records every tool call, also failing and unknown ones, with its run."""
    path = tmp_path / "usage.jsonl"
    started = StdioServerParameters(command=sys.executable, args=["-m", "tests.mcp_site", flavour, str(path)], cwd=ROOT)
    async with Client(started) as client:
        await use(client)
    assert seen(list(read_jsonl(path))) == USED


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_tools_are_metered_over_http(flavour: str) -> None:
    """The same over streamable HTTP, behind a real server."""
    sink = MemorySink()
    app = http_app(flavour, server(flavour, Meter(sink, principal=ANN)))
    async with serving(app) as url, Client(f"{url}/mcp") as client:
        await use(client)
    assert seen(sink.events()) == USED


@asynccontextmanager
async def gated(valkey: ValkeyServer, account: str) -> AsyncIterator[tuple[Meter, ShownEmitter]]:
    emitter = ShownEmitter()
    async with Gate(valkey.url, deadline_s=5) as gate:
        meter = Meter(emitter, gate=gate, principal=Principal("user", "u-ann", account))
        yield meter, emitter
        await meter.flush(5)
        await emitter.close(0)


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_refused_tool_is_a_tool_error_with_its_problem(flavour: str, valkey: ValkeyServer) -> None:
    """Past its limit a tool does not run: text and structured content are the gate's problem, and the refusal is metered."""
    account = f"mcp-{flavour}"
    may_call(valkey.url, account, limit("user", 2), limit("acct", 100, meter="letters"))
    async with gated(valkey, account) as (meter, emitter):
        app = http_app(flavour, server(flavour, meter, ask={"echo": {"letters": (50, 1)}}))
        async with serving(app) as url, Client(f"{url}/mcp") as client:
            assert not (await client.call_tool("echo", {"text": "hello"})).is_error
            assert not (await client.call_tool("add", {"a": 1, "b": 1})).is_error
            for name, arguments in (("echo", {"text": "again"}), ("add", {"a": 1, "b": 1})):
                refused = await client.call_tool(name, arguments)
                assert refused.is_error
                assert refused.structured_content["status"] == 429
                assert json.loads(refused.content[0].text) == refused.structured_content  # type: ignore[union-attr]
        await meter.flush(5)
        assert sorted((event["operation"], event["status"], "hold" in event) for event in emitter.taken) == [
            ("add", "ok", True), ("add", "rate_limited", False), ("echo", "ok", True), ("echo", "rate_limited", False),
        ]  # fmt: skip
    assert held(valkey.url, account) == {"letters": 5}


def client_with(url: str, token: str | None) -> AbstractAsyncContextManager[Client]:
    @asynccontextmanager
    async def connected() -> AsyncIterator[Client]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        async with (
            AsyncClient(headers=headers) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
        ):
            yield client

    return connected()


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_the_token_says_who_calls_a_tool(flavour: str) -> None:
    """Behind MeterMiddleware each call is its own token's principal's; whom it refuses gets 401 and is metered once, as REST."""
    with issuing() as issuer:
        who = Bearer(issuer=issuer.url, audience=AUDIENCE, jwks=issuer.jwks_url, directory=ClaimedAccount("org"))
        sink = MemorySink()
        meter = Meter(sink)
        app = http_app(flavour, server(flavour, meter))
        async with serving(MeterMiddleware(app, meter, identity=who, refusals_only=True)) as url:
            for subject in ("ann", "bob"):
                async with client_with(url, issuer.token("k1", sub=subject)) as client:
                    await client.call_tool("echo", {"text": "hello"})
            async with AsyncClient() as http:
                answer = await http.post(f"{url}/mcp", json={}, headers={"authorization": "Bearer nonsense"})
        assert (answer.status_code, answer.json()["reason"]) == (401, "malformed_token")
        meter.close_refusals()
        *called, denied = sink.events()
        assert [(event["surface"], event["operation"], event["account"]) for event in called] == [
            ("mcp", "echo", "acme")
        ] * 2
        assert len({event["principal"] for event in called}) == 2
        assert (denied["surface"], denied["status"], denied["account"]) == ("rest", "denied", "public")


@pytest.mark.parametrize("flavour", ["sdk", "fastmcp"])
async def test_a_library_s_own_authentication_feeds_the_directory(flavour: str) -> None:
    """With the library's own token verifier the directory sees its claims; whom it does not know is refused and metered."""
    from fastmcp import FastMCP
    from fastmcp.server.auth.providers.jwt import JWTVerifier
    from mcp.server.auth.provider import AccessToken
    from mcp.server.auth.settings import AuthSettings
    from mcp.server.mcpserver import MCPServer
    from pydantic import AnyHttpUrl

    from tests.mcp_site import echo
    from tollway.connectors.fastmcp import Metering as FastMetering
    from tollway.connectors.mcp import Metering

    with issuing() as issuer:
        bearer = Bearer(issuer=issuer.url, audience=AUDIENCE, jwks=issuer.jwks_url, directory=ClaimedAccount("org"))

        class Verifier:
            async def verify_token(self, token: str) -> AccessToken | None:
                claims = await bearer.claims(token)
                return AccessToken(token=token, client_id="app", scopes=[], subject=claims["sub"], claims=claims)

        sink = MemorySink()
        meter = Meter(sink)
        built: Any
        if flavour == "sdk":
            url = AnyHttpUrl(issuer.url)
            auth = AuthSettings(issuer_url=url, resource_server_url=url, validate_token_resource=False)
            seam = Metering(meter, directory=ClaimedAccount("org"))
            built = MCPServer("t", extensions=[seam], token_verifier=Verifier(), auth=auth, log_level="CRITICAL")
            built.add_tool(echo)
        else:
            verifier = JWTVerifier(jwks_uri=issuer.jwks_url, issuer=issuer.url, audience=AUDIENCE)
            built = FastMCP("t", auth=verifier)
            built.add_middleware(FastMetering(meter, directory=ClaimedAccount("org")))
            built.tool(echo)
        async with serving(http_app(flavour, built)) as url_:
            async with client_with(url_, issuer.token("k1")) as client:
                assert not (await client.call_tool("echo", {"text": "hello"})).is_error
            async with client_with(url_, issuer.token("k1", org=None)) as client:
                refused = await client.call_tool("echo", {"text": "hello"})
                assert refused.structured_content["reason"] == "unknown_principal"
        meter.close_refusals()
        await until(lambda: len(sink.events()) == 2)
        good, denied = sink.events()
        assert (good["principal_kind"], good["account"], good["status"]) == ("user", "acme", "ok")
        assert (denied["account"], denied["status"], denied["operation"]) == ("public", "denied", "echo")


async def test_baggage_can_be_left_unheard() -> None:
    """A server whose callers must not say which run they are part of records none."""
    sink = MemorySink()
    async with Client(server("sdk", Meter(sink, principal=ANN), baggage=False)) as client:
        await use(client)
    assert {event.get("run") for event in sink.events()} == {None}


async def test_made_up_tools_are_not_many_operations(valkey: ValkeyServer) -> None:
    """Refused calls of names that a caller makes up are recorded under few of them; real tools keep their names."""
    may_call(valkey.url, "mcp-names", limit("acct", 0))
    async with gated(valkey, "mcp-names") as (meter, emitter):
        async with Client(server("lowlevel", meter)) as client:
            for number in range(NAMES_MAX + 5):
                await client.call_tool(f"made-up-{number}", {})
            may_call(valkey.url, "mcp-names", limit("acct", 100))
            assert not (await client.call_tool("add", {"a": 1, "b": 1})).is_error
        await meter.flush(5)
        operations = {event["operation"] for event in emitter.taken if event["status"] != "ok"}
        assert len(operations) == NAMES_MAX + 1
        assert [event["operation"] for event in emitter.taken if event["status"] == "ok"] == ["add"]


async def test_headers_say_what_a_call_is_part_of_where_meta_does_not() -> None:
    """Baggage of the HTTP request is heard where the call's `_meta` has none."""
    sink = MemorySink()
    app = http_app("sdk", server("sdk", Meter(sink, principal=ANN)))
    async with (
        serving(app) as url,
        AsyncClient(headers={"baggage": "tollway.run=r-9"}) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
    ):
        await client.call_tool("add", {"a": 1, "b": 2})
    assert sink.events()[0]["run"] == "r-9"


async def test_results_are_counted() -> None:
    """`count` sees each tool's result."""
    sink = MemorySink()
    meter = Meter(sink, principal=ANN)
    async with Client(server("sdk", meter, count=lambda result: {"blocks": len(result.content)})) as client:
        await client.call_tool("add", {"a": 1, "b": 2})
    assert sink.events()[0]["quantities"] == {"calls": 1, "blocks": 1}
