"""Stripe: meter events out, hourly summaries back. A thin port on the SDK: no retries of its own, no floats, no state."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import stripe

from tollway.connectors.errors import Invalid, Refused, Unavailable

TIMEOUT_S = 30
HOUR_S = 3600
PAGE = 100
CUSTOMERS_MAX = 10_000
"""Most customers that `ensure_customer` looks through."""
DUPLICATE = "An event already exists with identifier"
CUSTOMER_KEY, VALUE_KEY = "stripe_customer_id", "value"
EXACT_MAX = 2**53
"""Summaries come as doubles: above this they no longer name one whole number."""


@dataclass(frozen=True)
class Delivered:
    """Stripe has it."""


@dataclass(frozen=True)
class Duplicate:
    """Stripe has had an event with this identifier for less than 24 hours."""

    reason: str


@dataclass(frozen=True)
class Retry:
    """Stripe did not take it, and will later; `after_s` where it says when."""

    after_s: int | None
    reason: str


@dataclass(frozen=True)
class Unknown:
    """Nobody can say whether Stripe took it: no answer, or a 5xx."""

    reason: str


@dataclass(frozen=True)
class Rejected:
    """Stripe will never take it."""

    reason: str


Outcome = Delivered | Duplicate | Retry | Unknown | Rejected


@dataclass(frozen=True)
class Meter:
    """A billing meter as Stripe has it."""

    meter_id: str
    event_name: str
    formula: str
    event_time_window: str | None
    status: str
    live: bool
    customer_key: str
    value_key: str


class Sends(Protocol):
    """What the Stripe sender needs of Stripe."""

    async def send(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        """One meter event. Never raises for what Stripe or the network did: that is the outcome."""
        ...

    async def summary(self, event_name: str, customer: str, hour_start_s: int) -> int:
        """Units that Stripe counts for an hour. Raises Unavailable, Refused or Invalid."""
        ...


class StripePort:
    """Stripe's API at `base_url` (None: Stripe itself). Close it in the loop that used it."""

    def __init__(self, key: str, base_url: str | None = None, *, timeout_s: int = TIMEOUT_S) -> None:
        self._http = stripe.AIOHTTPClient(timeout=aiohttp.ClientTimeout(total=timeout_s))
        addresses = {"base_addresses": {"api": base_url}} if base_url else {}
        self._client = stripe.StripeClient(key, max_network_retries=0, http_client=self._http, **addresses)
        self._meters: dict[str, Meter] = {}
        self._customers: dict[str, str] | None = None

    async def close(self) -> None:
        await self._http.close_async()

    async def send(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        """One attempt at one meter event; `units` and `timestamp_s` are whole numbers."""
        event = {
            "event_name": event_name,
            "identifier": identifier,
            "timestamp": timestamp_s,
            "payload": {CUSTOMER_KEY: customer, VALUE_KEY: str(units)},
        }
        try:
            await self._client.v1.billing.meter_events.create_async(event)
        except (stripe.StripeError, aiohttp.ClientError, TimeoutError) as error:
            return outcome(error)
        return Delivered()

    async def summary(self, event_name: str, customer: str, hour_start_s: int) -> int:
        """Units of one hour as Stripe counts them now (some minutes late). Raises Unavailable, Refused, Invalid."""
        found = await self.summaries(event_name, customer, hour_start_s, hour_start_s + HOUR_S)
        return found.get(hour_start_s, 0)

    async def summaries(self, event_name: str, customer: str, start_s: int, end_s: int) -> dict[int, int]:
        """hour start → units, for the hours from `start_s` to `end_s` (both full hours) that have any."""
        meter = await self._meter(event_name)
        params = {
            "customer": customer,
            "start_time": start_s,
            "end_time": end_s,
            "value_grouping_window": "hour",
            "limit": PAGE,
        }
        listing = self._client.v1.billing.meters.event_summaries.list_async(meter.meter_id, params)
        return {int(row.start_time): whole(row.aggregated_value) async for row in _all(listing)}

    async def meters(self) -> dict[str, Meter]:
        """Event name → meter; where several had the name over time, the active one."""
        listing = self._client.v1.billing.meters.list_async({"limit": PAGE})
        found: dict[str, Meter] = {}
        async for row in _all(listing):
            meter = _meter(row)
            if meter.event_name not in found or meter.status == "active":
                found[meter.event_name] = meter
        self._meters = found
        return found

    async def check_meters(self, declared: Iterable[str], *, live: bool) -> None:
        """Refuse to bill through meters that would not add up what is sent: Refused names meter, fault and cure."""
        found = await self.meters()
        for event_name in sorted(declared):
            fault = meter_fault(found.get(event_name), live)
            if fault:
                raise Refused(f"Stripe's meter {event_name}: {fault}")

    async def ensure_meter(self, event_name: str) -> str:
        """Id of the active meter of an event name; created (formula sum) where there is none."""
        meter = (await self.meters()).get(event_name)
        if meter is None or meter.status != "active":
            params = {
                "display_name": event_name,
                "event_name": event_name,
                "default_aggregation": {"formula": "sum"},
                "customer_mapping": {"type": "by_id", "event_payload_key": CUSTOMER_KEY},
                "value_settings": {"event_payload_key": VALUE_KEY},
            }
            meter = _meter(await _read(self._client.v1.billing.meters.create_async(params)))
            self._meters[event_name] = meter
        return meter.meter_id

    async def ensure_customer(self, account: str) -> str:
        """Id of the customer made for an account (its metadata says so); created where there is none."""
        if self._customers is None:
            listing = self._client.v1.customers.list_async({"limit": PAGE})
            self._customers = {}
            async for row in _all(listing, CUSTOMERS_MAX):
                metadata = row.metadata.to_dict() if row.metadata else {}
                self._customers.setdefault(metadata.get("tollway_account", ""), row.id)
        if account not in self._customers:
            params = {"name": account, "metadata": {"tollway_account": account}}
            once = {"idempotency_key": f"tollway-customer-{hashlib.sha256(account.encode()).hexdigest()}"}
            self._customers[account] = (await _read(self._client.v1.customers.create_async(params, once))).id
        return self._customers[account]

    async def check_customer(self, customer: str) -> None:
        """Raises Refused where Stripe has no such customer: it would take the units and put them on no invoice."""
        try:
            found = await self._client.v1.customers.retrieve_async(customer)
        except stripe.InvalidRequestError as error:
            raise Refused(f"Stripe has no customer {customer}: create it, or bind with --create-at-stripe") from error
        except stripe.StripeError as error:
            raise Unavailable(f"Stripe cannot be asked for customer {customer}: {words(error)}") from error
        if getattr(found, "deleted", False):
            raise Refused(f"Stripe's customer {customer} was deleted: bind another")

    async def _meter(self, event_name: str) -> Meter:
        meter = self._meters.get(event_name) or (await self.meters()).get(event_name)
        if meter is None:
            raise Refused(f"Stripe has no meter with the event name {event_name}: create it, formula sum")
        return meter


def outcome(error: Exception) -> Outcome:
    """What an exception of the SDK says about an attempt."""
    reason = words(error)
    if isinstance(error, stripe.RateLimitError):
        after = (error.headers or {}).get("Retry-After", "")
        return Retry(int(after) if after.isascii() and after.isdecimal() else None, reason)
    if isinstance(error, stripe.AuthenticationError | stripe.PermissionError):
        return Retry(None, reason)  # the key's fault, not the event's
    if isinstance(error, stripe.InvalidRequestError):
        if str(error.user_message or "").startswith(DUPLICATE):
            return Duplicate(reason)
        return Rejected(reason)
    return Unknown(reason)


def words(error: BaseException) -> str:
    """An exception of the SDK in one line: status and message, or what the network did."""
    if isinstance(error, stripe.APIConnectionError) and error.__cause__ is not None:
        return f"no answer: {type(error.__cause__).__name__} {error.__cause__}".strip()
    if isinstance(error, stripe.StripeError) and error.http_status:
        return f"HTTP {error.http_status}: {error.user_message}"
    return f"{type(error).__name__}: {error}"


def meter_fault(meter: Meter | None, live: bool) -> str | None:
    """Why a meter cannot carry deltas of units; None where it can."""
    if meter is None:
        return "it is not there: create it with the formula sum"
    if meter.status != "active":
        return f"it is {meter.status}: reactivate it"
    if meter.formula != "sum":
        return f"its formula is {meter.formula}, which would not add up deltas: create one with the formula sum"
    if meter.event_time_window is not None:
        return f"it expects usage pre-aggregated by {meter.event_time_window}, keeping one delta of each: create one without"
    if (meter.customer_key, meter.value_key) != (CUSTOMER_KEY, VALUE_KEY):
        keys = f"{meter.customer_key} and {meter.value_key}"
        return f"its payload keys are {keys}: create one with {CUSTOMER_KEY} and {VALUE_KEY}"
    if meter.live != live:
        return f"it is a {'live' if meter.live else 'test'} meter, the deployment is {'live' if live else 'test'}: change the key"
    return None


def whole(value: float | int) -> int:
    """A summary's number as the whole number it stands for. Raises Invalid where it stands for none."""
    number = int(value)
    if number != value or abs(number) >= EXACT_MAX:
        raise Invalid("inexact_summary", f"aggregated_value is {value!r}: not a whole number below 2**53")
    return number


def _meter(row: Any) -> Meter:
    return Meter(
        meter_id=row.id,
        event_name=row.event_name,
        formula=row.default_aggregation.formula,
        event_time_window=row.event_time_window,
        status=row.status,
        live=row.livemode,
        customer_key=row.customer_mapping.event_payload_key,
        value_key=row.value_settings.event_payload_key,
    )


async def _all(listing: Awaitable[Any], most: int = 100_000) -> AsyncIterator[Any]:
    """The rows of all pages of a list. Raises as `_read`, and Refused past `most` rows."""
    page = await _read(listing)
    seen = 0
    while True:
        for row in page.data:
            seen += 1
            if seen > most:
                raise Refused(f"Stripe lists more than {most} of {page.url}: this many are not looked through")
            yield row
        if not page.has_more:
            return
        page = await _read(page.next_page_async())


async def _read(call: Awaitable[Any]) -> Any:
    """A call other than a meter event. Raises Unavailable where trying again may help, else Refused."""
    try:
        return await call
    except (stripe.AuthenticationError, stripe.PermissionError) as error:
        raise Refused(
            f"Stripe refuses the key: {words(error)}: set one that may read and write billing meters"
        ) from error
    except stripe.InvalidRequestError as error:
        raise Refused(f"Stripe refuses: {words(error)}") from error
    except (stripe.StripeError, aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"Stripe: {words(error)}") from error
