"""A partition's state, cut for one of the partitions that it becomes: the lanes that go there, nothing else. Pure.

Counts are powers of two, so each new partition has one parent: `number mod parents`. What concerns all accounts goes to every
child; what only counts (refusals, duplicates) goes to the one with the parent's number, so that no sum doubles.
"""

from collections.abc import Callable
from typing import Any

import msgpack

from tollway.schemas.lane import lane
from tollway.streams.billing import Billing
from tollway.streams.quota import Quota
from tollway.streams.state import PartitionState
from tollway.streams.totals import METER_BITS, Table, packed, unpacked

Keep = Callable[[str], bool]
"""Whether an account's lane goes to the child."""


def child_dump(
    dump: dict[str, Any], group: str, number: int, parents: int, partitions: int, fresh: dict[str, Any]
) -> dict[str, Any]:
    """Dump of the child `number` of `partitions`, at the first offset of its own log.

    `dump`: of its parent, one of `parents`, at the end of the old log. `fresh`: of a state that has folded nothing, whose parts
    are kept where they are a log's own (the chain of group audit).
    """
    eldest = number < parents

    def keep(account: str) -> bool:
        return lane(account) % partitions == number

    directory, dedupe = dump["directory"], dump["dedupe"]
    parts = dump["parts"]
    return {
        **dump,
        "next_offset": 0,
        "directory": {**directory, "accounts": _of(directory["accounts"], keep)},
        "dedupe": _dedupe(dedupe, number, partitions, eldest),
        "refused": dump["refused"] if eldest else {},
        "undeclared": dump["undeclared"] if eldest else {},
        "parts": {"quota": _quota(parts["quota"], keep), "billing": _billing(parts["billing"], keep)}
        if group == "accounts"
        else fresh["parts"],
    }


def child_state(
    state: PartitionState, group: str, number: int, partitions: int, epoch: str, parts: dict[str, Any]
) -> PartitionState:
    """The child's state, loaded as its worker will load it."""
    fresh = PartitionState(number, partitions, epoch, parts={name: kind() for name, kind in parts.items()}).dump()
    dump = child_dump(state.dump(), group, number, state.partitions, partitions, fresh)
    packed_dump = msgpack.packb(dump, use_bin_type=True)  # nothing is shared with the parent or a sibling
    return PartitionState.load(
        number, partitions, epoch, msgpack.unpackb(packed_dump, raw=False, strict_map_key=False), parts
    )


def _of(by_account: dict[str, Any], keep: Keep) -> dict[str, Any]:
    return {account: found for account, found in by_account.items() if keep(account)}


def _dedupe(dump: dict[str, Any], number: int, partitions: int, eldest: bool) -> dict[str, Any]:
    sources = {
        source: {lane: seen for lane, seen in lanes.items() if lane % partitions == number}
        for source, lanes in dump["sources"].items()
    }
    event_ids = {name: at for name, at in dump["event_ids"].items() if at[1] % partitions == number}
    return {
        "sources": {source: lanes for source, lanes in sources.items() if lanes},
        "event_ids": event_ids,
        "duplicates": dump["duplicates"] if eldest else 0,
    }


def _quota(dump: dict[str, Any], keep: Keep) -> dict[str, Any]:
    """Scopes keep their numbers; those of other lanes are free, and so are their totals' places."""
    names = [name for segment in dump["scopes"] for name in unpacked(segment).decode().split("\n")]
    mine = [name if name and keep(name.partition("~")[0]) else "" for name in names]
    while mine and not mine[-1]:
        mine.pop()
    tables = [_table(Table.load(stored), mine) for stored in dump["tables"]]
    parts = [table.dump() for table in tables if table.n]
    segment = [packed("\n".join(mine).encode())] if mine else []
    return Quota.load({**dump, "scopes": segment, "tables": parts}).dump()  # in the segments that a worker writes


def _table(table: Table, mine: list[str]) -> Table:
    scopes = (table.keys[: table.n] >> METER_BITS).tolist()
    slots = [slot for slot, scope in enumerate(scopes) if scope < len(mine) and mine[scope]]
    found = Table(table.window, table.start)
    found.n = len(slots)
    found.keys, found.totals = table.keys[slots], table.totals[slots]
    if table.end is None:
        found.last = table.last[slots]
    return found


def _billing(dump: dict[str, Any], keep: Keep) -> dict[str, Any]:
    return Billing.load(dump).of(keep).dump()
