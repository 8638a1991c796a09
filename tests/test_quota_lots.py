"""Totals on their way to Redis: taken once, told when they end, packed into calls of bounded weight."""

from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import NOW_S, batch, counts, directory, folded, usage
from tollway.schemas.lane import lane
from tollway.streams.quota import Quota
from tollway.streams.quota_lots import CLOSE_WEIGHT, WEIGHT_MAX, Lot, parts

HOUR, DAY = 3_600, 86_400
ALL = range(256)


def shown(lots: dict[int, Lot]) -> dict[tuple[str, str], tuple[str, int]]:
    return {
        (scope, name): (value, end)
        for lot in lots.values()
        for scope, name, value, end in zip(lot.scopes, lot.fields, lot.values, lot.ends, strict=True)
    }


def take(quota: Quota, now_s: int = NOW_S, *, everything: bool = False, ends: Any = ()) -> dict[int, Lot]:
    return quota.take(ALL, log_time_ms=now_s * 1000, everything=everything, ends=ends)


def test_a_total_is_taken_once_and_comes_back_when_it_was_not_written() -> None:
    """What was taken is clean; what was given back is dirty again, with its newest value."""
    found = directory({"acme": counts(("calls", "h", "acct"))})
    quota = folded(found, batch([usage()]))
    lots = take(quota)
    assert shown(lots) == {("acme~acct", f"calls h:{NOW_S} u"): ("1", NOW_S + HOUR)}
    assert take(quota) == {}
    assert int(quota.dirty().sum()) == 0
    for lot in lots.values():
        lot.give_back()
    assert int(quota.dirty().sum()) == 1
    quota.fold(found, batch([usage()]))
    assert int(quota.dirty().sum()) == 1
    assert shown(take(quota)) == {("acme~acct", f"calls h:{NOW_S} u"): ("2", NOW_S + HOUR)}


def test_the_windows_end_travels_until_redis_has_acknowledged_it() -> None:
    """A field's end goes with it until a complete write was acknowledged, and again where the fold is not sure."""
    found = directory({"acme": counts(("calls", "h", "acct"))})
    quota = folded(found, batch([usage()]))
    field = ("acme~acct", f"calls h:{NOW_S} u")
    for lot in take(quota).values():
        lot.acknowledged()
    quota.fold(found, batch([usage()]))
    assert shown(take(quota))[field] == ("2", 0)
    quota.fold(found, batch([usage()]))
    assert shown(take(quota, ends=ALL))[field] == ("3", NOW_S + HOUR)
    again = Quota.load(quota.dump())
    assert take(again) == {}
    assert shown(take(again, everything=True))[field] == ("3", NOW_S + HOUR)


def test_a_runs_life_total_carries_a_later_end_at_each_use() -> None:
    """Redis may drop a run's life total 35 days after its last usage, so every write of it says when that is."""
    found = directory({"acme": counts(("calls", "L", ["acct", "run"]))})
    quota = folded(found, batch([usage(run="r1")]))
    for lot in take(quota).values():
        lot.acknowledged()
    at = NOW_S + DAY
    quota.on_step(at)
    quota.fold(found, batch([usage(run="r1", at_s=at)], append_s=at))
    assert shown(take(quota)) == {
        ("acme~acct", "calls L:0 u"): ("2", 0),
        ("acme~run:r1", "calls L:0 u"): ("2", at + 35 * DAY),
    }


def test_what_redis_no_longer_shows_is_not_sent() -> None:
    """A dirty total whose window ended a day before the batch's log time is left out: after a sweep it would stay for ever."""
    found = directory({"acme": counts(("calls", "h", "acct"))})
    quota = folded(found, batch([usage()]))
    assert len(take(quota, NOW_S + HOUR + DAY - 1, everything=True)) == 1
    quota.fold(found, batch([usage()]))
    assert take(quota, NOW_S + HOUR + DAY) == {}


def test_lanes_that_are_not_asked_for_stay_dirty() -> None:
    """Taking one lane's totals leaves the other lanes' where they are."""
    quota = folded(directory({"acme": None, "b": None}), batch([usage(), usage("b")]))
    one = quota.take([lane("b")], log_time_ms=NOW_S * 1000, everything=False, ends=())
    assert set(one) == {lane("b")}
    assert set(take(quota)) == {lane("acme")}


@settings(deadline=None)
@given(st.integers(0, 3_500), st.integers(0, 120), st.lists(st.integers(1, 400), max_size=12))
def test_parts_keep_to_the_bound_and_closes_come_last(totals: int, closes: int, limits: list[int]) -> None:
    """Every call weighs at most 1,000 (totals + 20 × closes), nothing is lost, and no close travels before a total."""
    lot = Lot(
        [f"a~user:u{n // 7}" for n in range(totals)],
        [f"calls h:{n} u" for n in range(totals)],
        [str(n) for n in range(totals)],
        [n % 3 for n in range(totals)],
    )
    policies = [[f"acct{n}", *["f", "v"] * size] for n, size in enumerate(limits)]
    names = [f"hold{n}" for n in range(closes)]
    calls = list(parts(lot, policies, names))
    bodies = [msgpack.unpackb(call.body) for call in calls]
    assert calls
    assert all(call.weight <= WEIGHT_MAX for call in calls)
    sent: dict[tuple[str, str], str] = {}
    told: dict[str, int] = {}
    for totals_sent, ends, _, _ in bodies:
        for scope, *rest in totals_sent:
            sent |= {(scope, name): value for name, value in zip(rest[::2], rest[1::2], strict=True)}
        told |= dict(zip(ends[1::2], ends[::2], strict=True))
    columns = list(zip(lot.scopes, lot.fields, lot.values, lot.ends, strict=True))
    assert sent == {(scope, name): value for scope, name, value, _ in columns}
    assert told == {f"{scope} {name[:-2]}": end for scope, name, _, end in columns if end}
    for totals_sent, ends, _, ended in bodies:
        carried = sum(len(run) // 2 for run in totals_sent) + len(ends) // 2 + len(ended) * CLOSE_WEIGHT
        assert carried <= WEIGHT_MAX
    assert [policy for body in bodies for policy in body[2]] == policies
    assert [name for body in bodies for name in body[3]] == names
    with_totals = [number for number, body in enumerate(bodies) if body[0]]
    with_closes = [number for number, body in enumerate(bodies) if body[3]]
    assert not with_totals or not with_closes or max(with_totals) <= min(with_closes)
