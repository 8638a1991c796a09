"""UsageEvent → bytes at the emitter: checked and encoded in one pass, by a function generated from `usage.avsc`.

It takes half of fastavro's time: one `b"".join`, a table of small integers, and caches of strings that were already found
valid and encoded. The fast path refuses whatever is unusual; `usage.check` and fastavro then name the fault or take the
event, so they alone decide what is valid, and a test holds both paths to equal bytes.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tollway.schemas import codec, usage

CACHED_MAX = 50_000
"""Most strings a cache; a full one is emptied: a miss costs a microsecond."""
PER_CALL = ("event_id", "hold", "payment_ref", "trace_id")
"""Ids that are new with every call: never cached."""
RECORD = "UsageEvent"

_NULL, _SOME, _END = b"\x00", b"\x02", b"\x00"
_INT_BOUNDS = {
    "sequence": 2**62,
    "occurred_at": 2**62,
    "latency_us": usage.LATENCY_US_MAX,
    "revenue_nano": usage.MONEY_NANO_MAX,
    "cost_nano": usage.MONEY_NANO_MAX,
}
_CLOSED = {"surface": usage.SURFACES, "principal_kind": usage.PRINCIPAL_KINDS, "status": usage.STATUSES}


class _Unusual(ValueError):
    """Not for the fast path."""


def encode(event: Mapping[str, Any]) -> bytes:
    """Check a whole UsageEvent and encode it, framed. Raises FieldError naming field, value and bound."""
    try:
        return _fast(event)
    except (LookupError, TypeError, ValueError, AttributeError):
        usage.check(event)
        return codec.encode(RECORD, dict(event))


def _unsigned(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


_VARINT = [_unsigned(n) for n in range(1 << 14)]
_LOW = [bytes((n & 0x7F | 0x80, n >> 7 | 0x80)) for n in range(1 << 14)]  # 14 bits with more to come


def _long(n: int) -> bytes:
    """Avro's zigzag varint of n ≥ 0, fourteen bits a look-up."""
    n <<= 1
    if n < 1 << 14:
        return _VARINT[n]
    if n < 1 << 28:
        return _LOW[n & 0x3FFF] + _VARINT[n >> 14]
    if n < 1 << 42:
        return _LOW[n & 0x3FFF] + _LOW[n >> 14 & 0x3FFF] + _VARINT[n >> 28]
    high = _VARINT[n >> 42] if n < 1 << 56 else _unsigned(n >> 42)
    return _LOW[n & 0x3FFF] + _LOW[n >> 14 & 0x3FFF] + _LOW[n >> 28 & 0x3FFF] + high


class _Strings(dict[Any, bytes]):
    """string → its encoded bytes, filled with strings that `encode_one` found valid. Bounded; emptied when full."""

    def __init__(
        self, encode_one: Callable[[Any], bytes], prefix: bytes = b"", keep: Mapping[Any, bytes] | None = None
    ):
        super().__init__(keep or {})
        self._encode_one, self._prefix, self._keep = encode_one, prefix, keep or {}

    def __missing__(self, text: Any) -> bytes:
        encoded = self._prefix + self._encode_one(text)
        if len(self) >= CACHED_MAX:
            self.clear()
            self.update(self._keep)
        self[text] = encoded
        return encoded


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], bytes]:
    match = pattern.fullmatch

    def encode_one(text: str) -> bytes:
        if match(text) is None:
            raise _Unusual
        return _VARINT[len(text) * 2] + text.encode("ascii")

    return encode_one


def _sized(least: int, most: int) -> Callable[[Any], bytes]:
    def encode_one(text: str) -> bytes:
        data = text.encode()
        if not least <= len(data) <= most:
            raise _Unusual
        return _VARINT[len(data) * 2] + data

    return encode_one


_id, _uuid, _meter = _matching(usage.ID), _matching(usage.UUID_HEX), _matching(usage.METER)
_text, _attribute = _sized(1, usage.OPERATION_BYTES_MAX), _sized(0, usage.ATTRIBUTE_BYTES_MAX)
_IDS, _METERS, _SOURCES, _TEXTS = _Strings(_id), _Strings(_meter), _Strings(_uuid), _Strings(_text)
_KEYS, _VALUES = _Strings(_sized(1, usage.ATTRIBUTE_BYTES_MAX)), _Strings(_attribute)
_NULLABLE_IDS = _Strings(_id, _SOME, {None: _NULL})
_NULLABLE_TEXTS = _Strings(_text, _SOME, {None: _NULL})


def _quantities(units_by_meter: Any) -> bytes:
    if (
        units_by_meter.__class__ is not dict
        or "calls" not in units_by_meter
        or len(units_by_meter) > usage.QUANTITIES_MAX
    ):
        raise _Unusual
    parts = [_VARINT[len(units_by_meter) * 2]]
    for meter, units in units_by_meter.items():
        if units.__class__ is not int or not 0 <= units <= usage.QUANTITY_MAX:
            raise _Unusual
        parts.append(_METERS[meter])
        parts.append(_VARINT[units + units] if units < 8192 else _long(units))
    parts.append(_END)
    return b"".join(parts)


