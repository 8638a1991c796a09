"""Two tables of the same columns, row against row by offset: what is missing, double or different, column by column."""

from typing import Any

import numpy as np
import pyarrow as pa

NAMED_MAX = 10
"""Most offsets named for one difference."""

MISSING, FOREIGN, DOUBLE = "missing", "foreign", "double"


def differences(expected: pa.Table, actual: pa.Table) -> dict[str, list[int]]:
    """{} where `actual` is `expected`; else `missing`, `foreign`, `double` or a column's name → offsets, at most NAMED_MAX.

    Both are sorted by kafka_offset; `expected` has each offset once. Texts compare as bytes.
    """
    due, there = expected["kafka_offset"].to_numpy(), actual["kafka_offset"].to_numpy()
    found = {
        MISSING: np.setdiff1d(due, there),
        FOREIGN: np.setdiff1d(there, due),
        DOUBLE: np.unique(there[1:][there[1:] == there[:-1]]),
    }
    if any(len(offsets) for offsets in found.values()):
        common, in_due, in_there = np.intersect1d(due, there, return_indices=True)
        expected, actual, due = expected.take(in_due), actual.take(in_there), common
    for name in expected.column_names:
        ours, theirs = plain(expected[name]), plain(actual[name])
        if not ours.equals(theirs):
            found[name] = _unequal(due, ours, theirs)
    return {name: offsets[:NAMED_MAX].tolist() for name, offsets in found.items() if len(offsets)}


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the one type that both sides are compared in: no dictionaries, texts as bytes, times as numbers."""
    kind = _plain_type(column.type)
    return column if column.type == kind else column.cast(kind)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_timestamp(kind):
        return pa.int64()
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _unequal(offsets: Any, ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> Any:
    pairs = zip(ours.to_pylist(), theirs.to_pylist(), strict=True)
    return offsets[np.array([one != other for one, other in pairs], np.bool_)]
