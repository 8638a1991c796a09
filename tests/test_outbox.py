"""The outbox keeps each lane's order, one batch in flight a partition, and knows what is settled."""

from pathlib import Path

from aiokafka.producer.message_accumulator import BatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from tollway.connectors.frame import pack
from tollway.connectors.outbox import HELD_BYTES_MAX, STUCK_S, Batch, Outbox
from tollway.connectors.spool import Spool
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES

BATCH_BYTES = 2_000


def builder() -> BatchBuilder:
    return BatchBuilder(BATCH_BYTES, 0)


def spool_of(lanes: list[int], value: bytes = bytes(100)) -> Spool:
    """A spool in memory with one event for each lane named, sequences as the emitter gives them."""
    spool, sequences = Spool("0" * 32, None, Tally(), (5_000, 1 << 30)), [0] * LANES
    for lane in lanes:
        sequences[lane] += 1
        spool.append(pack(1, sequences[lane], lane, b"key", value), lane)
    return spool


def put_all(outbox: Outbox, spool: Spool) -> None:
    while (taken := spool.take())[0]:
        outbox.put(spool, *taken)


@given(st.lists(st.integers(0, 255), max_size=300), st.sampled_from([1, 4, 16]), st.randoms())
def test_order_and_settlement(lanes: list[int], partitions: int, random: object) -> None:
    """In whatever order batches are answered: lanes stay in order, nothing is missing, and a rewind brings just what was not."""
    spool, outbox = spool_of(lanes), Outbox()
    outbox.open(partitions, builder)
    put_all(outbox, spool)
    in_flight: list[Batch] = []
    done: list[int] = []
    answers = random.randrange(40)  # type: ignore[attr-defined]
    while outbox.sendable or in_flight:
        in_flight += outbox.to_send(0.0)
        assert len({batch.partition for batch in in_flight}) == len(in_flight)
        if not answers:
            break
        batch = in_flight.pop(random.randrange(len(in_flight)))  # type: ignore[attr-defined]
        assert {mark % LANES % partitions for mark in batch.marks} == {batch.partition}
        done += batch.marks
        outbox.done(batch)
        spool.settle(outbox.settled(spool))
        answers -= 1
    outbox.open(partitions, builder)
    spool.rewind()
    again: list[int] = []
    while (taken := spool.take())[0]:
        again += [sequence * LANES + lane for _, sequence, lane, _, _ in taken[0]]
    for lane in set(lanes):
        of_lane = [mark // LANES for mark in done + again if mark % LANES == lane]
        assert of_lane == [*range(1, lanes.count(lane) + 1)]


def test_batches_are_filled_and_full_ones_go_first() -> None:
    """A batch takes what fits; while more is being taken only full ones are sent."""
    spool, outbox = spool_of([3] * 50), Outbox()
    outbox.open(1, builder)
    put_all(outbox, spool)
    full = list(outbox.to_send(0.0, full_only=True))
    assert [len(batch.marks) for batch in full] == [len(full[0].marks)]
    assert len(full[0].marks) > 10
    sizes = [len(full[0].marks)]
    outbox.done(full[0])
    while batches := list(outbox.to_send(0.0)):
        sizes.append(len(batches[0].marks))
        outbox.done(batches[0])
    assert sum(sizes) == 50
    assert len(set(sizes[:-1])) == 1


def test_one_batch_in_flight() -> None:
    """A partition's next batch waits for the answer to the one before; what is sent takes no more events."""
    spool, outbox = spool_of([3] * 100), Outbox()
    outbox.open(2, builder)
    put_all(outbox, spool)
    (first,) = outbox.to_send(0.0)
    assert list(outbox.to_send(0.0)) == []
    assert not outbox.sendable
    outbox.done(first)
    assert outbox.sendable
    while batches := list(outbox.to_send(0.0)):
        (last,) = batches
        marks = len(last.marks)
        outbox.put(spool, [(1, 101, 5, b"key", b"value")] if last.marks[-1] // LANES == 100 else [], spool.position)
        assert len(last.marks) == marks
        outbox.done(last)


def test_a_stuck_partition_does_not_stop_the_others() -> None:
    """What a partition without an answer holds counts only against the larger limit, which does stop everything."""
    outbox = Outbox(ahead_bytes=10_000)
    outbox.open(2, builder)
    outbox.put(spool := spool_of([]), [(1, n, 1, b"key", bytes(1000)) for n in range(1, 31)], spool.position)
    assert not outbox.has_room(0.0)
    list(outbox.to_send(0.0))
    assert not outbox.has_room(STUCK_S / 2)
    assert outbox.has_room(STUCK_S * 2)
    for n in range(31, HELD_BYTES_MAX // 1000 + 31):
        outbox.put(spool, [(1, n, 1, b"key", bytes(1000))], spool.position)
    assert not outbox.has_room(STUCK_S * 2)


def test_events_may_be_the_narrower_limit() -> None:
    """With a limit in events a few small ones fill the outbox."""
    outbox = Outbox(ahead_events=10)
    outbox.open(2, builder)
    outbox.put(spool := spool_of([]), [(1, n, 1, b"k", b"v") for n in range(1, 10)], spool.position)
    assert outbox.has_room(0.0)
    outbox.put(spool, [(1, 10, 1, b"k", b"v")], spool.position)
    assert not outbox.has_room(0.0)


def test_two_spools_keep_apart(tmp_path: Path) -> None:
    """Batches hold events of one spool; each spool's settled place is its own."""
    first, second, outbox = spool_of([1] * 3), spool_of([1] * 4), Outbox()
    outbox.open(1, builder)
    put_all(outbox, first)
    put_all(outbox, second)
    (batch,) = outbox.to_send(0.0)
    assert (batch.spool, len(batch.marks)) == (first, 3)
    outbox.done(batch)
    assert outbox.settled(first) == first.position
    assert outbox.settled(second) < second.position
