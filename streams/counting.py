"""A batch → sums by scope, meter and window: the columnar half of counting, without any state of its own.

Usage is grouped by the finest window first; coarser ones are folded up from the groups.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tollway.schemas.command import SCOPE_KINDS
from tollway.schemas.usage import COUNTED_STATUSES, PRINCIPAL_KINDS
from tollway.streams.batch import Batch
from tollway.streams.columns import Ints, Quantities, encoded, factorized
from tollway.streams.policy import KIND_CODES, Plan
from tollway.streams.windows import AHEAD_S, oldest_start_s, starts_s

Mask = npt.NDArray[np.bool_]

_STATUSES = pa.array(COUNTED_STATUSES)
_COLUMNS = ["account", "principal_kind", "principal", "agent", "session", "run", "quantities"]
_OWN = {"agent": "agent", "sess": "session", "run": "run"}
_PRINCIPAL_CODES = np.array([KIND_CODES[kind] for kind in ("user", "client", "anon")], np.int64)


@dataclass
class Counted:
    """The rows of a batch that count, and their quantities in meters that are declared. r rows, q quantities."""

    accounts: list[str]
    account: Ints
    """[r] index into `accounts`."""
    at_s: Ints
    """[r] time whose windows count."""
    meters: list[str]
    meter: Ints
    """[q] index into `meters`."""
    row: Ints
    """[q] row of each quantity, ascending."""
    units: Ints
    """[q]"""
    columns: pa.RecordBatch


@dataclass
class Sums:
    """Units of different (key, window start) pairs. `row` is the first row in the log that had the pair."""

    key: Ints
    start: Ints
    units: Ints
    row: Ints


@dataclass
class Family:
    """Scope kinds that exclude each other: every row has at most one scope of it."""

    kind: Ints
    """[r] scope kind code, or -1 where the row has none."""
    code: Ints
    """[r] number of the row's scope within this batch."""
    scopes: Callable[[Ints], list[str]]
    """Rows → their scopes."""


def counted(batch: Batch, declared: Mapping[str, object]) -> Counted | None:
    """What of a batch counts: accepted, `ok` or `error`, in declared meters. None where nothing does."""
    usage = batch.usage
    rows = batch.accepted & pc.is_in(usage.column("status"), value_set=_STATUSES).to_numpy(zero_copy_only=False)
    at_s = batch.window_us // 1_000_000
    columns = usage.select(_COLUMNS)
    if not rows.all():
        columns, at_s = columns.filter(pa.array(rows)), at_s[rows]
    if not columns.num_rows:
        return None
    whole = columns.num_rows == usage.num_rows
    found = batch.quantities if whole else Quantities.of(columns.column("quantities"))
    meter, row, units = found.meter, found.row, found.units
    known = np.array([name in declared for name in found.meters], np.bool_)
    if not known.all():
        kept = known[meter]
        meter, row, units = meter[kept], row[kept], units[kept]
    account, accounts = batch.accounts if whole else encoded(columns.column("account"))
    return Counted(accounts, account, at_s, found.meters, meter, row, units, columns)


def families(usage: Counted, plans: list[Plan]) -> Iterator[tuple[tuple[int, ...], Family]]:
    """(kind codes, family) of every family that some plan counts, in a fixed order."""
    wanted = {SCOPE_KINDS[kind] for plan in plans for _, pairs in plan.shapes for kind, _ in pairs}
    r = usage.columns.num_rows
    if "acct" in wanted:
        yield (
            (KIND_CODES["acct"],),
            Family(np.full(r, KIND_CODES["acct"]), usage.account, lambda rows: ["acct"] * len(rows)),
        )
    if wanted & {"user", "client", "anon"}:
        yield tuple(_PRINCIPAL_CODES.tolist()), _principals(usage)
    for name, column in _OWN.items():
        if name in wanted and usage.columns.column(column).null_count < r:
            yield (KIND_CODES[name],), _own(usage, name, column)


def _principals(usage: Counted) -> Family:
    kinds, kind_names = encoded(usage.columns.column("principal_kind"))
    kind = _PRINCIPAL_CODES[np.array([PRINCIPAL_KINDS.index(name) for name in kind_names], np.int64)][kinds]
    principal, names = encoded(usage.columns.column("principal"))
    code, _ = factorized((usage.account * len(names) + principal) * len(SCOPE_KINDS) + kind)

    def scopes(rows: Ints) -> list[str]:
        pairs = zip(kind[rows].tolist(), principal[rows].tolist(), strict=True)
        return [f"{SCOPE_KINDS[kind_code]}:{names[place]}" for kind_code, place in pairs]

    return Family(kind, code, scopes)


