"""Bytes → Arrow: a whole batch by one decoder, its poison found by bisection with the same decoder (design §3)."""

from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyruhvro

from tollway.schemas import codec
from tollway.streams.batch import HEAD_BYTES

Rows = npt.NDArray[np.int64]

_BODY: Callable[[Any], bytes] = itemgetter(slice(HEAD_BYTES, None))
DECODE_FAILURES = (ValueError, pa.ArrowInvalid, OverflowError)


def usage_ids() -> list[int]:
    """Schema ids of UsageEvent, oldest first."""
    return sorted(number for number, entry in codec.catalogue().items() if entry["record"] == "UsageEvent")


@cache
def usage_schema() -> pa.Schema:
    """Arrow schema of the newest UsageEvent: every batch has it, whichever version its records were written in."""
    return decode_id(usage_ids()[-1], []).schema


def decode_id(schema_id: int, bodies: list[bytes]) -> pa.RecordBatch:
    """Decode bodies (no framing) of one schema. Raises ValueError where any of them does not decode."""
    batch = pyruhvro.deserialize_array(bodies, codec.schema_text(schema_id))
    batch.validate(full=True)  # the decoder lets invalid UTF-8 pass
    return batch


def warm() -> None:
    """Decode every schema once: an unsupported one raises here, at start, and not in the middle of a partition."""
    for number in codec.catalogue():
        decode_id(number, [])


def decode_usage(
    rows: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32], values: Sequence[bytes | None]
) -> tuple[pa.RecordBatch, npt.NDArray[np.int64], dict[int, tuple[str, str]]]:
    """Decode usage records (`rows` index into `values`, `ids` are theirs).

    Returns the columns of those that decode, their rows in order, and row → (reason, detail) of the poison.
    """
    poison: dict[int, tuple[str, str]] = {}
    pieces: list[tuple[pa.RecordBatch, Rows]] = []
    for number in sorted(set(ids.tolist())):
        mine = rows[ids == number]
        bodies = list(map(_BODY, values if len(mine) == len(values) else [values[row] or b"" for row in mine.tolist()]))
        for batch, good in _bisect(number, mine, bodies, poison):
            pieces.append((_newest(batch), good))
    if len(pieces) == 1:
        return *pieces[0], poison
    if not pieces:
        return pa.RecordBatch.from_pylist([], schema=usage_schema()), np.empty(0, np.int64), poison
    order = np.concatenate([good for _, good in pieces])
    table = pa.Table.from_batches([piece for piece, _ in pieces]).combine_chunks()
    ascending = np.argsort(order, kind="stable")
    return table.take(pa.array(ascending)).combine_chunks().to_batches()[0], order[ascending], poison


def _bisect(
    schema_id: int, rows: Rows, bodies: list[bytes], poison: dict[int, tuple[str, str]]
) -> list[tuple[pa.RecordBatch, Rows]]:
    """Decodable stretches of `bodies`; single records that do not decode go into `poison`."""
    try:
        return [(decode_id(schema_id, bodies), rows)]
    except DECODE_FAILURES as error:
        if len(rows) == 1:
            poison[int(rows[0])] = ("invalid_utf8" if _is_utf8_fault(error) else "undecodable", str(error)[:200])
            return []
    middle = len(rows) // 2
    return [
        *_bisect(schema_id, rows[:middle], bodies[:middle], poison),
        *_bisect(schema_id, rows[middle:], bodies[middle:], poison),
    ]


def _is_utf8_fault(error: BaseException) -> bool:
    return "utf8" in str(error).lower() or "utf-8" in str(error).lower()


def _newest(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the newest schema's columns: those it was written without are null."""
    schema = usage_schema()
    if batch.schema.equals(schema):
        return batch
    columns = [
        batch.column(item.name) if item.name in batch.schema.names else pa.nulls(len(batch), item.type)
        for item in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
