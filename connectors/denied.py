"""A call that may not go on: what its caller is told, and what its usage says."""

import json
from collections.abc import Sequence
from typing import Any

from tollway.connectors.errors import Refused

MEDIA_TYPE = "application/problem+json"
REASON_LETTERS_MAX = 64


def status_of_http(code: int) -> str:
    """The status of usage that ended in this HTTP status. 401 and 403 denied, 402 payment_required, 429 rate_limited."""
    if code < 400:
        return "ok"
    return {401: "denied", 402: "payment_required", 403: "denied", 429: "rate_limited"}.get(code, "error")


class Denied(Refused):
    """Raised instead of executing a call: `problem` is the RFC 9457 object, `headers` what goes with it over HTTP."""

    def __init__(self, status: int, problem: dict[str, Any], headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(f"{problem['title']}: {problem.get('detail', '')}")
        self.status, self.problem, self.headers = status, problem, list(headers)

    @property
    def reason(self) -> str:
        """One word for the usage's attribute `refused`."""
        return str(self.problem.get("reason") or self.status)[:REASON_LETTERS_MAX]

    @property
    def usage_status(self) -> str:
        """Nothing was executed: whatever is no quota and no payment is `denied`, which counts nowhere."""
        found = status_of_http(self.status)
        return "denied" if found == "error" else found

    def body(self) -> bytes:
        """The problem, as HTTP and MCP carry it."""
        return json.dumps(self.problem, ensure_ascii=False).encode()
