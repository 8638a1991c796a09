"""Totals on their way to Redis: taken from the state as they stand, and packed into the parts of one `apply` each."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import msgpack
import numpy as np
import numpy.typing as npt

from tollway.schemas.lane import LANES
from tollway.streams.policy import KIND_CODES
from tollway.streams.totals import METER_BITS, METER_MASK, Ints, Scopes, Table
from tollway.streams.windows import IDLE_KEEP_S, SHOWN_S

ENDING_KINDS = (KIND_CODES["sess"], KIND_CODES["run"])
"""Scopes whose life total ends: 35 days after the last usage."""
WEIGHT_MAX = 1_000
END_WEIGHT, CLOSE_WEIGHT = 1, 20
"""A call carries totals + ends + 20 × closes ≤ 1,000: about a millisecond of Redis."""

Lanes = npt.NDArray[np.bool_]


@dataclass
class Lot:
    """Totals of one lane as they stood at one offset, those of a scope together: columns of equal length."""

    scopes: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Second at which a field's window ends, where Redis has to be told; 0 elsewhere."""
    pieces: list[tuple[Table, Ints]] = field(default_factory=list)
    """Where they came from: tables and keys."""

    def __len__(self) -> int:
        return len(self.scopes)

    def acknowledged(self) -> None:
        """Redis has these fields and knows when they end."""
        for table, keys in self.pieces:
            slots = table.slots(keys)
            table.known[slots[slots >= 0]] = True

    def give_back(self) -> None:
        """They were not written: dirty again."""
        for table, keys in self.pieces:
            slots = table.slots(keys)
            table.touch(slots[slots >= 0])


@dataclass(frozen=True)
class Part:
    """One call's worth. `body` is msgpack of [totals, ends, policies, closes] (connectors/lua/apply.lua)."""

    body: bytes
    weight: int


def taken(
    tables: Iterable[Table],
    scopes: Scopes,
    meters: list[str],
    lanes: Collection[int],
    log_time_ms: int,
    everything: bool,
    ends: Collection[int],
) -> dict[int, Lot]:
    """Lane → its dirty totals (`everything`: all there are), from now on clean. Lanes without any are left out.

    `ends`: lanes whose totals carry their window's end whether or not it is known. What Redis no longer shows is left out:
    a total that came after its field was swept would stay for ever (gate-held V1).
    """
    wanted, told = _mask(lanes), _mask(ends)
    pieces: list[tuple[Table, Ints]] = []
    for table in tables:
        slots = _slots(table, scopes, wanted, everything)
        if len(slots) and (table.end is None or (table.end + SHOWN_S) * 1000 > log_time_ms):
            pieces.append((table, slots))
    return _lots(pieces, scopes, meters, told) if pieces else {}


def _mask(lanes: Collection[int]) -> Lanes:
    mask = np.zeros(LANES, np.bool_)
    mask[list(lanes)] = True
    return mask


def _slots(table: Table, scopes: Scopes, wanted: Lanes, everything: bool) -> Ints:
    """Slots of the wanted lanes, now clean."""
    if everything:
        slots: Ints = np.flatnonzero(wanted[scopes.lanes[table.keys[: table.n] >> METER_BITS]])
        table.dirty[slots] = False
        table.retouch()
        return slots
    if not table.touched:
        return np.empty(0, np.int64)
    slots = np.concatenate(table.touched)
    mine = wanted[scopes.lanes[table.keys[slots] >> METER_BITS]]
    table.touched = [] if mine.all() else [slots[~mine]]
    slots = slots[mine]
    table.dirty[slots] = False
    return slots