def _path(runs: tuple[Any, ...]) -> bytes:
    if len(runs) > usage.PATH_MAX:
        raise _Unusual
    if not runs:
        return _END
    return b"".join((_VARINT[len(runs) * 2], *[_id(run) for run in runs], _END))


_PATHS = _Strings(_path, _SOME)


def _attributes(texts: Any) -> bytes:
    if texts.__class__ is not dict or len(texts) > usage.ATTRIBUTES_MAX:
        raise _Unusual
    if not texts:
        return _SOME + _END
    parts = [_SOME, _VARINT[len(texts) * 2]]
    for key, text in texts.items():
        parts.append(_KEYS[key])
        parts.append(_VALUES[text])
    parts.append(_END)
    return b"".join(parts)


def _lines(name: str, kind: str, nullable: bool) -> list[str]:
    """Source that leaves the bytes of one field in the local `f_<name>`. Raises ValueError where usage.py has no bound for it."""
    value = f'get("{name}")' if nullable else f'event["{name}"]'
    lines = [f"v = {value}"]
    if kind == "string" and name in _CLOSED:
        return [f"f_{name} = closed_{name}[{value}]"]
    if kind == "string" and name in ("event_id", "source"):
        return [f"f_{name} = {'SOURCES[' if name == 'source' else 'uuid('}{value}{']' if name == 'source' else ')'}"]
    if kind == "string" and name in usage.ID_FIELDS:
        if name not in PER_CALL:
            return [f"f_{name} = {'NULLABLE_IDS' if nullable else 'IDS'}[{value}]"]
        return [
            *lines,
            f"if v is None: f_{name} = NULL",
            "else:",
            " if id_match(v) is None: raise Unusual",
            f" f_{name} = SOME_LENGTH[len(v)] + v.encode()",
        ]
    if kind == "string" and name in usage.TEXT_FIELDS:
        return [f"f_{name} = {'NULLABLE_TEXTS' if nullable else 'TEXTS'}[{value}]"]
    if kind == "long" and name in _INT_BOUNDS:
        check = [f"if v.__class__ is not int or not 0 <= v <= {_INT_BOUNDS[name]}: raise Unusual"]
        encoded = "VARINT[v + v] if v < 8192 else long(v)"
        if not nullable:
            return [*lines, *check, f"f_{name} = {encoded}"]
        return [*lines, f"if v is None: f_{name} = NULL", "else:", f" {check[0]}", f" f_{name} = SOME + ({encoded})"]
    if name == "path" and nullable:
        refuse = "if v.__class__ is not list and v.__class__ is not tuple and v is not None: raise Unusual"
        return [*lines, refuse, "f_path = NULL if v is None else PATHS[tuple(v)]"]
    if name == "attributes" and nullable:
        return [*lines, "f_attributes = NULL if v is None else attributes(v)"]
    if name == "quantities" and not nullable:
        return [f"f_{name} = quantities({value})"]
    raise ValueError(f"usage.avsc: field {name} ({kind}) has no bound in usage.py: give it one")


def _generate() -> Callable[[Mapping[str, Any]], bytes]:
    """The fast path, from the schema's fields in their order."""
    fields = json.loads(codec.schema_text(codec.schema_id(RECORD)))["fields"]
    body = ["if not known(event): raise Unusual", "get = event.get"]
    for field in fields:
        nullable = isinstance(field["type"], list)
        kind = field["type"][1] if nullable else field["type"]
        kind = kind["type"] if isinstance(kind, dict) else kind
        body += _lines(field["name"], kind, nullable)
    body += [
        "if (f_revenue_nano is NULL) is not (f_revenue_asset is NULL): raise Unusual",
        "if (f_cost_nano is NULL) is not (f_cost_asset is NULL): raise Unusual",
        "if f_hold is not NULL and event['sequence'] == 0: raise Unusual",
        f"return join((header, {', '.join('f_' + field['name'] for field in fields)}))",
    ]
    source = "def encode(event):\n" + "\n".join(f" {line}" for line in body)
    names: dict[str, Any] = {
        "known": frozenset(usage.FIELDS).issuperset, "Unusual": _Unusual, "join": b"".join,
        "header": codec.header(codec.schema_id(RECORD)), "NULL": _NULL, "SOME": _SOME, "VARINT": _VARINT, "long": _long,
        "uuid": _uuid, "id_match": usage.ID.fullmatch, "SOME_LENGTH": [_SOME + _VARINT[n * 2] for n in range(129)], "SOURCES": _SOURCES, "IDS": _IDS, "NULLABLE_IDS": _NULLABLE_IDS, "TEXTS": _TEXTS,
        "NULLABLE_TEXTS": _NULLABLE_TEXTS, "quantities": _quantities, "PATHS": _PATHS, "attributes": _attributes,
        **{f"closed_{name}": {text: _text(text) for text in allowed} for name, allowed in _CLOSED.items()},
    }  # fmt: skip
    exec(compile(source, "<usage.avsc>", "exec"), names)
    generated: Callable[[Mapping[str, Any]], bytes] = names["encode"]
    return generated


_fast = _generate()
