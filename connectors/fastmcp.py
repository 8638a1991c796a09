"""MCP by fastmcp: every tool call attributed, asked, metered and settled. One line for a server.

server.add_middleware(Metering(Meter(emitter)))
"""

from collections.abc import Mapping
from typing import Any

from fastmcp.exceptions import NotFoundError
from fastmcp.server.dependencies import get_access_token
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import InputRequiredToolResult, ToolResult
from mcp.types import CallToolRequestParams

from tollway.connectors.call import Amounts, Call, Count
from tollway.connectors.denied import Denied
from tollway.connectors.mcp import refused
from tollway.connectors.meter import Meter
from tollway.connectors.principal import Directory
from tollway.connectors.tool_call import Tools, claims_of, ended


class Metering(Middleware):
    """First of a server's middlewares, so that what the others refuse is metered too."""

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

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        """A refusal is a tool error with its problem as structured content; what the tool raises is raised again."""

        async def execute(call: Call) -> ToolResult:
            try:
                result = await call_next(context)
            except NotFoundError:
                ended(call, is_error=True, unknown=True)
                raise
            ended(call, is_error=result.is_error, unfinished=isinstance(result, InputRequiredToolResult))
            return result

        about = context.fastmcp_context.request_context if context.fastmcp_context is not None else None
        meta: Mapping[str, Any] | None = about.meta if about is not None else None
        request = about.request if about is not None else None
        try:
            return await self._seam.run(context.message.name, meta, request, claims_of(get_access_token()), execute)
        except Denied as denied:
            return ToolResult.from_mcp_result(refused(denied))
