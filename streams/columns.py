"""Columns of decoded usage as numbers: texts by code, quantities by row. Made once a batch, read by several parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]

HASH_FROM = 128
"""Shorter arrays are factorized by a dict: Arrow's hashing has the dearer start."""


def encoded(column: pa.Array) -> tuple[Ints, list[str]]:
    """(code of each text, distinct texts in order of first appearance); -1 for null."""
    found = column.dictionary_encode()
    codes = found.indices.fill_null(-1) if found.indices.null_count else found.indices
    return codes.to_numpy().astype(np.int64), found.dictionary.to_pylist()


def ends_of(column: Any) -> npt.NDArray[np.int32]:
    """Value offsets of a text, list or map column, [len + 1], absolute."""
    return np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)


def text_of(column: pa.Array, ends: npt.NDArray[np.int32]) -> bytes:
    """All texts of a column, one behind the other. `ends`: its offsets."""
    first, last = int(ends[0]), int(ends[-1])
    data: bytes = column.buffers()[2].slice(first, last - first).to_pybytes() if last > first else b""
    return data


def same_texts(column: pa.Array, texts: Sequence[bytes | None]) -> bool:
    """Whether `texts` are just those of a text column without nulls, in order."""
    if column.null_count:
        return False
    ends = ends_of(column)
    try:
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))  # type: ignore[arg-type]
        together = b"".join(texts)  # type: ignore[arg-type]
    except TypeError:  # one of them is null
        return False
    return np.array_equal(lengths, ends[1:] - ends[:-1]) and together == text_of(column, ends)


def factorized(values: Ints) -> tuple[Ints, Ints]:
    """(code of each value, distinct values)."""
    if len(values) < HASH_FROM:
        seen: dict[int, int] = {}
        few = [seen.setdefault(value, len(seen)) for value in values.tolist()]
        return np.array(few, np.int64), np.fromiter(seen, np.int64, len(seen))
    hashed = pa.array(values).dictionary_encode()
    distinct = hashed.dictionary.to_numpy()
    return hashed.indices.to_numpy().astype(np.int64), distinct


@dataclass(frozen=True)
class Quantities:
    """The quantities of m usage rows: q times (row, meter, units), in log order."""

    counts: Ints
    """[m] quantities of each row."""
    row: Ints
    """[q] ascending"""
    meters: list[str]
    meter: Ints
    """[q] index into `meters`."""
    units: Ints
    """[q]"""

    @classmethod
    def of(cls, column: pa.MapArray) -> "Quantities":
        """Of a `quantities` column, which may be a slice."""
        ends = column.offsets.to_numpy()
        here = slice(int(ends[0]), int(ends[-1]))
        meter, meters = encoded(column.keys[here])
        counts = np.diff(ends).astype(np.int64)
        return cls(counts, np.repeat(np.arange(len(column)), counts), meters, meter, column.items[here].to_numpy())
