"""MCP by the official SDK: every tool call attributed, asked, metered and settled. One line for a server.

MCPServer("weather", extensions=[Metering(Meter(emitter))])
Server("weather", on_call_tool=compose_tool_call_handler([Metering(Meter(emitter))], handler))
"""

import json
from collections.abc import Mapping
from typing import Any

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension
from mcp.types import CallToolRequestParams, CallToolResult, InputRequiredResult, TextContent

from tollway.connectors.call import Amounts, Call, Count
from tollway.connectors.denied import Denied
from tollway.connectors.meter import Meter
from tollway.connectors.principal import Directory
from tollway.connectors.tool_call import Tools, claims_of, ended


class Metering(Extension):
    """First of a server's extensions, so that what the others refuse is metered too."""

    identifier = "dev.tollway/metering"

    def __init__(
        self,
        meter: Meter,
        *,
        directory: Directory | None = None,
        ask: Mapping[str, Amounts] | None = None,
        count: Count | None = None,
        baggage: bool = True,
    ) -> None:
        """Arguments as of `Tools`."""
        self._seam = Tools(meter, directory=directory, ask=ask, count=count, baggage=baggage)

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """A tool's error is a result here, not an exception; a refusal is one too, with its problem as structured content."""

        async def execute(call: Call) -> HandlerResult:
            result = await call_next(ctx)
            if isinstance(result, CallToolResult):
                ended(call, is_error=result.is_error, unknown=_is_unknown(result, params.name))
            elif isinstance(result, InputRequiredResult):
                ended(call, is_error=False, unfinished=True)
            return result

        claims = claims_of(_token(ctx))
        try:
            return await self._seam.run(params.name, ctx.meta, ctx.request, claims, execute)
        except Denied as denied:
            return refused(denied)


def refused(denied: Denied) -> CallToolResult:
    """A refusal as a tool error that a model can read and a program can parse."""
    text = TextContent(type="text", text=json.dumps(denied.problem, ensure_ascii=False))
    return CallToolResult(is_error=True, content=[text], structured_content=denied.problem)


def _token(ctx: ServerRequestContext[Any, Any]) -> Any:
    """The request's own, not that of the request by which the session began."""
    user = ctx.request.scope.get("user") if ctx.request is not None else None
    return user.access_token if isinstance(user, AuthenticatedUser) else get_access_token()


def _is_unknown(result: CallToolResult, name: str) -> bool:
    """The SDK tells an extension of a tool that is not there by this text alone."""
    first = result.content[0] if result.is_error and result.content else None
    return isinstance(first, TextContent) and first.text == f"Unknown tool: {name}"
