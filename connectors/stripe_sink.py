"""Usage straight to Stripe's meter events, for a service without the pipeline.

Its guarantee is weaker than the pipeline's: each unit at most once while Stripe remembers identifiers (24 h), never a
second time by this sink after that; what waits in memory dies with the process, and nothing can be computed again. Only
status ok with rail null is sent, as in the pipeline.
"""

import asyncio
import hashlib
import time
from base64 import b32encode
from collections.abc import Callable, Mapping
from typing import Any

from tollway.connectors.errors import Unavailable
from tollway.connectors.queued import EVENTS_MAX, Queued
from tollway.connectors.stripe import Delivered, Duplicate, Outcome, Rejected, Sends, Unknown

REPEATED_S = 20 * 3_600
"""A meter event whose answer was uncertain is repeated for so long: Stripe still knows its identifier."""
CALLS_MAX = 8
"""Calls to Stripe at a time."""


class StripeSink(Queued):
    """Sends each billable quantity of each event as one meter event."""

    def __init__(
        self,
        port: Sends,
        event_names: Mapping[str, str],
        customer_of: Callable[[str], str | None],
        *,
        events_max: int = EVENTS_MAX,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """`event_names`: meter → Stripe's event name; `customer_of`: account → Stripe's customer, None = counted in `lost`."""
        super().__init__("stripe", events_max, clock_us)
        self._port, self._event_names, self._customer_of = port, dict(event_names), customer_of
        self._open: dict[str, int] = {}
        """identifier → when its answer was first uncertain (µs), of those not yet settled."""
        self._settled: set[str] = set()
        self.delivered = 0
        """Meter events that Stripe has."""
        self.rejected = ""
        """Why Stripe last refused one for good."""

    async def send(self, events: list[dict[str, Any]]) -> None:
        """Every meter event of a batch. Raises Unavailable where any has no certain answer: those alone are sent again."""
        limit = asyncio.Semaphore(CALLS_MAX)
        calls = {call[0]: call for event in events for call in self._calls(event) if call[0] not in self._settled}

        async def one(call: tuple[str, str, str, int, int]) -> str:
            async with limit:
                return self._answered(call[0], await self._attempt(call))

        waiting = [reason for reason in await asyncio.gather(*map(one, calls.values())) if reason]
        if waiting:
            raise Unavailable(f"Stripe: {waiting[0]}")
        self._settled.clear()

    def _calls(self, event: dict[str, Any]) -> list[tuple[str, str, str, int, int]]:
        """(identifier, event name, customer, units, timestamp) of an event's billable quantities."""
        billable = {
            name: units
            for meter, units in event["quantities"].items()
            if units and (name := self._event_names.get(meter)) is not None
        }
        if event["status"] != "ok" or event.get("rail") is not None or not billable:
            return []
        customer = self._customer_of(event["account"])
        if customer is None:
            self._give_up(event["event_id"], "no_customer")
            return []
        at_s = event["occurred_at"] // 1_000_000
        return [
            (identifier_of(event["event_id"], name), name, customer, units, at_s) for name, units in billable.items()
        ]

    async def _attempt(self, call: tuple[str, str, str, int, int]) -> Outcome:
        if self._clock_us() - self._open.get(call[0], self._clock_us()) > REPEATED_S * 1_000_000:
            return Rejected("no certain answer for 20 hours: Stripe may not know the identifier any more")
        return await self._port.send(*call)

    def _answered(self, identifier: str, outcome: Outcome) -> str:
        """Why it must be sent again; empty where it is settled."""
        if isinstance(outcome, Delivered | Duplicate):
            self.delivered += 1
        elif isinstance(outcome, Rejected):
            self.rejected = outcome.reason
            self._give_up(identifier, "rejected")
        else:
            if isinstance(outcome, Unknown):
                self._open.setdefault(identifier, self._clock_us())
            return outcome.reason
        self._settled.add(identifier)
        self._open.pop(identifier, None)
        return ""

    def _give_up(self, key: str, reason: str) -> None:
        if key not in self._settled:
            self._settled.add(key)
            self.lost[reason] += 1


def identifier_of(event_id: str, event_name: str) -> str:
    """Stripe's identifier of an event's quantity: the same for the same event, from whichever process."""
    digest = hashlib.sha256(f"{event_id}\0{event_name}".encode()).digest()
    return "tws_" + b32encode(digest).decode().lower()[:40]
