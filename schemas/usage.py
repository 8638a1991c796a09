"""UsageEvent v1: its fields, bounds and checks. The same bounds hold at `emit()` and at admission (design §4)."""

import re
from collections.abc import Mapping
from typing import Any, TypedDict

SURFACES = ("rest", "mcp", "agent", "llm")
PRINCIPAL_KINDS = ("user", "client", "anonymous")
STATUSES = ("ok", "error", "denied", "rate_limited", "payment_required")
COUNTED_STATUSES = ("ok", "error")
BILLED_STATUS = "ok"

QUANTITY_MAX = 10**12
MONEY_NANO_MAX = 10**14
QUANTITIES_MAX = 32
ATTRIBUTES_MAX = 32
ATTRIBUTE_BYTES_MAX = 256
PATH_MAX = 32
LATENCY_US_MAX = 10**12
OPERATION_BYTES_MAX = 256

ID_PATTERN = r"[A-Za-z0-9._:@/-]{1,128}"
METER_PATTERN = r"[a-z][a-z0-9_]{0,63}"
UUID_PATTERN = r"[0-9a-f]{32}"

ID = re.compile(ID_PATTERN)
METER = re.compile(METER_PATTERN)
UUID_HEX = re.compile(UUID_PATTERN)

ID_FIELDS = (
    "account",
    "principal",
    "agent",
    "session",
    "run",
    "parent",
    "hold",
    "price_ref",
    "payment_ref",
    "trace_id",
)
"""Fields held to ID_PATTERN where they are not null (`path` items too)."""
TEXT_FIELDS = ("operation", "rail", "revenue_asset", "cost_asset", "provider", "model")
"""Free text of at most OPERATION_BYTES_MAX bytes and at least one."""

LATE_S = 34 * 86_400
"""Older than this at append → dead letter `too_late` (the rail takes 35 days)."""
AHEAD_S = 60
"""Further ahead of append time than this → clamped to append time, flagged."""
UNSEQUENCED_S = 3_600
SOURCE_LIFE_S = 5 * 86_400
SOURCE_AHEAD_S = 86_400
RESEND_S = 3 * 86_400
"""An emitter does not resend what is older than this."""


class UsageEvent(TypedDict, total=False):
    """One call. Times are microseconds since 1970 UTC, money is nano units, quantities are whole units."""

    event_id: str
    source: str
    sequence: int
    occurred_at: int
    surface: str
    operation: str
    account: str
    principal_kind: str
    principal: str
    status: str
    latency_us: int
    quantities: dict[str, int]
    agent: str | None
    session: str | None
    run: str | None
    parent: str | None
    path: list[str] | None
    hold: str | None
    rail: str | None
    price_ref: str | None
    revenue_nano: int | None
    revenue_asset: str | None
    cost_nano: int | None
    cost_asset: str | None
    payment_ref: str | None
    provider: str | None
    model: str | None
    trace_id: str | None
    attributes: dict[str, str] | None


FIELDS = tuple(UsageEvent.__annotations__)
REQUIRED = FIELDS[: FIELDS.index("agent")]
OPTIONAL = FIELDS[FIELDS.index("agent") :]
_KNOWN = frozenset(FIELDS)
_CLOSED = (("surface", SURFACES), ("principal_kind", PRINCIPAL_KINDS), ("status", STATUSES))


class FieldError(ValueError):
    """A field is out of bounds: `field`, `value`, `reason` (a dead letter's reason name) and the bound, in words."""

    def __init__(self, field: str, value: object, reason: str, cure: str) -> None:
        shown = repr(value)
        super().__init__(f"{field} is {shown if len(shown) <= 120 else shown[:117] + '...'}: {cure}")
        self.field, self.value, self.reason = field, value, reason


