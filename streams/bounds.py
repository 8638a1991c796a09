"""Which usage rows may be out of bounds: whole columns at a time, then the exact check for the few that look it.

The column checks may only err towards suspicion: what they pass, `schemas.usage.check` passes too (a property test holds
them to each other).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tollway.schemas import usage as fields

ID_BYTES_MAX = 128
Mask = npt.NDArray[np.bool_]


def _table(allowed: str) -> Mask:
    table = np.zeros(256, np.bool_)
    table[np.frombuffer(allowed.encode(), np.uint8)] = True
    return table


_DIGITS, _LOWER, _UPPER = "0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID_BYTES = _table(_DIGITS + _LOWER + _UPPER + "._:@/-")
_HEX_BYTES = _table(_DIGITS + "abcdef")


def suspects(usage: pa.RecordBatch) -> Mask:
    """[m] True where a row may violate a bound, an id pattern, a closed set or hold a map key twice."""
    m = len(usage)
    found = np.zeros(m, np.bool_)
    for name in ("event_id", "source"):
        found |= _texts(usage.column(name), _HEX_BYTES, 32, 32)
    for name in fields.ID_FIELDS:
        found |= _texts(usage.column(name), _ID_BYTES, 1, ID_BYTES_MAX)
    for name in fields.TEXT_FIELDS:
        found |= _texts(usage.column(name), None, 1, fields.OPERATION_BYTES_MAX)
    for name, allowed in (
        ("surface", fields.SURFACES),
        ("principal_kind", fields.PRINCIPAL_KINDS),
        ("status", fields.STATUSES),
    ):
        found |= ~_bools(pc.is_in(usage.column(name), value_set=pa.array(allowed)))
    for name, most in (
        ("sequence", 2**62),
        ("latency_us", fields.LATENCY_US_MAX),
        ("occurred_at", 2**62),
        ("revenue_nano", fields.MONEY_NANO_MAX),
        ("cost_nano", fields.MONEY_NANO_MAX),
    ):
        values = longs(usage.column(name))
        found |= (values < 0) | (values > most)
    for name in ("revenue", "cost"):
        found |= _bools(usage.column(f"{name}_nano").is_null()) != _bools(usage.column(f"{name}_asset").is_null())
    found |= (longs(usage.column("sequence")) == 0) & _bools(usage.column("hold").is_valid())
    return found | _quantities(usage.column("quantities")) | _path(usage.column("path")) | _attributes(usage)


def fault(usage: pa.RecordBatch, row: int) -> tuple[str, str] | None:
    """(reason, detail) of one row by the exact check, None where it is within bounds."""
    record = usage.slice(row, 1).to_pylist()[0]
    record["occurred_at"] = int(longs(usage.column("occurred_at"))[row])
    for name in ("quantities", "attributes"):
        pairs = record[name] or []
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            return "duplicate_key", f"{name} holds a key twice: {sorted(keys)}"
        record[name] = dict(pairs) if record[name] is not None else None
    try:
        fields.check(record)
    except fields.FieldError as error:
        return error.reason, str(error)[:300]
    return None


def longs(column: pa.Array) -> npt.NDArray[np.int64]:
    """An int64 or timestamp column as numpy, nulls as 0."""
    if column.type != pa.int64():
        column = column.cast(pa.int64())
    if column.null_count:
        column = column.fill_null(0)
    values: npt.NDArray[np.int64] = column.to_numpy(zero_copy_only=False)
    return values


def _bools(column: pa.Array) -> Mask:
    values: Mask = column.to_numpy(zero_copy_only=False)
    return values.astype(np.bool_)


def _offsets(column: Any) -> npt.NDArray[np.int32]:
    """Value offsets of a string, list or map column, [len + 1], absolute."""
    buffer = column.buffers()[1]
    return np.frombuffer(buffer, np.int32, len(column) + 1, column.offset * 4)


def _texts(column: pa.Array, allowed: Mask | None, shortest: int, longest: int) -> Mask:
    """Rows whose text is too short, too long or has a byte that is not allowed. Null passes."""
    suspect = np.zeros(len(column), np.bool_)
    if not len(column) or column.null_count == len(column):
        return suspect
    offsets = _offsets(column)
    lengths = np.diff(offsets)
    suspect |= (lengths < shortest) | (lengths > longest)
    if column.null_count:
        suspect &= _bools(column.is_valid())
    if allowed is not None and offsets[-1] > offsets[0]:
        text = np.frombuffer(column.buffers()[2], np.uint8, int(offsets[-1] - offsets[0]), int(offsets[0]))
        good = allowed[text]
        if not good.all():
            bad = np.r_[0, np.cumsum(~good)]
            at = offsets - offsets[0]
            suspect |= bad[at[1:]] > bad[at[:-1]]
    return suspect


def _quantities(column: pa.MapArray) -> Mask:
    """Too many meters, a meter twice or badly named, no `calls`, units out of bounds."""
    offsets = _offsets(column)
    counts = np.diff(offsets)
    suspect = (counts < 1) | (counts > fields.QUANTITIES_MAX)
    keys = column.keys.slice(offsets[0], offsets[-1] - offsets[0])
    units = longs(column.items.slice(offsets[0], offsets[-1] - offsets[0]))
    if not len(keys):
        return suspect
    encoded = keys.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    owner = np.repeat(np.arange(len(column)), counts)
    entry_bad = (units < 0) | (units > fields.QUANTITY_MAX)
    badly_named = np.array([not fields.METER.fullmatch(name) for name in names])
    entry_bad |= badly_named[codes]
    suspect[owner[entry_bad]] = True
    has_calls = np.zeros(len(column), np.bool_)
    if "calls" in names:
        has_calls[owner[codes == names.index("calls")]] = True
    pair = np.sort(owner * len(names) + codes)
    twice = pair[1:][pair[1:] == pair[:-1]] // len(names)
    suspect[twice] = True
    return suspect | ~has_calls


def _path(column: pa.ListArray) -> Mask:
    if column.null_count == len(column):
        return np.zeros(len(column), np.bool_)
    offsets = _offsets(column)
    counts = np.diff(offsets)
    suspect = counts > fields.PATH_MAX
    items = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    bad = _texts(items, _ID_BYTES, 1, ID_BYTES_MAX)
    suspect[np.repeat(np.arange(len(column)), counts)[bad]] = True
    return suspect


def _attributes(usage: pa.RecordBatch) -> Mask:
    """Any row with attributes too many, too long or twice."""
    column = usage.column("attributes")
    if column.null_count == len(column):
        return np.zeros(len(column), np.bool_)
    offsets = _offsets(column)
    counts = np.diff(offsets)
    suspect = counts > fields.ATTRIBUTES_MAX
    owner = np.repeat(np.arange(len(column)), counts)
    length = offsets[-1] - offsets[0]
    keys, texts = column.keys.slice(offsets[0], length), column.items.slice(offsets[0], length)
    bad = _texts(keys, None, 1, fields.ATTRIBUTE_BYTES_MAX) | _texts(texts, None, 0, fields.ATTRIBUTE_BYTES_MAX)
    suspect[owner[bad]] = True
    codes = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    if len(codes):
        span = int(codes.max()) + 1
        pair = np.sort(owner * span + codes)
        suspect[pair[1:][pair[1:] == pair[:-1]] // span] = True
    return suspect