def _lots(pieces: list[tuple[Table, Ints]], scopes: Scopes, meters: list[str], told: Lanes) -> dict[int, Lot]:
    place = np.repeat(np.arange(len(pieces)), [len(slots) for _, slots in pieces])
    key = np.concatenate([table.keys[slots] for table, slots in pieces])
    value = np.concatenate([table.totals[slots] for table, slots in pieces])
    end = np.concatenate([_ends(table, slots, scopes, told) for table, slots in pieces])
    scope = key >> METER_BITS
    lane = scopes.lanes[scope]
    order = np.lexsort((scope, lane))
    place, key, lane = place[order], key[order], lane[order]
    labels = [table.labels(meters) for table, _ in pieces]
    names = [scopes.names[number] for number in scope[order].tolist()]
    fields = [labels[at][meter] for at, meter in zip(place.tolist(), (key & METER_MASK).tolist(), strict=True)]
    values, ends = list(map(str, value[order].tolist())), end[order].tolist()
    edges = [0, *(np.flatnonzero(np.diff(lane)) + 1).tolist(), len(key)]
    lots: dict[int, Lot] = {}
    for a, b in pairwise(edges):
        mine = place[a:b]
        tables = [(pieces[at][0], key[a:b][mine == at]) for at in np.unique(mine).tolist()]
        lots[int(lane[a])] = Lot(names[a:b], fields[a:b], values[a:b], ends[a:b], tables)
    return lots


def _ends(table: Table, slots: Ints, scopes: Scopes, told: Lanes) -> Ints:
    """Window end of each slot where Redis must be told, else 0. A run's or session's life ends later at each use."""
    scope = table.keys[slots] >> METER_BITS
    if table.end is None:
        return np.where(np.isin(scopes.kinds[scope], ENDING_KINDS), table.last[slots] + IDLE_KEEP_S, 0)
    return np.where(table.known[slots] & ~told[scopes.lanes[scope]], 0, table.end)


def parts(lot: Lot, policies: list[list[str]], closes: list[str]) -> Iterator[Part]:
    """A batch as calls of at most WEIGHT_MAX: policies, then totals, then closes, which never travel before a total.

    `policies`: [account, field, value …] each, never divided. An empty batch is one empty call: log time moves on.
    """
    count = 0
    for together, weight in _policy_calls(policies):
        count += 1
        yield Part(msgpack.packb([[], [], together, []]), weight)
    stretches = _stretches(lot.ends)
    for start, stop, weight in stretches[:-1]:
        count += 1
        yield Part(_packed(lot, start, stop, []), weight)
    start, stop, weight = stretches[-1]
    first = min(len(closes), (WEIGHT_MAX - weight) // CLOSE_WEIGHT)
    if stop > start or first or not count:
        yield Part(_packed(lot, start, stop, closes[:first]), weight + first * CLOSE_WEIGHT)
    a_call = WEIGHT_MAX // CLOSE_WEIGHT
    for at in range(first, len(closes), a_call):
        some = closes[at : at + a_call]
        yield Part(msgpack.packb([[], [], [], some]), len(some) * CLOSE_WEIGHT)


def _stretches(ends: list[int]) -> list[tuple[int, int, int]]:
    """(start, stop, weight) of what fits one call each; at least one stretch, perhaps an empty one."""
    found: list[tuple[int, int, int]] = []
    start = weight = 0
    for at, end in enumerate(ends):
        more = 1 + (END_WEIGHT if end else 0)
        if weight + more > WEIGHT_MAX:
            found.append((start, at, weight))
            start, weight = at, 0
        weight += more
    return [*found, (start, len(ends), weight)]


def _policy_calls(policies: list[list[str]]) -> Iterator[tuple[list[list[str]], int]]:
    some: list[list[str]] = []
    weight = 0
    for policy in policies:
        if some and weight + len(policy) // 2 > WEIGHT_MAX:
            yield some, weight
            some, weight = [], 0
        some.append(policy)
        weight += len(policy) // 2
    if some:
        yield some, weight


def _packed(lot: Lot, start: int, stop: int, closes: list[str]) -> bytes:
    """totals: [scope, field, value …] each; ends: end, member of `fx` …"""
    totals: list[list[str]] = []
    ends: list[int | str] = []
    current: list[str] = []
    here = None
    columns = (lot.scopes, lot.fields, lot.values, lot.ends)
    for scope, name, value, end in zip(*(column[start:stop] for column in columns), strict=True):
        if scope != here:
            here, current = scope, [scope]
            totals.append(current)
        current += (name, value)
        if end:
            ends += (end, f"{scope} {name[:-2]}")
    return msgpack.packb([totals, ends, [], closes])  # type: ignore[no-any-return]
