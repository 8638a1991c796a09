"""CloudEvents 1.0 (JSON format) → UsageEvent: what a service that is not Python sends, read strictly. Pure.

Identity is the envelope's `source` + `id` within an account: the record's event_id is made of these alone, so a repeat is
known however often, and wherever, it is sent. Its usage is unsequenced: admission takes it within an hour of its call.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from tollway.connectors.principal import Principal
from tollway.schemas import encoder
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.usage import FIELDS, UNSEQUENCED_S, FieldError

SPEC_VERSION, TYPE = "1.0", "tollway.usage.v1"
SINGLE, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"
TEXT_MAX = 512
"""Characters of `id` and of `source`."""
MARGIN_S = 60
"""Admission counts by the broker's clock: what it might find too old by the time it is appended is refused here."""
AHEAD_S = 30

GIVEN = ("event_id", "source", "sequence", "occurred_at", "hold")
"""Fields of UsageEvent that the envelope and the log's rules decide; `account` is the token's."""
DATA_FIELDS = tuple(name for name in FIELDS if name not in GIVEN)
_ENVELOPE = ("specversion", "id", "source", "type")
_HOUR_MS = 3_600_000


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 has it: no NaN, no name twice, no depth that would end the process. Raises FieldError."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_constant)
    except FieldError:
        raise
    except (ValueError, RecursionError) as error:
        raise FieldError("body", body[:60], "bad_json", f"give JSON: {error or type(error).__name__}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FieldError("body", [name for name, _ in pairs][:20], "bad_json", "give each name once")
    return found


def _constant(name: str) -> None:
    raise FieldError("body", name, "bad_json", "JSON has no such number")


def usage_of(
    envelope: Any, caller: Principal, now_us: int, attributes: Collection[str] = frozenset()
) -> tuple[dict[str, Any], bytes]:
    """(UsageEvent, framed Avro) of one CloudEvent. `attributes`: names that may travel. Raises FieldError.

    The account is the caller's, whatever the event says; the operation must be one that the caller may report.
    """
    if not isinstance(envelope, dict):
        raise FieldError("event", envelope, "bad_event", "give a CloudEvent: a JSON object")
    for name in _ENVELOPE:
        value = envelope.get(name)
        if not isinstance(value, str) or not 1 <= len(value) <= TEXT_MAX:
            raise FieldError(name, value, "bad_event", f"give a text of 1 to {TEXT_MAX} characters")
    if envelope["specversion"] != SPEC_VERSION:
        raise FieldError("specversion", envelope["specversion"], "bad_event", f"give {SPEC_VERSION}")
    if envelope["type"] != TYPE:
        raise FieldError("type", envelope["type"], "bad_event", f"give {TYPE}")
    if envelope.get("datacontenttype") not in (None, "application/json"):
        raise FieldError("datacontenttype", envelope["datacontenttype"], "bad_event", "give application/json")
    data = _data(envelope, caller, attributes)
    identity = _identity(caller.account, envelope["source"], envelope["id"])
    occurred_us = _occurred_us(envelope.get("time"), now_us)
    event = {
        **dict.fromkeys(FIELDS),
        **data,
        "event_id": uuid7_hex(identity >> 74, identity),
        "source": uuid7_hex(occurred_us // 1000 // _HOUR_MS * _HOUR_MS, identity >> 128),
        "sequence": 0,
        "occurred_at": occurred_us,
        "account": caller.account,
    }
    return event, encoder.encode(event)


def _data(envelope: dict[str, Any], caller: Principal, attributes: Collection[str]) -> dict[str, Any]:
    data = envelope.get("data")
    if not isinstance(data, dict):
        raise FieldError("data", data, "bad_event", f"give an object with {', '.join(DATA_FIELDS)}")
    if unknown := sorted(data.keys() - set(DATA_FIELDS)):
        raise FieldError(f"data.{unknown[0]}", data[unknown[0]], "unknown_field", f"give {', '.join(DATA_FIELDS)}")
    if data.get("account") not in (None, caller.account):
        raise FieldError(
            "data.account", data["account"], "other_account", "the token is another account's: leave it out"
        )
    operation = data.get("operation")
    if isinstance(operation, str) and not caller.may(operation):
        raise FieldError("data.operation", operation, "forbidden_operation", "the token may not report this operation")
    given = data.get("attributes")
    if isinstance(given, Mapping) and (foreign := sorted(set(given) - set(attributes))):
        raise FieldError("data.attributes", foreign[0], "forbidden_attribute", "it is not on this deployment's list")
    quantities = data.get("quantities")
    if quantities is None or (isinstance(quantities, Mapping) and "calls" not in quantities):
        quantities = {"calls": 1, **(quantities or {})}
    return {**data, "quantities": quantities}


def _identity(account: str, source: str, id_: str) -> int:
    """256 bits, the same for the same event of an account."""
    text = "\0".join((account, source, id_)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest(), "big")


def _occurred_us(text: Any, now_us: int) -> int:
    """RFC 3339 → microseconds. A repeat must say the same, so it is never filled in."""
    cure = "give when the call began, such as 2026-01-31T12:00:00.123456Z (RFC 3339)"
    if not isinstance(text, str):
        raise FieldError("time", text, "bad_time", cure)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise FieldError("time", text, "bad_time", cure) from None
    if at.tzinfo is None or "T" not in text.upper():
        raise FieldError("time", text, "bad_time", cure)
    since = at - datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    occurred_us = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    oldest_us = now_us - (UNSEQUENCED_S - MARGIN_S) * 1_000_000
    if not oldest_us <= occurred_us <= now_us + AHEAD_S * 1_000_000:
        raise FieldError(
            "time",
            text,
            "unsequenced_age",
            f"it is taken within {(UNSEQUENCED_S - MARGIN_S) // 60} minutes of the call",
        )
    return occurred_us
