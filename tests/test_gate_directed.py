"""Faults of the gate contract that random worlds seldom reach, led there by hand: with the fault it goes wrong, without it not."""

from typing import Any

import pytest

from tests.simulation.gate_fold import ACCOUNT, EPOCH, Fold
from tests.simulation.gate_model import Lane, Policy
from tests.simulation.gate_mutants import DIRECTED
from tests.simulation.gate_world import World

NOW_US = 1_767_311_700_000_000
GRACE_MS = 900_000
FIELD = (f"{ACCOUNT}~acct", "calls L:0")
WITH_AND_WITHOUT = pytest.mark.parametrize("planted", [False, True], ids=["right", "planted"])


def lane_of(bug: str, planted: bool) -> Lane:
    """A READY lane at offset 5 with a limit of ten calls; one used."""
    assert bug in DIRECTED
    lane = Lane(frozenset([bug] if planted else []))
    lane.begin(EPOCH, 5, NOW_US)
    fill(lane)
    assert lane.m is not None
    lane.end(EPOCH, lane.m.gen, 5)
    return lane


def fill(lane: Lane, off: int = 5) -> None:
    policy = {ACCOUNT: Policy(1, {"acct|calls|L": 10})}
    assert lane.apply(EPOCH, off, "t", 0, False, None, NOW_US // 1000, [(*FIELD, 1)], {}, policy, [])[0] == "OK"


def authorize(lane: Lane, number: int, gen: int | None, floor: int) -> tuple[Any, ...]:
    asked = (("calls", 2, 2),)
    told = (ACCOUNT, ("acct",), f"c{number}", "f", f"h{number}", asked, 60_000, GRACE_MS, "g1", gen, floor)
    return lane.authorize(NOW_US, *told)


def reassert(lane: Lane, number: int, units: int) -> tuple[Any, ...]:
    exp = NOW_US // 1000 + 60_000
    fields = [(*FIELD, units)]
    return lane.reassert(NOW_US, f"h{number}", ACCOUNT, f"c{number}", "H", exp, GRACE_MS, "", 0, "g1", fields)


@WITH_AND_WITHOUT
def test_an_older_copy_of_a_rewrite_never_becomes_ready(planted: bool) -> None:
    """A rewrite that keeps the offset it found goes READY on a copy from before its totals."""
    lane = lane_of("begin_keeps_off", planted)
    lane.s = {}
    gen = lane.begin(EPOCH, 5, NOW_US + 1)[3]
    older = lane.copy()
    fill(lane)
    ready = older.end(EPOCH, gen, 5)[0] == "OK"
    assert ready == planted
    assert older.used(*FIELD) is None


@WITH_AND_WITHOUT
def test_a_loss_inside_a_rewrite_ends_that_rewrite(planted: bool) -> None:
    """A gate that misses a write while the lane is COLD raises the generation: else the rewrite goes READY without its hold."""
    lane = lane_of("no_new_gen", planted)
    for number in (1, 2):
        authorize(lane, number, lane.m.gen if lane.m else None, number - 1)
    gen = lane.begin(EPOCH, 5, NOW_US + 1)[3]
    del lane.h["h2"]
    older = lane.copy()
    older.g["g1"] -= 1
    fill(older)
    older.capture(NOW_US, "h1", {"calls": 1}, "s", 1, "g1", gen, 2)
    ready = older.end(EPOCH, gen, 5)[0] == "OK"
    assert ready == planted
    assert "h2" not in older.h


@WITH_AND_WITHOUT
def test_a_reassert_that_raised_a_hold_is_a_write(planted: bool) -> None:
    """A copy from before the raise is noticed by the next ask, because the raise was counted (gate-held V3)."""
    lane = lane_of("reassert_uncounted", planted)
    assert lane.m is not None
    count = authorize(lane, 1, None, 0)[3]
    older = lane.copy()
    raised = reassert(lane, 1, 6)
    assert (raised[0], lane.held(*FIELD)) == ("OK", 6)
    assert raised[3] == count + (not planted)
    taken = authorize(older, 2, older.m.gen if older.m else None, raised[3])[0] == "OK"
    assert taken == planted  # on a copy that holds 2 where the gate was told 6


@WITH_AND_WITHOUT
def test_a_batch_without_expect_tells_every_end(planted: bool) -> None:
    """A fold that does not know what Redis has cannot know that it has a field's end (gate-held V2)."""
    bugs = frozenset([DIRECTED[3]] if planted else [])
    day = (f"{ACCOUNT}~acct", "calls d:1767225600")
    fold = Fold("f", bugs, pos=9, log_ms=NOW_US // 1000, totals={day: 3}, ends={day: 1_767_312_000})
    fold.phase, fold.dirty, fold.known = "live", {day}, {day}
    flight = fold._build(World(0))
    assert flight is not None
    assert (flight.parts[0][1] == {}) == planted
