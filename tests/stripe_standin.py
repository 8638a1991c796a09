"""A test's hands on the Stripe stand-in: its clock, its faults, what it accepted."""

import itertools
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.connectors.stripe import Outcome, StripePort

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


class Billed:
    """A customer and a meter of its own, and short ways to send to them."""

    def __init__(self, port: StripePort, customer: str, event_name: str) -> None:
        self.port, self.customer, self.event_name = port, customer, event_name

    async def send(self, identifier: str, units: int = 1, at_s: int = T0) -> Outcome:
        return await self.port.send(f"{self.customer}-{identifier}", self.event_name, self.customer, units, at_s)

    async def hour(self, start_s: int = T0) -> int:
        return await self.port.summary(self.event_name, self.customer, start_s // 3600 * 3600)


_numbers = itertools.count()


def number() -> int:
    """Another one each time: for names that no other test has."""
    return next(_numbers)


@asynccontextmanager
async def customer_of(standin: Standin) -> AsyncIterator[Billed]:
    """A new customer and a new meter, with a port of their own."""
    port, name = StripePort(standin.key, standin.url, timeout_s=5), f"meter_{number()}"
    await port.ensure_meter(name)
    yield Billed(port, await port.ensure_customer(name), name)
    await port.close()


def kind(outcome: Outcome) -> str:
    """Name of an outcome."""
    return type(outcome).__name__


def post(
    standin: Standin, path: str, fields: dict[str, str], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """A bare form POST: status, body, headers."""
    request = urllib.request.Request(
        standin.url + path,
        urllib.parse.urlencode(fields).encode(),
        {"Authorization": f"Bearer {standin.key}", **(headers or {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)
