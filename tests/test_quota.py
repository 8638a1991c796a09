"""Counting: what is counted, where, and that the state is a function of the log alone."""

from collections import defaultdict
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.batches import METERS, NOW_S, batch, counts, directory, folded, sliced, usage
from tollway.connectors.errors import Fatal
from tollway.schemas.lane import lane
from tollway.streams.batch import Batch
from tollway.streams.directory import Directory
from tollway.streams.policy import gate_fields
from tollway.streams.quota import CLOSED, Quota
from tollway.streams.totals import SCOPES_MAX, TOTAL_MAX
from tollway.streams.windows import IDLE_KEEP_S

HOUR, DAY = 3_600, 86_400
ALL = range(256)
KEEP = {"m": 2 * HOUR, "h": 2 * DAY, "d": 3 * DAY, "M": 35 * DAY}
LENGTH = {"m": 60, "h": HOUR, "d": DAY}

POLICIES: dict[str, dict[str, Any] | None] = {
    "acme": None,
    "same": None,
    "wide": counts((METERS[:3], "mhdML", ["acct", "principal", "agent", "sess", "run"])),
    "split": counts(("calls", "m", "acct"), ("calls", "hL", "user"), ("tokens_in", "dM", ["principal", "run"])),
    "twice": counts(("calls", "mh", ["user", "principal"]), ("calls", "hd", ["principal", "acct"])),
    "none": counts(),
}


def command(kind: str, **body: Any) -> dict[str, Any]:
    return {"kind": kind, "account": "acme", "body": body}


EVENTS = st.builds(
    usage,
    account=st.sampled_from(list(POLICIES)),
    principal_kind=st.sampled_from(["user", "client", "anonymous"]),
    principal=st.sampled_from(["p1", "p2", "p3"]),
    agent=st.sampled_from([None, "a1"]),
    session=st.sampled_from([None, "s1", "s2"]),
    run=st.sampled_from([None, "r1", "r2", "r3"]),
    status=st.sampled_from(["ok", "ok", "error", "denied", "rate_limited"]),
    hold=st.sampled_from([None, None, None, "hold-1", "hold-2"]),
    at_s=st.integers(0, 40 * DAY).map(lambda age: NOW_S - age) | st.integers(NOW_S - 200, NOW_S + 90),
    quantities=st.dictionaries(
        st.sampled_from([*METERS, "undeclared"]), st.integers(0, 10**12), min_size=1, max_size=4
    ).map(lambda found: {"calls": 1, **found}),
)
HISTORIES = st.lists(EVENTS, min_size=5, max_size=40)
CUTS = st.lists(st.booleans(), min_size=39, max_size=39)


def start_of(window: str, at_s: int) -> int:
    t = datetime.fromtimestamp(at_s, UTC)
    if window == "L":
        return 0
    if window == "M":
        return int(datetime(t.year, t.month, 1, tzinfo=UTC).timestamp())
    return at_s - at_s % LENGTH[window]


