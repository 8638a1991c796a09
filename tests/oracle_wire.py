"""The oracle's own reading of the wire: lane, framing, Avro, and the content rules of design §4. Imports nothing of tollway."""

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import fastavro

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
FILES = {1_000_000: "usage.avsc", 1_000_001: "command.avsc", 1_000_002: "meter_event.avsc"}
USAGE_ID, COMMAND_ID, METER_EVENT_ID = FILES
USAGE_IDS = {USAGE_ID}
"""Those of every version of UsageEvent."""

ID = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")
METER = re.compile(r"[a-z][a-z0-9_]{0,63}")
UUID = re.compile(r"[0-9a-f]{32}")
IDS = ("account", "principal", "agent", "session", "run", "parent", "hold", "price_ref", "payment_ref", "trace_id")
TEXTS = ("operation", "rail", "revenue_asset", "cost_asset", "provider", "model")
SETS = {
    "surface": {"rest", "mcp", "agent", "llm"},
    "principal_kind": {"user", "client", "anonymous"},
    "status": {"ok", "error", "denied", "rate_limited", "payment_required"},
}
LONG_MAX = 2**62


class Refused(Exception):
    """A record that must be a dead letter; the argument is the reason's name."""


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 with the Java client's seed, written from the published algorithm."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(data)) & mask
    while len(data) >= 4:
        (k,) = struct.unpack("<I", data[:4])
        k = k * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
        data = data[4:]
    for shift, byte in enumerate(data):
        h ^= byte << 8 * shift
    if data:
        h = h * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


_lanes: dict[str, int] = {}


def lane(account: str) -> int:
    """0 … 255, fixed for ever."""
    if account not in _lanes:
        _lanes[account] = (murmur2(account.encode()) & 0x7FFFFFFF) % 256
    return _lanes[account]


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, dict):
        return node["type"] if "logicalType" in node else {k: _plain(v) for k, v in node.items() if k != "doc"}
    return node


SCHEMA = {
    n: fastavro.parse_schema(_plain(json.loads((SCHEMAS / f).read_text())), _force=True) for n, f in FILES.items()
}


def learn(schema_id: int, schema: dict[str, Any]) -> None:
    """A further version of UsageEvent, for this process."""
    SCHEMA[schema_id] = fastavro.parse_schema(_plain(schema), _force=True)
    USAGE_IDS.add(schema_id)


def frame(schema_id: int, record: dict[str, Any]) -> bytes:
    """Confluent framing around one encoded record."""
    out = io.BytesIO()
    out.write(b"\0" + struct.pack(">I", schema_id))
    fastavro.schemaless_writer(out, SCHEMA[schema_id], record)
    return out.getvalue()


def decode(value: bytes) -> dict[str, Any]:
    """The usage record in a value that `unframe` has taken."""
    number = struct.unpack(">I", value[1:5])[0]
    record: dict[str, Any] = fastavro.schemaless_reader(io.BytesIO(value[5:]), SCHEMA[number], None)
    return record


def unframe(value: bytes) -> tuple[int, dict[str, Any]]:
    """(schema id, record). Raises Refused with the first reason that holds."""
    if len(value) > 65_536:
        raise Refused("oversized")
    if len(value) < 5 or value[0]:
        raise Refused("bad_framing")
    number = struct.unpack(">I", value[1:5])[0]
    if number not in {*USAGE_IDS, COMMAND_ID}:
        raise Refused("unknown_schema")
    source = io.BytesIO(value[5:])
    try:
        record: dict[str, Any] = fastavro.schemaless_reader(source, SCHEMA[number], None)
    except UnicodeDecodeError as error:
        raise Refused("invalid_utf8") from error
    except Exception as error:
        raise Refused("undecodable") from error
    # fastavro keeps the last of two equal keys. Every writer here uses the canonical encoding, so a shorter one betrays it.
    if len(frame(number, record)) - 5 != source.tell():
        raise Refused("duplicate_key")
    return number, record


def check_content(event: dict[str, Any]) -> None:
    """Bounds and signs of a usage record. Raises Refused."""
    _check_words(event)
    _check_numbers(event)
    quantities, path, attributes = event["quantities"], event["path"] or [], event["attributes"] or {}
    if len(quantities) > 32 or len(path) > 32 or len(attributes) > 32:
        raise Refused("over_bound")
    if "calls" not in quantities:
        raise Refused("missing_calls")
    if not all(METER.fullmatch(meter) for meter in quantities) or not all(ID.fullmatch(run) for run in path):
        raise Refused("bad_id")
    for units in quantities.values():
        _bounded(units, 10**12)
    for key, text in attributes.items():
        if not key or len(key.encode()) > 256 or len(text.encode()) > 256:
            raise Refused("over_bound")
    if event["hold"] is not None and event["sequence"] == 0:
        raise Refused("hold_unsequenced")


def _check_words(event: dict[str, Any]) -> None:
    if not UUID.fullmatch(event["event_id"]) or not UUID.fullmatch(event["source"]):
        raise Refused("bad_id")
    if any(event[name] not in allowed for name, allowed in SETS.items()):
        raise Refused("bad_value")
    if any(event[name] is not None and not ID.fullmatch(event[name]) for name in IDS):
        raise Refused("bad_id")
    if any(event[name] is not None and not 1 <= len(event[name].encode()) <= 256 for name in TEXTS):
        raise Refused("over_bound")


def _check_numbers(event: dict[str, Any]) -> None:
    _bounded(event["sequence"], LONG_MAX)
    _bounded(event["occurred_at"], LONG_MAX)
    _bounded(event["latency_us"], 10**12)
    for name in ("revenue", "cost"):
        amount, asset = event[f"{name}_nano"], event[f"{name}_asset"]
        if amount is not None:
            _bounded(amount, 10**14)
        if (amount is None) != (asset is None):
            raise Refused("bad_value")


def _bounded(number: int, most: int) -> None:
    if number < 0:
        raise Refused("negative")
    if number > most:
        raise Refused("over_bound")
