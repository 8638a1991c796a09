"""flush() says exactly what is not acknowledged, whatever was dropped, expired, or sent out of turn meanwhile."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from tests.usage_log import CALL, NOWHERE, call
from tollway.connectors.acknowledged import Acknowledged
from tollway.connectors.emitter import Emitter
from tollway.connectors.flush import Flushes, outstanding
from tollway.connectors.outbox import Batch, Outbox
from tollway.connectors.progress import GivenUp, Progress
from tollway.connectors.sender import Sender
from tollway.connectors.spool import Position, Spool
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES

DAY_US = 86_400_000_000


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), max_size=30), st.integers(0, 200), st.integers(0, 200))
def test_given_up_is_a_set(gaps: list[tuple[int, int]], after: int, to: int) -> None:
    """Ranges hold and count what a set of the same sequences does."""
    ranges, members, at = GivenUp(), set(), 0
    for gap, length in gaps:
        first, at = at + gap + 1, at + gap + length
        ranges.add(7, first, at, settled=0)
        members |= set(range(first, at + 1))
    assert {n for n in range(at + 2) if ranges.holds(7, n)} == members
    assert ranges.between(7, after, to) == len([n for n in members if after < n <= to])
    assert not ranges.holds(8, 1)


def test_given_up_forgets_what_is_settled() -> None:
    """Ranges that lie before what is acknowledged take no memory."""
    ranges = GivenUp()
    for n in range(1, 1_000):
        ranges.add(3, 10 * n, 10 * n + 1, settled=10 * n - 50)
    assert len(ranges._ranges[3]) < 10


SEGMENTS = st.lists(
    st.tuples(st.sampled_from(["sent", "expired", "dropped"]), st.lists(st.integers(0, 3), max_size=12))
)


@given(SEGMENTS, st.integers(0, 60), st.integers(0, 60))
def test_outstanding_is_what_is_left(segments: list[tuple[str, list[int]]], acknowledged: int, asked: int) -> None:
    """Of the first events asked for, those are outstanding that were neither acknowledged, expired nor dropped: by lane."""
    progress, given, fates = Progress(), [0] * LANES, []
    counts = [[segment.count(lane) for lane in range(LANES)] for _, segment in segments]
    for number, (fate, segment) in enumerate(segments):
        for lane in segment:
            given[lane] += 1
            fates.append((lane, given[lane], fate))
            if fate == "expired":
                progress.expire([(0, given[lane], lane, b"", b"")])
        if fate == "dropped":
            progress.drop(counts[:number], counts[number])
    sent = [one for one in fates if one[2] == "sent"]
    done = sent[:acknowledged]
    progress.settle({lane: sequence for lane, sequence, _ in done})
    target = [0] * LANES
    for lane, sequence, _ in fates[:asked]:
        target[lane] = sequence
    left = Counter(lane for lane, sequence, _ in sent[acknowledged:] if sequence <= target[lane])
    assert progress.outstanding(target) == left


def test_what_is_dropped_later_settles_nothing(tmp_path: Path) -> None:
    """Ten events are in flight, newer ones are dropped: all ten are still outstanding."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path, spool_events_max=80, when_full="drop_oldest")
    first = [emitter.emit(**CALL) for _ in range(10)]
    assert first[0] is not None
    spool = emitter._spools[0]
    assert len(spool.take()[0]) == 10
    ends, _ = emitter._flushing()
    for _ in range(200):
        emitter.emit(**CALL)
    assert emitter.counters["dropped"] > 100
    assert outstanding(ends) == {first[0].lane: 10}
    asyncio.run(emitter.close(0))


def test_a_newer_life_settles_nothing_of_an_older(tmp_path: Path) -> None:
    """What the source of today has acknowledged does not stand for what yesterday's has not."""
    now_us = 1_790_000_000_000_000
    emitter = Emitter(NOWHERE, spool_dir=tmp_path, clock_us=lambda: now_us)
    old = emitter.emit(**CALL)
    now_us += DAY_US
    for _ in range(5):
        emitter.emit(**CALL)
    assert old is not None
    ends, _ = emitter._flushing()
    assert outstanding(ends) == {old.lane: 6}
    young = emitter._spools[1]
    young.progress.settle({lane: sequence for _, sequence, lane, _, _ in young.take()[0]})
    young.settle(young.position)
    assert outstanding(ends) == {old.lane: 1}
    flushes = Flushes()
    waiter = flushes.wait(ends)
    assert not waiter.done()
    emitter._spools[0].take()
    emitter._spools[0].settle(emitter._spools[0].position)
    flushes.notify()
    assert waiter.done()
    assert outstanding(ends) == {}
    asyncio.run(emitter.close(0))


def test_expired_ones_do_not_stand_for_those_in_flight(tmp_path: Path) -> None:
    """Frames in flight when later ones expired: after a failure they are taken again, the expired ones not."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path)
    for _ in range(100):
        emitter.emit(**CALL)
    spool = emitter._spools[0]
    frames, _ = spool.take()
    spool.progress.expire(frames[40:])
    spool.rewind()
    assert spool.take()[0] == frames[:40]
    asyncio.run(emitter.close(0))


async def test_a_repetition_whose_place_is_unknown_is_acknowledged(tmp_path: Path) -> None:
    """The broker knows a batch but no longer where it stands (offset −1): it counts as acknowledged, its offset is None."""
    tally, acknowledged, outbox = Tally(), Acknowledged(), Outbox()
    spool = Spool("0" * 32, None, tally)
    sender = Sender(
        NOWHERE, "t", {}, None, [spool], outbox, tally, acknowledged, Flushes(),
        clock_us=lambda: 0, elapsed_s=lambda: 0.0, fsync_interval_s=None,
    )  # fmt: skip
    for sequence, offset in ((1, -1), (2, 40)):
        batch = Batch(spool, 0, Position(1, 0), None)
        batch.marks.append(sequence << 8)
        outbox._in_flight[0] = batch
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(SimpleNamespace(offset=offset))
        sender._answered(sender._producer, batch, answer)
    assert tally.acknowledged == 2
    assert spool.progress.outstanding([2] + [0] * (LANES - 1)) == {}
    assert [acknowledged.offset(spool.source, 0, n) for n in (1, 2)] == [None, 40]


async def test_close_on_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    """Where the folder is gone meanwhile, close() says what is not acknowledged and raises nothing."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path / "spool")
    emitted = [emitter.emit(**call(n)) for n in range(20)]
    spool = emitter._spools[0]
    frames, _ = spool.take()
    spool.progress.settle({frames[0][2]: frames[0][1]})
    spool.settle(Position(1, 10))
    (tmp_path / "spool").rename(tmp_path / "elsewhere")
    left = await emitter.close(0)
    assert sum(left.values()) == len(emitted) - 1