def end_of(window: str, start: int) -> int:
    t = datetime.fromtimestamp(start, UTC)
    if window == "M":
        return int(datetime(t.year + t.month // 12, t.month % 12 + 1, 1, tzinfo=UTC).timestamp())
    return start + LENGTH[window]


def model(found: Directory, whole: Batch, events: list[dict[str, Any]], step_s: int) -> dict[tuple[Any, ...], int]:
    """The same totals, one record at a time in a dictionary."""
    used: dict[tuple[Any, ...], int] = defaultdict(int)
    own = {"user": "user", "client": "client", "anonymous": "anon"}
    for row, event in enumerate(events):
        if event["status"] not in ("ok", "error") or not whole.accepted[row]:
            continue
        principal = f"{own[event['principal_kind']]}:{event['principal']}"
        touched = set()
        for rule in found.accounts[event["account"]].policy["counts"]:
            for window in rule["windows"]:
                start = start_of(window, int(whole.window_us[row]) // 10**6)
                if window != "L" and end_of(window, start) + KEEP[window] <= step_s:
                    continue
                for kind in rule["scopes"]:
                    scope = {"acct": "acct", "principal": principal, own[event["principal_kind"]]: principal}.get(kind)
                    name = {"agent": "agent", "sess": "session", "run": "run"}.get(kind)
                    if name and event[name]:
                        scope = f"{kind}:{event[name]}"
                    if scope and rule["meter"] in event["quantities"]:
                        touched.add((event["account"], scope, rule["meter"], window, start))
        for total in touched:
            used[total] += event["quantities"][total[2]]
    return dict(used)


def all_totals(quota: Quota) -> dict[tuple[Any, ...], int]:
    return {(account, *key): units for account in POLICIES for key, units in quota.totals(account).items()}


@settings(deadline=None)
@given(HISTORIES, st.data())
def test_totals_are_those_of_a_dictionary(events: list[dict[str, Any]], data: st.DataObject) -> None:
    """Columnar counting gives what one dictionary counts record by record, for every policy, scope, meter and window."""
    accepted = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    found, whole = directory(POLICIES), batch(events, accepted=accepted)
    assert all_totals(folded(found, whole)) == model(found, whole, events, NOW_S)


@settings(deadline=None)
@given(HISTORIES, CUTS)
@example(
    [usage(quantities={"calls": 1, "tokens_out": 1}), usage("wide", quantities={"tokens_in": 1, "tokens_out": 1})],
    [True],
)
@example(
    [usage(at_s=NOW_S + at, principal=name) for at, name in ((0, "a"), (0, "b"), (60, "b"), (60, "a"))],
    [False, False, True],
)
def test_cuts_do_not_show(events: list[dict[str, Any]], cuts: list[bool]) -> None:
    """However a log is cut into batches, the dumped state has the same bytes: numbering follows the log, not the batch."""
    found, whole = directory(POLICIES), batch(events)
    edges = [0, *(at for at, cut in enumerate(cuts[: len(events) - 1], 1) if cut), len(events)]
    pieces = [sliced(whole, a, b) for a, b in pairwise(edges)]
    once, in_pieces = folded(found, whole), folded(found, *pieces)
    assert msgpack.packb(in_pieces.dump()) == msgpack.packb(once.dump())
    assert in_pieces.closes == once.closes


@settings(deadline=None)
@given(HISTORIES, st.integers(0, 40), st.sampled_from([0, 4 * HOUR, 4 * DAY, 40 * DAY, 100 * DAY]))
def test_a_restart_does_not_show(events: list[dict[str, Any]], at: int, later_s: int) -> None:
    """A state that was dumped and loaded in the middle goes on to the same bytes, evictions and reused numbers included."""
    found, whole = directory(POLICIES), batch(events)
    later = batch(
        [event | {"occurred_at": event["occurred_at"] + later_s * 10**6} for event in events[::-1]],
        append_s=NOW_S + later_s,
    )
    at = min(at, len(events))
    straight = folded(found, whole)
    straight.on_step(NOW_S + later_s)
    straight.fold(found, later)
    broken = Quota.load(msgpack.unpackb(msgpack.packb(folded(found, sliced(whole, 0, at)).dump())))
    broken.fold(found, sliced(whole, at, len(events)))
    broken.on_step(NOW_S + later_s)
    broken = Quota.load(msgpack.unpackb(msgpack.packb(broken.dump())))
    broken.fold(found, later)
    assert msgpack.packb(broken.dump()) == msgpack.packb(straight.dump())


def test_a_state_of_another_format_is_refused() -> None:
    """A checkpoint in a format that this worker does not read stops it: guessing would miscount."""
    with pytest.raises(Fatal, match="format 99"):
        Quota.load({**Quota().dump(), "format": 99})


def test_only_counted_statuses_and_declared_meters_count() -> None:
    """`ok` and `error` count; refusals and meters that nobody declared do not."""
    found = directory({"acme": counts((["calls", "undeclared"], "h", "acct"))})
    statuses = ["ok", "error", "denied", "rate_limited", "payment_required"]
    quota = folded(
        found, batch([usage(status=status, quantities={"calls": 1, "undeclared": 5}) for status in statuses])
    )
    assert quota.totals("acme") == {("acct", "calls", "h", NOW_S): 2}


def test_a_held_call_counts_in_the_windows_of_its_own_time() -> None:
    """Usage with a hold counts where the gate took the hold, however late; without one at most an hour back."""
    found = directory({"acme": counts(("calls", "h", "acct"))})
    late = NOW_S - 30 * HOUR
    quota = folded(found, batch([usage(at_s=late, hold="h1"), usage(at_s=late)]))
    assert quota.totals("acme") == {("acct", "calls", "h", late): 1, ("acct", "calls", "h", NOW_S - HOUR): 1}


@pytest.mark.parametrize(("window", "keep_s"), [("m", 2 * HOUR), ("h", 2 * DAY), ("d", 3 * DAY), ("M", 35 * DAY)])
def test_a_window_counts_until_its_keep_is_over(window: str, keep_s: int) -> None:
    """A minute is counted for 2 hours after its end, an hour 2 days, a day 3, a month 35: to the last second, no longer."""
    found = directory({"acme": counts(("calls", window, "acct"))})
    end = end_of(window, start_of(window, NOW_S))
    for step_s, counted in ((end + keep_s - 1, 1), (end + keep_s, 0)):
        quota = folded(found, batch([usage(hold="h1")], append_s=step_s), step_s=step_s)
        assert len(quota.totals("acme")) == counted


def test_usage_that_comes_too_late_for_a_window_is_left_out_and_alarmed() -> None:
    """Where a window's end plus its keep has passed, only the coarser windows count, and the alarm says how much."""
    found = directory({"acme": counts(("calls", "mhd", "acct"))})
    quota = folded(found, batch([usage(at_s=NOW_S - 3 * HOUR, hold="h1")]))
    assert {window for _, _, window, _ in quota.totals("acme")} == {"h", "d"}
    assert quota.alarms["late"] == 1


def test_usage_from_a_broken_clock_opens_no_windows() -> None:
    """A held call that claims to be more than a day ahead is not counted: every made-up window would stay for ever."""
    quota = folded(directory({"acme": None}), batch([usage(at_s=NOW_S + 400 * DAY, hold="h1")]))
    assert quota.totals("acme") == {}
    assert quota.alarms["ahead"] == 2


def test_closed_windows_go_and_their_scopes_are_numbered_again() -> None:
    """A step drops each window at end + keep, and a scope without totals gives its number to the next one."""
    found = directory({"acme": counts(("calls", "mh", "user"))})
    quota = folded(found, batch([usage(principal=f"p{n}") for n in range(5)]))
    quota.on_step(NOW_S + 60 + 2 * HOUR - 1)
    assert {window for _, _, window, _ in quota.totals("acme")} == {"m", "h"}
    quota.on_step(NOW_S + 60 + 2 * HOUR)
    assert {window for _, _, window, _ in quota.totals("acme")} == {"h"}
    quota.on_step(NOW_S + HOUR + 2 * DAY)
    assert (len(quota), quota.scopes.live, quota.scopes.ids) == (0, {}, {})
    at = NOW_S + HOUR + 2 * DAY
    quota.fold(found, batch([usage(principal="new", at_s=at)], append_s=at))
    assert quota.scopes.ids == {"acme~user:new": 0}


def test_life_totals_of_runs_end_after_35_idle_days_and_balances_stay() -> None:
    """A run's life total goes 35 days after its last usage; use keeps it; an account's life total never goes."""
    found = directory({"acme": counts(("calls", "L", ["acct", "run"]))})
    quota = folded(found, batch([usage(run="old"), usage(run="used")]))
    at = NOW_S + 20 * DAY
    quota.on_step(at)
    quota.fold(found, batch([usage(run="used", at_s=at)], append_s=at))
    quota.on_step(NOW_S + 35 * DAY - 1)
    assert len(quota.totals("acme")) == 3
    quota.on_step(NOW_S + 35 * DAY)
    assert quota.totals("acme") == {
        ("acct", "calls", "L", 0): 3,
        ("run:used", "calls", "L", 0): 2,
        ("run:old", CLOSED, "L", 0): 1,
    }
    quota.on_step(at + 36 * DAY)
    assert quota.totals("acme") == {
        ("acct", "calls", "L", 0): 3,
        ("run:old", CLOSED, "L", 0): 1,
        ("run:used", CLOSED, "L", 0): 1,
    }


def test_a_total_stops_at_its_end_and_alarms() -> None:
    """A total that would leave int64 stays at the largest one, above every limit, instead of wrapping to a negative."""
    found = directory({"acme": counts(("calls", "L", "acct"))})
    quota = folded(found, batch([usage(quantities={"calls": 10**12})]))
    quota.tables["L", 0].totals[0] = TOTAL_MAX - 5
    for _ in range(2):
        quota.fold(found, batch([usage(quantities={"calls": 10})]))
    assert quota.totals("acme") == {("acct", "calls", "L", 0): TOTAL_MAX}
    assert quota.alarms["overflow"] == 1


def test_sums_of_the_largest_batch_are_exact() -> None:
    """The largest batch of the largest quantities adds up exactly: nothing on the way is a float or wraps."""
    found = directory({"acme": counts(("tokens_in", "L", "acct"))})
    event = usage(quantities={"calls": 1, "tokens_in": 10**12 - 1})
    quota = folded(found, batch([event] * 32_768))
    assert quota.totals("acme") == {("acct", "tokens_in", "L", 0): 32_768 * (10**12 - 1)}


def test_the_scope_behind_the_hundred_thousandth_counts_in_other() -> None:
    """At 100,000 live scopes an account's new ones share `other~`, `p` says full, and known scopes count on."""
    found = directory({"acme": counts(("calls", "h", "user")), "b": counts(("calls", "h", "user"))})
    quota = Quota()
    quota.on_step(NOW_S)
    quota.scopes.add([("acme", f"user:f{n}") for n in range(SCOPES_MAX - 2)])
    quota.policies.clear()
    events = [usage(account, principal=f"p{n}") for n in (1, 2, 3, 4, 1) for account in ("acme", "b")]
    quota.fold(found, batch(events))
    got = {scope: units for (scope, *_), units in quota.totals("acme").items()}
    assert got == {"user:p1": 2, "user:p2": 1, "other~": 2}
    assert len(quota.totals("b")) == 4
    assert (quota.scopes.full("acme"), quota.scopes.full("b")) == (True, False)
    assert "acme" in quota.policies
    assert gate_fields(found.accounts["acme"].policy, 1, quota.scopes.full("acme"))[4:6] == ["full", "1"]
    assert quota.alarms["other_scope"] == 2


def test_usage_ends_its_hold_whatever_its_status() -> None:
    """Accepted usage that names a hold closes it in its account's lane; a duplicate does not."""
    found = directory({"acme": None, "b": None})
    events = [usage(hold="h1"), usage(hold="h2", status="denied"), usage("b", hold="h3"), usage(hold="h4"), usage()]
    quota = folded(found, batch(events, accepted=[True, True, True, False, True]))
    assert quota.closes == {lane("acme"): ["h1", "h2"], lane("b"): ["h3"]}


def test_policies_of_commands_and_of_accounts_opened_on_sight_are_written() -> None:
    """A command makes an account's `p` due; so does the first usage of an account that no command opened."""
    found, quota = directory({"acme": None, "b": None}), Quota()
    quota.on_step(NOW_S)
    quota.on_command(found, command("policy.set"))
    assert quota.policies == {"acme"}
    quota.fold(found, batch([usage("b")]))
    assert quota.policies == {"acme", "b"}


def test_a_new_policy_counts_from_its_offset_on() -> None:
    """Usage behind a `policy.set` is counted by the new policy, even if the old one was in use."""
    found = directory({"acme": counts(("calls", "h", "acct"))})
    quota = folded(found, batch([usage()]))
    found.accounts["acme"].policy_own = counts(("calls", "d", "acct"))
    quota.on_command(found, command("policy.set"))
    quota.fold(found, batch([usage()]))
    assert quota.totals("acme") == {("acct", "calls", "h", NOW_S): 1, ("acct", "calls", "d", NOW_S): 1}


def test_a_freeze_is_told_to_the_gate() -> None:
    """A frozen account's `p` says so, and is due once it is frozen and once it is free again."""
    found, quota = directory({"acme": None}), Quota()
    for kind in ("account.freeze", "account.unfreeze"):
        quota.policies.clear()
        quota.on_command(found, command(kind))
        assert quota.policies == {"acme"}
    assert gate_fields(found.accounts["acme"].policy, 1, False, True)[2:4] == ["frozen", "1"]


def test_a_closed_run_is_remembered_35_days() -> None:
    """A run closed by command, or 35 days after its last usage, keeps a mark of 1 for 35 days, whatever is counted."""
    found = directory({"acme": counts(("calls", "L", "run"))})
    quota = folded(found, batch([usage(run="idle")]))
    quota.on_command(found, command("run.close", run="r1"))
    quota.on_command(found, command("run.close", run="r1"))
    quota.on_command(found, command("session.close", session="s1"))
    mark = (CLOSED, "L", 0)
    assert {scope: units for (scope, *what), units in quota.totals("acme").items() if tuple(what) == mark} == {
        "run:r1": 1,
        "sess:s1": 1,
    }
    loaded = Quota.load(quota.dump())
    loaded.on_step(NOW_S + IDLE_KEEP_S + 3_600)
    assert loaded.totals("acme") == {("run:idle", *mark): 1}
    loaded.on_step(NOW_S + 2 * IDLE_KEEP_S + 7_200)
    assert loaded.totals("acme") == {}


def test_a_close_in_a_full_account_is_an_alarm() -> None:
    """Where unknown scopes share `other~`, a run that has no totals gets no mark, and the alarm says so."""
    found, quota = directory({"acme": None}), Quota()
    quota.on_step(NOW_S)
    quota.scopes.add([("acme", f"user:f{n}") for n in range(SCOPES_MAX)])
    quota.on_command(found, command("run.close", run="r1"))
    assert (quota.totals("acme"), quota.alarms["close_in_full"]) == ({}, 1)


def test_gate_fields_give_a_kinds_limit_precedence_over_principal() -> None:
    """`principal` limits reach the gate as user, client and anon; one for the kind itself wins, whatever its place."""
    policy = counts(("calls", "h", "acct"), limits=[("user", "calls", "h", 5), ("principal", "calls", "h", 9)])
    fields = gate_fields({**policy, "outage": "closed", "max_staleness_s": 30}, 3, False)
    got = dict(zip(fields[::2], fields[1::2], strict=True))
    assert got == {
        "v": "3", "frozen": "0", "full": "0", "outage": "closed", "max_staleness_s": "30", "limited": "calls:h",
        "user|calls|h": "5", "client|calls|h": "9", "anon|calls|h": "9",
    }  # fmt: skip


def test_full_key_segments_are_compressed_once() -> None:
    """A dump after totals alone have changed reuses the compressed keys: the very same bytes objects."""
    found = directory({"acme": counts(("calls", "h", "user"))})
    events = [usage(principal=f"p{n}") for n in range(17_000)]
    quota = folded(found, batch(events))
    before = quota.dump()
    quota.fold(found, batch(events[:10]))
    after = quota.dump()
    assert after["scopes"][0] is before["scopes"][0]
    assert after["tables"][0][2][0] is before["tables"][0][2][0]
    assert after["tables"][0][4] != before["tables"][0][4]
    loaded = Quota.load(after)
    assert loaded.dump() == after
    assert np.array_equal(loaded.tables["h", NOW_S].totals, quota.tables["h", NOW_S].totals[:17_000])


def test_what_a_limit_names_is_counted() -> None:
    """A limit on what `counts` leaves out is enforced by the total, not by the open holds alone."""
    policy = counts(("calls", "h", "acct"), limits=[("run:r1", "tokens_in", "L", 9), ("principal", "calls", "d", 5)])
    quota = folded(directory({"acme": policy}), batch([usage(run="r1", quantities={"calls": 1, "tokens_in": 4})]))
    found = {(scope, meter, window): units for (scope, meter, window, _), units in quota.totals("acme").items()}
    assert found == {("acct", "calls", "h"): 1, ("run:r1", "tokens_in", "L"): 4, ("user:u1", "calls", "d"): 1}