def check(event: Mapping[str, Any]) -> None:
    """Refuse a usage record that admission would refuse for its own content. Raises FieldError naming field, value, cure."""
    if not event.keys() <= _KNOWN:
        name = min(event.keys() - _KNOWN, key=str)
        raise FieldError(str(name), event[name], "unknown_field", f"fields are {', '.join(FIELDS)}")
    for name in REQUIRED:
        if event.get(name) is None:
            raise FieldError(name, event.get(name), "missing", "it is required")
    for name in ("event_id", "source"):
        _matches(UUID_HEX, name, event[name], "give a UUIDv7 as 32 hex digits")
    for name, allowed in _CLOSED:
        _expect(event[name] in allowed, name, event[name], "bad_value", f"give one of {', '.join(allowed)}")
    for name in ID_FIELDS:
        if event.get(name) is not None:
            _matches(ID, name, event[name], f"ids match {ID_PATTERN}")
    for name in TEXT_FIELDS:
        if event.get(name) is not None:
            _text(name, event[name], 1, OPERATION_BYTES_MAX)
    _check_numbers(event)
    _check_collections(event)


def _check_numbers(event: Mapping[str, Any]) -> None:
    _within("sequence", event["sequence"], 2**62)
    _within("occurred_at", event["occurred_at"], 2**62)
    _within("latency_us", event["latency_us"], LATENCY_US_MAX)
    for name in ("revenue", "cost"):
        nano, asset = event.get(f"{name}_nano"), event.get(f"{name}_asset")
        if nano is not None:
            _within(f"{name}_nano", nano, MONEY_NANO_MAX)
        _expect(
            (nano is None) == (asset is None),
            f"{name}_asset",
            asset,
            "bad_value",
            f"{name}_nano and {name}_asset come together",
        )
    _expect(
        not (event.get("hold") is not None and event["sequence"] == 0),
        "sequence",
        0,
        "hold_unsequenced",
        "usage with a hold needs a sequence of 1 or more",
    )


def _check_collections(event: Mapping[str, Any]) -> None:
    quantities = _holds("quantities", event["quantities"], Mapping, QUANTITIES_MAX, "meters")
    if "calls" not in quantities:
        raise FieldError("quantities", list(quantities), "missing_calls", "the meter `calls` is always there")
    for meter, units in quantities.items():
        _matches(METER, "quantities", meter, f"meters match {METER_PATTERN}")
        _within(f"quantities.{meter}", units, QUANTITY_MAX)
    if event.get("path") is not None:
        for run in _holds("path", event["path"], (list, tuple), PATH_MAX, "runs"):
            _matches(ID, "path", run, f"ids match {ID_PATTERN}")
    if event.get("attributes") is not None:
        for key, text in _holds("attributes", event["attributes"], Mapping, ATTRIBUTES_MAX, "keys").items():
            _text("attributes", key, 1, ATTRIBUTE_BYTES_MAX)
            _text(f"attributes.{key}", text, 0, ATTRIBUTE_BYTES_MAX)


def _holds(field: str, value: Any, kind: Any, most: int, what: str) -> Any:
    """The collection, if it is one and not too long."""
    if not isinstance(value, kind):
        raise FieldError(
            field, value, "bad_value", f"give a {'map' if kind is Mapping else 'list'} of at most {most} {what}"
        )
    if len(value) > most:
        raise FieldError(field, len(value), "over_bound", f"give at most {most} {what}")
    return value


def _matches(pattern: re.Pattern[str], field: str, value: object, cure: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise FieldError(field, value, "bad_id", cure)


def _text(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, str):
        raise FieldError(field, value, "bad_value", f"give a text of {least} to {most} bytes")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise FieldError(field, value, "bad_value", "give text that UTF-8 can carry: no lone surrogates") from None
    if not least <= size <= most:
        raise FieldError(field, value, "over_bound", f"give {least} to {most} bytes")


def _within(field: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise FieldError(field, value, "bad_value", "give a whole number")
    if value < 0:
        raise FieldError(field, value, "negative", f"give a whole number from 0 to {most}: usage never subtracts")
    if value > most:
        raise FieldError(field, value, "over_bound", f"give a whole number from 0 to {most}")


def _expect(holds: object, field: str, value: object, reason: str, cure: str) -> None:
    if not holds:
        raise FieldError(field, value, reason, cure)
