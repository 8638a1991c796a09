"""A changed fold: from which record on it counts, who may fold it, and what the command is refused for."""

from typing import Any

import pytest

from tests.records import CONFIG, NOW_MS, command, opened, raw, records, usage
from tollway.connectors.errors import Fatal
from tollway.streams.batch import ACCEPTED, DUPLICATE, REFUSED
from tollway.streams.directory import Directory
from tollway.streams.fold import NewerFold
from tollway.streams.fold_change import refusal
from tollway.streams.judge import judge, judge_block
from tollway.streams.seal import sealed
from tollway.streams.state import FOLD_VERSION, PartitionState

NEXT = FOLD_VERSION + 1
NOW_S = NOW_MS // 1000
STEP_S = CONFIG.step_s


def told(state: PartitionState, version: int, at_s: int, number: int = 0) -> Any:
    """Verdict and reason of one `fold.change`."""
    change = command("*", "fold.change", {"version": version, "at_s": at_s}, number=number)
    batch = judge(state, records([change], first=state.next_offset))
    return batch.verdict[0], batch.reasons.get(0, ("", ""))[0]


@pytest.mark.parametrize("late_s", [0, 1, STEP_S - 1])
def test_it_counts_from_the_first_step_at_or_past_its_time(late_s: int) -> None:
    """Whatever record is the step's first, the version changes there, not before and not between."""
    state = opened()
    at_s = NOW_S // STEP_S * STEP_S + 2 * STEP_S
    assert told(state, NEXT, at_s - late_s) == (ACCEPTED, "")
    state.enter(at_s // STEP_S - 1)
    assert state.directory.fold_version == FOLD_VERSION
    with pytest.raises(NewerFold, match=f"folded by version {NEXT}, this worker knows up to {FOLD_VERSION}"):
        state.enter(at_s // STEP_S)


def test_a_worker_that_does_not_know_it_folds_nothing_of_that_step() -> None:
    """What stands before the step is judged; the step's first record is not, and no later one."""
    state = opened()
    at_ms = (NOW_S // STEP_S + 1) * STEP_S * 1000
    raws = [
        command("*", "fold.change", {"version": NEXT, "at_s": at_ms // 1000}),
        raw(usage(sequence=1), at_ms - 1),
        raw(usage(sequence=2), at_ms),
    ]
    with pytest.raises(NewerFold):
        judge_block(state, records(raws))
    assert state.next_offset == 2
    assert next(iter(state.dedupe.sources.values())).popitem()[1].high == 1


def test_a_state_of_a_newer_version_is_not_loaded() -> None:
    """A worker of an older build that is given the partition stops before it has folded anything."""
    state = opened()
    told(state, NEXT, 0)
    state.directory.change_fold(NOW_S)
    with pytest.raises(Fatal, match="deploy the newer one"):
        PartitionState.load(0, 4, CONFIG.epoch, state.dump(), {})


def test_versions_follow_one_another_and_never_go_back() -> None:
    """The next version, no earlier than the one before, is taken; another is a dead letter; the same command counts once."""
    state = opened()
    assert told(state, 3, NOW_S, 1) == (REFUSED, "bad_command")
    assert told(state, 2, NOW_S + 60, 2) == (ACCEPTED, "")
    assert told(state, 2, NOW_S + 60, 2) == (DUPLICATE, "")
    assert told(state, 2, NOW_S + 60, 3) == (REFUSED, "bad_command")
    assert told(state, 3, NOW_S + 59, 4) == (REFUSED, "bad_command")
    assert told(state, 3, NOW_S + 60, 5) == (ACCEPTED, "")
    state.directory.change_fold(NOW_S + 60)
    assert state.directory.fold_version == 3


def test_what_is_dumped_is_loaded_and_says_nothing_where_nothing_changed() -> None:
    """Versions come back from a dump; a state that was never told of one has the bytes, and so the hash, that it always had."""
    state = opened()
    assert "fold" not in state.directory.dump()
    before = sealed("accounts", state, 0).hash
    told(state, NEXT, NOW_S + 60)
    assert Directory.load(state.directory.dump()).dump() == state.directory.dump()
    assert sealed("accounts", state, 0).hash != before


def shown(known: int = 2, version: int = 1, changes: dict[int, int] | None = None, worker: int = 2) -> dict[str, Any]:
    row = {"group": "accounts", "partition": 0, "version": version, "changes": changes or {}, "worker": worker}
    other = {**row, "group": "audit", "worker": 2}
    return {"epoch": "0-x", "known": known, "partitions": [row, other]}


@pytest.mark.parametrize(
    ("state", "version", "said"),
    [
        (shown(), 2, None),
        (shown(changes={2: 5}), 2, None),
        (shown(known=1), 2, "this build folds by versions up to 1; use the newer build's command"),
        (shown(), 1, "the log folds by version 1, the next is 2"),
        (shown(known=3), 3, "the log folds by version 1, the next is 2"),
        (shown(worker=1), 2, "group accounts, partition 0: written by workers that know versions up to 1: deploy"),
    ],
)
def test_the_command_is_refused_before_it_is_signed(state: dict[str, Any], version: int, said: str | None) -> None:
    """A version that this build, a worker or the log is not ready for is refused in a sentence that says what to do."""
    found = refusal(state, version)
    assert found is None if said is None else said in (found or "")
