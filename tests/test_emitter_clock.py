"""The emitter's clock is set forward and back, as clocks are: no source outlives its day, nothing young is called old."""

import asyncio
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.usage_log import CALL, NOWHERE, Log, call, emitter_to, eventually
from tollway.connectors.emitter import SOURCE_S, Emitted, Emitter
from tollway.schemas.ids import born_ms

DAY_S = 86_400


class Clocks:
    """The time of day, which may be set, and the time that passes."""

    def __init__(self) -> None:
        self.passed_s, self.set_s = 0.0, time.time()

    def now_us(self) -> int:
        return int((self.set_s + self.passed_s) * 1e6)

    def elapsed_s(self) -> float:
        return self.passed_s


@pytest.fixture
def log(kafka: str) -> Log:
    return Log(kafka)


@given(
    st.lists(
        st.tuples(st.floats(0, 2 * DAY_S), st.sampled_from([0, 0, 0, -0.5, -5, 60, -DAY_S, 3 * DAY_S])), max_size=40
    )
)
def test_no_source_outlives_a_day(steps: list[tuple[float, float]]) -> None:
    """However the clock is set, a source is used for at most the day that the fold allows it, and its sequences have no gap."""
    clocks = Clocks()
    emitter = Emitter(NOWHERE, durability="memory", clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    used: dict[str, list[float]] = defaultdict(list)
    sequences: dict[str, list[int]] = defaultdict(list)
    for passes, is_set in steps:
        clocks.passed_s += passes
        clocks.set_s += is_set
        one = emitter.emit(**CALL)
        assert one is not None
        used[one.source].append(clocks.passed_s)
        sequences[one.source].append(one.sequence)
    small_steps_s = sum(-is_set for _, is_set in steps if -1 < is_set < 0)
    assert all(times[-1] - times[0] <= SOURCE_S + small_steps_s for times in used.values())
    assert all(of == [*range(1, len(of) + 1)] for of in sequences.values())


async def test_a_clock_that_is_set_back(log: Log, tmp_path: Path) -> None:
    """Set back by ten days, the emitter goes on with a source of the new time; set back by half a second, with the same."""
    clocks = Clocks()
    emitter = emitter_to(log, tmp_path, clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    first = emitter.emit(**CALL)
    clocks.set_s -= 0.5
    second = emitter.emit(**CALL)
    clocks.set_s -= 10 * DAY_S
    third = emitter.emit(**CALL)
    assert first is not None
    assert third is not None
    assert second == Emitted(first.source, first.lane, 2)
    assert third.sequence == 1
    assert born_ms(third.source) == clocks.now_us() // 1000
    await emitter.start()
    assert await emitter.flush(30) == {}
    await emitter.close(10)
    assert set(log.identities()) == {first, second, third}
    assert list(tmp_path.iterdir()) == []


async def test_a_clock_that_is_set_forward_makes_nothing_old(log: Log, tmp_path: Path) -> None:
    """Set forward by ten days, what this process emitted a moment ago is still sent; what waited four days is counted."""
    clocks = Clocks()
    emitter = emitter_to(log, tmp_path, clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    emitted = [emitter.emit(**call(n)) for n in range(100)]
    clocks.set_s += 10 * DAY_S
    emitted += [emitter.emit(**call(n)) for n in range(100)]
    await emitter.start()
    assert await emitter.flush(30) == {}
    assert emitter.counters["too_old"] == 0
    await emitter.close(10)
    assert sorted(log.identities()) == sorted(filter(None, emitted))
    old = emitter_to(log, tmp_path, clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    for n in range(100):
        old.emit(**call(n))
    clocks.passed_s += 4 * DAY_S
    young = old.emit(**CALL)
    await old.start()
    assert await old.flush(30) == {}
    assert (old.counters["too_old"], old.counters["expired"], old.counters["acknowledged"]) == (100, 100, 1)
    await old.close(10)
    assert set(log.identities()) == {*emitted, young}


async def test_a_refusal_ends_whatever_the_clock_does(tmp_path: Path) -> None:
    """A new source cannot be made for a moment and the clock is set back meanwhile: a second later events are taken again."""
    clocks, spool = Clocks(), tmp_path / "spool"
    emitter = Emitter(NOWHERE, spool_dir=spool, clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    clocks.passed_s += DAY_S
    spool.rename(tmp_path / "elsewhere")
    assert emitter.emit(**CALL) is None
    (tmp_path / "elsewhere").rename(spool)
    clocks.set_s -= 2 * DAY_S
    assert emitter.emit(**CALL) is None
    assert emitter.counters["refused"] == {"disk": 2}
    clocks.passed_s += 1
    assert emitter.emit(**CALL) is not None
    await emitter.close(0)


async def test_a_successor_goes_by_its_clock(log: Log, tmp_path: Path) -> None:
    """A dead process's events have only their times: what is more than three days old by the successor's clock is counted."""
    clocks = Clocks()
    dead = Emitter(NOWHERE, spool_dir=tmp_path, clock_us=clocks.now_us, elapsed_s=clocks.elapsed_s)
    for n in range(10):
        dead.emit(**call(n))
        clocks.passed_s += DAY_S / 4
    await asyncio.to_thread(dead.close_sync, 0)
    clocks.passed_s += DAY_S
    async with emitter_to(log, tmp_path, clock_us=clocks.now_us) as successor:
        await eventually(lambda: successor.counters["too_old"] + successor.counters["resumed"] == 10)
        assert successor.counters["expired"] == successor.counters["acknowledged"] == 0
        assert successor.counters["too_old"] == 2
