"""The same tools behind the official SDK, its low-level server, and fastmcp; as a process on stdio: `python -m tests.mcp_site`."""

import sys
from collections.abc import Callable
from typing import Any

import anyio
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.extension import compose_tool_call_handler
from mcp.server.mcpserver import MCPServer
from mcp.server.stdio import stdio_server
from mcp.types import CallToolRequestParams, CallToolResult, ListToolsResult, TextContent, Tool

from tollway.connectors.call import current_call
from tollway.connectors.mcp import Metering
from tollway.connectors.meter import Meter
from tollway.connectors.principal import Principal
from tollway.connectors.sinks import JsonlSink

FLAVOURS = ("sdk", "lowlevel", "fastmcp")
ANN = Principal("user", "u-ann", "acme")


def echo(text: str) -> str:
    """Say it again."""
    call = current_call()
    assert call is not None
    call.add(letters=len(text))
    return text


def add(a: int, b: int) -> dict[str, int]:
    """The sum."""
    return {"sum": a + b}


def broken() -> str:
    """Fails."""
    raise ValueError("it broke")


TOOLS: dict[str, Callable[..., Any]] = {"echo": echo, "add": add, "broken": broken}


def server(flavour: str, meter: Meter, **arguments: Any) -> Any:
    """A metered server with these tools."""
    if flavour == "fastmcp":
        from fastmcp import FastMCP  # seconds: only where it is asked for

        from tollway.connectors.fastmcp import Metering as FastMetering

        fast = FastMCP("tools")
        fast.add_middleware(FastMetering(meter, **arguments))
        for function in TOOLS.values():
            fast.tool(function)
        return fast
    if flavour == "sdk":
        official = MCPServer("tools", extensions=[Metering(meter, **arguments)], log_level="CRITICAL")
        for function in TOOLS.values():
            official.add_tool(function)
        return official
    handler: Any = compose_tool_call_handler([Metering(meter, **arguments)], low_call)
    return Server("tools", on_list_tools=low_list, on_call_tool=handler)


async def low_list(ctx: ServerRequestContext[Any, Any], params: Any) -> ListToolsResult:
    return ListToolsResult(tools=[Tool(name=name, input_schema={"type": "object"}) for name in TOOLS])


async def low_call(ctx: ServerRequestContext[Any, Any], params: CallToolRequestParams) -> CallToolResult:
    try:
        result = TOOLS[params.name](**(params.arguments or {}))
    except ValueError as error:
        return CallToolResult(content=[TextContent(type="text", text=str(error))], is_error=True)
    except KeyError:
        return CallToolResult(content=[TextContent(type="text", text=f"Unknown tool: {params.name}")], is_error=True)
    return CallToolResult(
        content=[TextContent(type="text", text=str(result))],
        structured_content=result if isinstance(result, dict) else None,
    )


def http_app(flavour: str, built: Any) -> Any:
    """The server as an ASGI application, at /mcp."""
    return built.http_app() if flavour == "fastmcp" else built.streamable_http_app()


async def on_stdio(built: Any) -> None:
    if isinstance(built, Server):
        async with stdio_server() as (reading, writing):
            await built.run(reading, writing, built.create_initialization_options())
    elif isinstance(built, MCPServer):
        await built.run_stdio_async()
    else:
        await built.run_stdio_async(show_banner=False)


if __name__ == "__main__":
    meter = Meter(JsonlSink(sys.argv[2]), principal=ANN)
    anyio.run(on_stdio, server(sys.argv[1], meter))
