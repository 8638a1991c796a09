"""A test's hands on the Stripe stand-in: its clock, its faults, what it accepted."""

import json
import urllib.request
from pathlib import Path
from typing import Any

from tollway.connectors.embedded.stripe_server import StripeServer

T0 = 1_800_000_000
"""A full hour; the stand-in's clock stands still here until a test moves it."""


class Standin(StripeServer):
    """The stand-in with a frozen clock, and its `/_admin` paths as methods."""

    def __init__(self, data: Path, **options: Any) -> None:
        super().__init__(data, clock_rate="0", **options)

    def admin(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """The JSON answer of an admin path."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_admin/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def set_clock(self, at_s: int) -> None:
        self.admin("clock", {"set_s": at_s})

    def advance(self, seconds: int) -> int:
        """Move its clock; returns its time."""
        return int(self.admin("clock", {"advance_s": seconds})["now_s"])

    def now_s(self) -> int:
        return int(self.admin("clock")["now_s"])

    def fault(self, fault: str, count: int = 1, **where: str) -> None:
        self.admin("faults", {"fault": fault, "count": count, **where})

    def heal(self) -> None:
        """No faults, not away, no delay."""
        self.admin("faults", method="DELETE")
        self.admin("settings", {"summary_delay_s": 0, "latency_ms": 0})

    def events(self, customer: str | None = None) -> list[dict[str, Any]]:
        """Accepted meter events, oldest first."""
        return [event for event in self.admin("events")["data"] if customer in (None, event["customer"])]
