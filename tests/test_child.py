"""A state cut by lanes: what the children hold together is what the parent held, and each goes on as if it had always been alone."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.records import CONFIG, NOW_MS, command, opened, raw, records, source, usage
from tollway.schemas.lane import lane
from tollway.streams.accounts import PARTS, Fact, Step, think_billing, think_quota
from tollway.streams.billing import Billing
from tollway.streams.child import child_state
from tollway.streams.judge import cut, judge, log_times
from tollway.streams.quota import Quota
from tollway.streams.state import PartitionState
from tollway.streams.totals import METER_BITS

PARENTS, CHILDREN = 4, 16
NAMES = [name for name in (f"acct-{n}" for n in range(200)) if lane(name) % PARENTS == 1][:12]
"""Accounts of the parent, of several children."""
EPOCH = "1-next"


def parent() -> PartitionState:
    state = opened(1, *NAMES)
    state.directory.meters = {"calls": "calls", "tokens": None}
    state.parts = {"quota": Quota(), "billing": Billing()}
    return state


def fold(state: PartitionState, raws: list[Any]) -> list[Any]:
    """As group accounts does; returns its meter events."""
    sent, rest = [], records(raws, state.next_offset)
    while len(rest):
        end, step = cut(state, rest), state.step_of(int(log_times(state, rest)[0]))
        if step != state.step:
            state.enter(step)
            think_quota(Step(state, step * state.step_s))
            sent += think_billing(Step(state, step * state.step_s))
        fact = Fact(state, judge(state, rest.part(0, end)))
        think_quota(fact)
        think_billing(fact)
        rest = rest.part(end, len(rest))
    return sent


def call(name: str, sequence: int, at_ms: int) -> Any:
    fields: dict[str, Any] = {"account": name, "source": source(lane(name)), "sequence": sequence}
    return raw(usage(1, at_ms, **fields, quantities={"calls": 1, "tokens": 3}), at_ms)


def children(state: PartitionState) -> list[PartitionState]:
    numbers = range(state.partition, CHILDREN, PARENTS)
    return [child_state(state, "accounts", number, CHILDREN, EPOCH, PARTS) for number in numbers]


def opening(at_ms: int) -> Any:
    return command("*", "log.open", {**CONFIG.body(), "epoch": EPOCH, "origin": CONFIG.epoch}, at_ms, number=9)


def totals(*states: PartitionState) -> dict[tuple[str, int, str, str], int]:
    """Every total in Redis' words, of states that share none."""
    found: dict[tuple[str, int, str, str], int] = {}
    for state in states:
        quota: Quota = state.parts["quota"]
        for (window, start), table in quota.tables.items():
            for key, total in zip(table.keys[: table.n].tolist(), table.totals[: table.n].tolist(), strict=True):
                name = quota.scopes.names[key >> METER_BITS]
                place = window, start, name, quota.meters[key & ((1 << METER_BITS) - 1)]
                assert place not in found, f"{place} is in two states"
                found[place] = total
    return found


Calls = list[tuple[str, int]]
calls = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 4_000)), max_size=30)


def made(some: Calls, at_ms: int, sequences: dict[int, int]) -> list[tuple[str, Any]]:
    """(account, record) of calls, each so many ms behind the one before; each lane has its emitter and its sequences."""
    found = []
    for name, more_ms in some:
        at_ms += more_ms
        sequences[lane(name)] = sequences.get(lane(name), 0) + 1
        found.append((name, call(name, sequences[lane(name)], at_ms)))
    return found


@given(calls, calls)
@settings(max_examples=40, deadline=None)
def test_growing_changes_no_total_and_no_bill(before: Calls, after: Calls) -> None:
    """Half of the calls folded by the parent, the other half by its children: totals and deltas are those of one partition."""
    sequences: dict[int, int] = {}
    early, late = made(before, NOW_MS, sequences), made(after, NOW_MS + 200_000, sequences)
    bind = [command(name, "customer.bind", {"customer": f"cus-{name}"}) for name in NAMES]
    end = (b"tick", None, (), NOW_MS + 3 * 3_600_000)
    whole, grown = parent(), parent()
    alone = fold(whole, [*bind, *(each for _, each in [*early, *late]), end])
    sent, found = fold(grown, [*bind, *(each for _, each in early)]), children(grown)
    for child in found:
        mine = [each for name, each in late if lane(name) % CHILDREN == child.partition]
        sent += fold(child, [opening(grown.log_time_ms), *mine, end])
    assert sorted(map(str, sent)) == sorted(map(str, alone))
    assert totals(*found) == totals(whole)
    assert not any(child.refused for child in found)


def test_what_was_seen_by_the_parent_is_seen_by_the_child() -> None:
    """The same usage again, to the new log: a duplicate there, and only there where its lane went."""
    state, name = parent(), NAMES[0]
    fold(state, [call(name, 1, NOW_MS)])
    child = next(each for each in children(state) if lane(name) % CHILDREN == each.partition)
    fold(child, [opening(NOW_MS), call(name, 1, NOW_MS + 1), call(name, 2, NOW_MS + 1)])
    assert (child.dedupe.duplicates, child.dedupe.sources[source(lane(name))][lane(name)].high) == (1, 2)


def test_accounts_and_counters_are_nowhere_twice() -> None:
    """Every account in one child; what only counts stays with the parent's number; keys and meters are everywhere."""
    state = parent()
    state.refused, state.dedupe.duplicates = {"too_late": 3}, 5
    found = children(state)
    assert sorted(name for child in found for name in child.directory.accounts) == sorted(state.directory.accounts)
    assert [child.refused.get("too_late", 0) for child in found] == [3, 0, 0, 0]
    assert sum(child.dedupe.duplicates for child in found) == 5
    assert all(child.directory.keys == state.directory.keys for child in found)


def test_the_next_log_takes_nothing_before_it_is_open() -> None:
    """A child has its parent's configuration, not its log's: usage in front of `log.open` is refused, another opening too."""
    name = NAMES[0]
    child = next(each for each in children(parent()) if lane(name) % CHILDREN == each.partition)
    fold(child, [call(name, 1, NOW_MS)])
    assert child.refused == {"not_open": 1}
    other = {**CONFIG.body(), "epoch": EPOCH, "origin": CONFIG.epoch, "step_s": 7}
    fold(child, [command("*", "log.open", other, number=3)])
    assert child.refused == {"not_open": 1, "bad_command": 1}
    fold(child, [opening(NOW_MS), call(name, 1, NOW_MS)])
    assert child.is_open
    assert sum(child.refused.values()) == 2
