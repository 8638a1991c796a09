"""A checkpoint is whole or it is passed over."""

from typing import Any

import pytest

from tollway.streams import checkpoint


def written(offset: int, slot: int = 0, turn: int = 1, **more: Any) -> list[tuple[bytes, bytes]]:
    """Records of one checkpoint whose state says its offset."""
    given = {"group": "g", "epoch": "e", "partition": 3, "state": {"offset": offset}, **more}
    return checkpoint.encode(
        slot=slot, next_offset=offset, turn=turn, written_ms=offset, fold_version=1, stats={"a": 1}, **given
    )


def test_the_highest_offset_wins_whoever_wrote_last() -> None:
    """A worker that wakes up after its takeover and writes an older state only causes more to be read again."""
    log = [*written(20, 0), *written(30, 1), *written(25, 0)]
    found = checkpoint.newest(log, "g", "e", 3)
    assert found is not None
    assert (found.next_offset, found.state, found.stats) == (30, {"offset": 30}, {"a": 1})


def test_by_turn_the_last_turn_wins() -> None:
    """The sender's state moves at one offset: its turn counts."""
    found = checkpoint.newest(
        [*written(20, 0, turn=7), *written(20, 1, turn=8, state={"x": 1})], "g", "e", 3, by_turn=True
    )
    assert found is not None
    assert found.state == {"x": 1}


@pytest.mark.parametrize("at", [0, 5, 40, 60, -1])
def test_a_damaged_record_is_passed_over(at: int) -> None:
    """One changed byte: the other slot is loaded."""
    [(key, value)] = written(30, 1)
    damaged = bytearray(value)
    damaged[at] ^= 0x01
    found = checkpoint.newest([*written(20, 0), (key, bytes(damaged))], "g", "e", 3)
    assert found is not None
    assert (found.next_offset, found.state) == (20, {"offset": 20})


def test_other_groups_epochs_and_partitions_are_not_ours() -> None:
    """Nothing of another log or partition is ever loaded."""
    log = [*written(1, group="h"), *written(2, epoch="f"), *written(3, partition=4)]
    assert checkpoint.newest(log, "g", "e", 3) is None
    assert checkpoint.epochs(log, "g", 3) == {"f"}


def test_a_state_above_a_message_travels_in_parts() -> None:
    """All parts of one write, or none: a missing one falls back to the other slot."""
    big = {"bytes": [number * 7919 % 65_521 for number in range(4_000)]}
    before = written(10, 0)
    parts = written(20, 1, state=big, part_bytes_max=1_000)
    assert len(parts) > 3
    whole = checkpoint.newest([*before, *parts], "g", "e", 3)
    torn = checkpoint.newest([*before, *parts[:-1]], "g", "e", 3)
    assert whole is not None
    assert torn is not None
    assert (whole.state, torn.next_offset) == (big, 10)
