"""An MCP server, metered and gated: `python tools.py` speaks MCP on stdio."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp.server.mcpserver import MCPServer

from tollway import Emitter, Gate, Meter, Principal, current_call
from tollway.connectors.mcp import Metering

emitter = Emitter(os.environ["TOLLWAY_KAFKA_BOOTSTRAP"])
gate = Gate(os.environ["TOLLWAY_REDIS_URL"], emitter, deadline_s=2)
meter = Meter(emitter, gate=gate, principal=Principal("client", os.environ["CLIENT"], os.environ["ACCOUNT"]))


@asynccontextmanager
async def lifespan(server: MCPServer) -> AsyncIterator[None]:
    async with emitter, gate:
        yield
        await meter.flush(10)


metering = Metering(meter, ask={"forecast": {"days": (14, 1)}})
server = MCPServer("weather", extensions=[metering], lifespan=lifespan)


@server.tool()
async def forecast(city: str, days: int) -> list[str]:
    """The weather of the next days."""
    call = current_call()
    assert call is not None
    days = min(days, call.granted("days") or days)
    call.add(days=days)
    return [f"{city}, day {day}: sun" for day in range(1, days + 1)]


if __name__ == "__main__":
    server.run()
