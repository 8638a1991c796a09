"""Sealed snapshots: bytes that the log alone decides, and that a fold which is one unit off does not have."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.records import CONFIG, PARTITIONS, SIGNER, opened
from tests.sealing import NOWHERE, SNAPSHOT_S, folded, fresh, written
from tollway.connectors.errors import Fatal
from tollway.schemas.lane import LANES
from tollway.streams.accounts import AccountsFold, Fact, think_billing, think_quota
from tollway.streams.failpoint import Failpoints
from tollway.streams.refold import Folds, Row, folds, refold
from tollway.streams.seal import GROUPS, canonical, crossed, day_of, is_sealed, sealed, seals
from tollway.streams.state import PartitionState


async def pages_of(rows: Sequence[Row], start: int, page: int = 50) -> AsyncIterator[Sequence[Row]]:
    """The log from an offset on."""
    for at in range(start, len(rows), page):
        yield rows[at : at + page]


def fold_of(group: str) -> Folds:
    return folds(CONFIG.epoch, PARTITIONS, SIGNER.public_key, NOWHERE)[group]


@pytest.mark.parametrize("group", GROUPS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_seal_is_a_function_of_the_log(group: str, seed: int, data: st.DataObject) -> None:
    """However the records are cut into batches and wherever the fold is restarted: the same seals, byte for byte."""
    rows = written(seed, calls=300)
    _, expected = asyncio.run(folded(group, rows))
    assert len(expected) >= 2
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=60)))
    restarts = data.draw(st.sets(st.integers(0, len(cuts)), max_size=6))
    _, found = asyncio.run(folded(group, rows, cuts, restarts=restarts))
    assert found == expected


@pytest.mark.parametrize("group", GROUPS)
async def test_record_by_record_makes_the_same_seals(group: str) -> None:
    """The finest cut there is: each record a batch of its own, a restart behind each tenth."""
    rows = written(7)
    cuts = range(1, len(rows))
    assert (await folded(group, rows, cuts, restarts=cuts[::10]))[1] == (await folded(group, rows))[1]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("seed", [1, 2])
async def test_from_each_seal_the_next_ones_follow(group: str, seed: int) -> None:
    """Snapshot and log give every later snapshot's hash, from each of them and from the log's first record."""
    rows = written(seed)
    _, expected = await folded(group, rows)
    fold = fold_of(group)
    for at in range(-1, len(expected) - 1):
        state = fold.load(0, expected[at].state if at >= 0 else fresh(group))
        points = [seal.next_offset for seal in expected[at + 1 :]]
        later = iter(expected[at + 1 :])
        async for _ in refold(fold, state, pages_of(rows, state.next_offset), points):
            seal = next(later)
            assert sealed(group, state, seal.day) == seal
        assert next(later, None) is None


async def test_a_fold_that_is_one_unit_off_is_found_out() -> None:
    """One unit too much in one sum, or one in one total, and the next boundary's hash is another."""

    def too_much(subject: Any) -> Any:
        found = think_billing(subject)
        sums = subject.state.parts["billing"]._sums
        if isinstance(subject, Fact) and sums:
            sums[min(sums)].units += 1
        return found

    def too_little(subject: Any) -> None:
        think_quota(subject)
        for table in subject.state.parts["quota"].tables.values():
            if isinstance(subject, Fact) and table.window == "M":
                table.totals[0] -= 1
                table._cache = None

    async def seals_with(quota: Any, billing: Any) -> list[bytes]:
        async def think_with(think: Any, subject: Any) -> Any:
            return think(subject)

        fold = AccountsFold(
            CONFIG.epoch, PARTITIONS, SIGNER.public_key,
            lambda subject: think_with(quota, subject), lambda subject: think_with(billing, subject),
            None, Failpoints(),  # type: ignore[arg-type]
        )  # fmt: skip
        state, found = fold.load(0, fresh("accounts")), []
        rows = written(3)
        points = [seal.next_offset for seal in (await folded("accounts", rows))[1]]
        async for _ in refold(fold, state, pages_of(rows, 0), points):
            found.append(sealed("accounts", state, 0).hash)
        return found

    right = await seals_with(think_quota, think_billing)
    assert right == await seals_with(think_quota, think_billing)
    assert any(a != b for a, b in zip(right, await seals_with(think_quota, too_much), strict=True))
    assert all(a != b for a, b in zip(right, await seals_with(too_little, think_billing), strict=True))


async def test_what_the_worker_keeps_for_itself_is_not_sealed() -> None:
    """What Redis was told, alarms and the order in which things came leave no trace in the bytes."""
    state, _ = await folded("accounts", written(4))
    before = sealed("accounts", state, 1)
    quota = state.parts["quota"]
    quota.take(range(LANES), log_time_ms=state.log_time_ms, everything=True, ends=range(LANES))
    quota.alarms["late"] += 1
    quota.policies.clear()
    state.directory.accounts = dict(reversed(state.directory.accounts.items()))
    state.dedupe.sources = dict(reversed(state.dedupe.sources.items()))
    assert sealed("accounts", state, 1) == before
    state.dedupe.duplicates += 1
    assert sealed("accounts", state, 1).hash != before.hash


async def test_a_seal_loads_to_the_state_that_was_sealed() -> None:
    """Its bytes give the checkpoint's dump back, buffers and all."""
    state, _ = await folded("accounts", written(5))
    seal = sealed("accounts", state, 1)
    assert canonical(seal.state) == canonical(state.dump())
    with pytest.raises(Fatal, match="do not have its hash"):
        _ = replace(seal, hash=bytes(32)).state


def test_a_boundary_is_crossed_by_a_step() -> None:
    """Days begin with the first step that starts at or past k · snapshot_s; of several the last one counts."""
    state = opened()
    state.directory.config = replace(CONFIG, step_s=5, snapshot_s=62)
    state.log_time_ms = 123_999
    assert [day_of(state, at_s * 1000) for at_s in (60, 64, 65, 124, 125, 249, 250)] == [0, 0, 1, 1, 2, 3, 4]
    assert [crossed(state, at) for at in (124_000, 124_999, 125_000, 190_000)] == [None, None, 2, 3]
    assert crossed(PartitionState(0, 1, "e"), 10**12) is None


async def test_only_whole_and_sound_seals_of_this_log_are_read() -> None:
    """A damaged byte, a missing part, a tombstone, another log's: not there. The newest write of a key counts."""
    _, (first, second, *_) = await folded("accounts", written(6))
    records = [(key, value) for seal in (first, second) for _, _, key, value, _ in seal.messages()]
    assert seals(records, CONFIG.epoch) == [first, second]
    key, value = [(key, value) for key, value in records if value is not None][-1]
    assert value is not None
    assert key is not None
    assert is_sealed(key)
    assert not is_sealed(b"accounts|e|0|1")
    assert seals([*records, (key, value[:-3] + b"\0" + value[-2:])], CONFIG.epoch) == [first]
    assert seals([*records, (key, value[: len(value) // 2])], CONFIG.epoch) == [first]
    assert seals([*records, (key, None)], CONFIG.epoch) == [first]
    assert seals(records, "0-other") == []
    assert SNAPSHOT_S * 1000 * first.day <= second.log_time_ms
