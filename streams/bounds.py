"""Which usage rows may be out of bounds: whole columns at a time, then the exact check for the few that look it.

The column checks may only err towards suspicion: what they pass, `schemas.usage.check` passes too (a property test holds
them to each other). A column is looked at row by row only where something in it is wrong: nearly always nothing is.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tollway.schemas import usage as fields
from tollway.streams.columns import Quantities, ends_of, text_of

ID_BYTES_MAX = 128
PAIRS_FROM = 64
"""From so many different meters on, those that stand twice are found by sorting instead of in a table."""
Mask = npt.NDArray[np.bool_]

_DIGITS, _LOWER, _UPPER = b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID_BYTES = _DIGITS + _LOWER + _UPPER + b"._:@/-"
_HEX_BYTES = _DIGITS + b"abcdef"
_CLOSED = (
    ("surface", frozenset(fields.SURFACES)),
    ("principal_kind", frozenset(fields.PRINCIPAL_KINDS)),
    ("status", frozenset(fields.STATUSES)),
)
_NUMBERS = (
    ("sequence", 2**62),
    ("latency_us", fields.LATENCY_US_MAX),
    ("occurred_at", 2**62),
    ("revenue_nano", fields.MONEY_NANO_MAX),
    ("cost_nano", fields.MONEY_NANO_MAX),
)


def suspects(usage: pa.RecordBatch, quantities: Quantities | None = None) -> Mask:
    """[m] True where a row may violate a bound, an id pattern, a closed set or hold a map key twice.

    `quantities`: those of `usage`, where they are at hand.
    """
    found = np.zeros(len(usage), np.bool_)
    if not len(usage):
        return found
    column = dict(zip(usage.schema.names, usage.columns, strict=True))
    for strange in chain(
        *(_texts(column[name], _HEX_BYTES, 32, 32) for name in ("event_id", "source")),
        *(_texts(column[name], _ID_BYTES, 1, ID_BYTES_MAX) for name in fields.ID_FIELDS),
        *(_texts(column[name], None, 1, fields.OPERATION_BYTES_MAX) for name in fields.TEXT_FIELDS),
        *(_closed(column[name], allowed) for name, allowed in _CLOSED),
        *(_numbers(column[name], most) for name, most in _NUMBERS),
        _pairs(column),
        _quantities(quantities or Quantities.of(column["quantities"])),
        _path(column["path"]),
        _attributes(column["attributes"]),
    ):
        found |= strange
    return found


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


def _texts(column: pa.Array, allowed: bytes | None, shortest: int, longest: int) -> Iterator[Mask]:
    """Rows whose text is too short, too long or has a byte that is not allowed. Null passes."""
    if column.null_count == len(column):
        return
    offsets = ends_of(column)
    lengths = offsets[1:] - offsets[:-1]
    if int(lengths.min()) < shortest or int(lengths.max()) > longest:
        strange = (lengths < shortest) | (lengths > longest)
        yield strange & _bools(column.is_valid()) if column.null_count else strange
    if allowed is not None:
        text = text_of(column, offsets)
        if text.translate(None, allowed):
            good = np.zeros(256, np.bool_)
            good[list(allowed)] = True
            bad = np.r_[0, np.cumsum(~good[np.frombuffer(text, np.uint8)])]
            yield bad[offsets[1:] - offsets[0]] > bad[offsets[:-1] - offsets[0]]


def _closed(column: pa.Array, allowed: frozenset[str]) -> Iterator[Mask]:
    """Rows with a word that is not of the set."""
    if not allowed.issuperset(column.unique().to_pylist()):
        yield np.array([word not in allowed for word in column.to_pylist()], np.bool_)


def _numbers(column: pa.Array, most: int) -> Iterator[Mask]:
    """Rows below zero or above `most`. Null passes."""
    if column.null_count == len(column):
        return
    values = longs(column)
    if int(values.view(np.uint64).max()) > most:  # what is below zero is above all there
        yield (values < 0) | (values > most)


def _pairs(column: dict[str, pa.Array]) -> Iterator[Mask]:
    """Rows with an amount and no asset or the other way round, or with a hold and no sequence."""
    for name in ("revenue", "cost"):
        amount, asset = column[f"{name}_nano"], column[f"{name}_asset"]
        if amount.null_count != len(amount) or asset.null_count != len(asset):
            yield _bools(amount.is_null()) != _bools(asset.is_null())
    if column["hold"].null_count != len(column["hold"]):
        yield (longs(column["sequence"]) == 0) & _bools(column["hold"].is_valid())


def _quantities(found: Quantities) -> Iterator[Mask]:
    """Too many meters, a meter twice or badly named, no `calls`, units out of bounds."""
    m, names = len(found.counts), len(found.meters)
    if int(found.counts.min()) < 1 or int(found.counts.max()) > fields.QUANTITIES_MAX:
        yield (found.counts < 1) | (found.counts > fields.QUANTITIES_MAX)
    if not names:
        return
    if int(found.units.view(np.uint64).max()) > fields.QUANTITY_MAX:
        yield _rows(m, found.row[(found.units < 0) | (found.units > fields.QUANTITY_MAX)])
    badly_named = np.array([not fields.METER.fullmatch(name) for name in found.meters])
    if badly_named.any():
        yield _rows(m, found.row[badly_named[found.meter]])
    calls = found.meters.index("calls") if "calls" in found.meters else -1
    pair = found.row * names + found.meter
    if names < PAIRS_FROM:
        times = np.bincount(pair, minlength=m * names).reshape(m, names)
        if int(times.max()) > 1:
            yield times.max(axis=1) > 1
    else:
        pair.sort()
        yield _rows(m, pair[1:][pair[1:] == pair[:-1]] // names)
    yield ~_rows(m, found.row[found.meter == calls])


def _rows(m: int, rows: npt.NDArray[np.int64]) -> Mask:
    """[m] True at `rows`."""
    mask = np.zeros(m, np.bool_)
    mask[rows] = True
    return mask


def _path(column: pa.ListArray) -> Iterator[Mask]:
    """Rows with too many runs, or one that is no id."""
    if column.null_count == len(column):
        return
    offsets = ends_of(column)
    counts = np.diff(offsets)
    yield counts > fields.PATH_MAX
    items = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    owner = np.repeat(np.arange(len(column)), counts)
    for bad in _texts(items, _ID_BYTES, 1, ID_BYTES_MAX):
        yield _rows(len(column), owner[bad])


def _attributes(column: pa.MapArray) -> Iterator[Mask]:
    """Rows with attributes too many, too long or twice."""
    if column.null_count == len(column):
        return
    offsets = ends_of(column)
    counts = np.diff(offsets)
    yield counts > fields.ATTRIBUTES_MAX
    owner = np.repeat(np.arange(len(column)), counts)
    length = offsets[-1] - offsets[0]
    keys, texts = column.keys.slice(offsets[0], length), column.items.slice(offsets[0], length)
    for bad in chain(
        _texts(keys, None, 1, fields.ATTRIBUTE_BYTES_MAX), _texts(texts, None, 0, fields.ATTRIBUTE_BYTES_MAX)
    ):
        yield _rows(len(column), owner[bad])
    codes = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    if len(codes):
        span = int(codes.max()) + 1
        pair = np.sort(owner * span + codes)
        yield _rows(len(column), pair[1:][pair[1:] == pair[:-1]] // span)