def _own(usage: Counted, name: str, column: str) -> Family:
    own, names = encoded(usage.columns.column(column))
    code, _ = factorized(usage.account * (len(names) + 1) + own)
    kind = np.where(own < 0, -1, KIND_CODES[name])
    return Family(kind, code, lambda rows: [f"{name}:{names[place]}" for place in own[rows].tolist()])


def allowed(usage: Counted, plans: list[Plan]) -> dict[tuple[str, ...], Mask]:
    """Windows → [plans, scope kinds, meters of the batch] whether it is counted in just these windows."""
    place = {meter: code for code, meter in enumerate(usage.meters)}
    shapes: dict[tuple[str, ...], Mask] = {}
    for number, plan in enumerate(plans):
        for windows, pairs in plan.shapes:
            mask = shapes.get(windows)
            if mask is None:
                mask = shapes[windows] = np.zeros((len(plans), len(SCOPE_KINDS), len(usage.meters)), np.bool_)
            for kind, meter in pairs:
                if meter in place:
                    mask[number, kind, place[meter]] = True
    return shapes


def hits(usage: Counted, plan: Ints, mask: Mask, kinds: tuple[int, ...], family: Family) -> Ints:
    """Quantities that one family counts in one shape; `plan` is [r] each row's plan."""
    slab = mask[:, kinds, :]
    if not slab.any():
        return np.empty(0, np.int64)
    here = np.arange(len(usage.row))
    if family.kind.min() < 0:
        here = here[family.kind[usage.row] >= 0]
    if slab.all():
        return here
    row = usage.row[here]
    _, n_kinds, n_meters = mask.shape
    place = (plan[row] * n_kinds + family.kind[row]) * n_meters + usage.meter[here]
    found: Ints = here[mask.ravel()[place]]
    return found


def in_time(usage: Counted, items: Ints, windows: tuple[str, ...], step_time_s: int) -> tuple[Ints, int, int]:
    """(items whose coarsest window is still counted, late ones, ones ahead); late = not counted in the finest window."""
    first, last = int(usage.at_s.min()), int(usage.at_s.max())
    finest, coarsest = (oldest_start_s(window, step_time_s) for window in (windows[0], windows[-1]))
    ahead_s = step_time_s + AHEAD_S
    if first >= finest and last < ahead_s:
        return items, 0, 0
    at = usage.at_s[usage.row[items]]
    late, ahead = int(np.count_nonzero(at < finest)), int(np.count_nonzero(at >= ahead_s))
    return items[(at >= coarsest) & (at < ahead_s)], late, ahead


def summed(key: Ints, start: Ints, units: Ints, row: Ints) -> Sums:
    """Units of equal (key, start) pairs added up."""
    if start.min() == start.max():
        codes, pairs = factorized(key)
        starts = np.full(len(pairs), start[0])
    else:
        place, different = factorized(start)
        codes, pairs = factorized(key * len(different) + place)
        pairs, starts = pairs // len(different), different[pairs % len(different)]
    total = np.zeros(len(pairs), np.int64)
    np.add.at(total, codes, units)  # exact: sums of a batch stay inside int64 (batch.RECORDS_MAX)
    first = np.full(len(pairs), np.iinfo(np.int64).max)
    np.minimum.at(first, codes, row)
    return Sums(pairs, starts, total, first)


def coarser(sums: Sums, window: str) -> Sums:
    """The sums of a coarser window, from those of a finer one."""
    start = starts_s(window, sums.start)
    if sums.start.min() == sums.start.max():
        return Sums(sums.key, start, sums.units, sums.row)
    return summed(sums.key, start, sums.units, sums.row)


def by_start(sums: Sums, oldest_s: int) -> Iterator[tuple[int, Sums]]:
    """(window start, its sums), windows that are no longer counted left out."""
    if not len(sums.key):
        return
    first, last = int(sums.start.min()), int(sums.start.max())
    if first == last:
        if first >= oldest_s:
            yield first, sums
        return
    order = np.argsort(sums.start, kind="stable")
    edges = np.flatnonzero(np.diff(sums.start[order])) + 1
    for part in np.split(order, edges):
        start = int(sums.start[part[0]])
        if start >= oldest_s:
            yield start, Sums(sums.key[part], sums.start[part], sums.units[part], sums.row[part])
