"""The spool: nothing appended is lost, nothing torn is sent, what is broken is kept and counted."""

import multiprocessing
import os
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollway.connectors import spool as spools
from tollway.connectors.adoption import adopt_dead
from tollway.connectors.frame import FRAME_BYTES_MAX, MAGIC, Frame, next_whole, pack, torn, unpack
from tollway.connectors.spool import Position, Spool
from tollway.connectors.tally import Tally
from tollway.schemas.ids import uuid7_hex

SOURCE = uuid7_hex(1_700_000_000_000, 7)
FRAMES = st.builds(
    lambda at, sequence, lane, key, value: (at, sequence, lane, key, value),
    st.integers(0, 2**48),
    st.integers(1, 2**62),
    st.integers(0, 255),
    st.binary(max_size=128),
    st.binary(max_size=600) | st.just(MAGIC * 40),
)


def made(root: Path, tally: Tally | None = None, source: str = SOURCE, segment_bytes: int = 1_000) -> Spool:
    return Spool.create(root, source, tally or Tally(), (segment_bytes, 1 << 30))


def frame(n: int) -> Frame:
    return (1_700_000_000_000 + n, n // 256 + 1, n % 256, f"acct-{n}".encode(), bytes([n % 256]) * (n % 300))


def append(spool: Spool, tally: Tally, numbers: range) -> None:
    for n in numbers:
        spool.append(pack(*frame(n)), n % 256)
        tally.emitted += 1


def drain(spool: Spool) -> list[Frame]:
    """All there is, settled up to the place reached, as the sender does."""
    frames: list[Frame] = []
    while True:
        taken, _ = spool.take()
        frames += taken
        spool.progress.settle({lane: sequence for _, sequence, lane, _, _ in taken})
        spool.settle(spool.position)
        if not taken:
            return frames


def die(spool: Spool) -> None:
    """What is left when a process is gone: the files."""
    spool.abandon()


@given(st.lists(FRAMES, max_size=8))
def test_frames_read_back(frames: list[Frame]) -> None:
    """Packed frames unpack to themselves, whatever is in them."""
    data = b"".join(pack(*frame) for frame in frames)
    assert unpack(data) == (frames, len(data))


@given(st.lists(FRAMES, min_size=1, max_size=4), st.data())
def test_a_flipped_bit_breaks_one_frame(frames: list[Frame], data: st.DataObject) -> None:
    """Whichever bit flips, its frame is not read, all before it are, and the next whole one is found behind it."""
    packed = [pack(*frame) for frame in frames]
    whole = b"".join(packed)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    ends = [sum(map(len, packed[: n + 1])) for n in range(len(packed))]
    hit = next(n for n, end in enumerate(ends) if bit // 8 < end)
    before, at = unpack(bytes(broken))
    assert before == frames[:hit]
    assert at == ends[hit] - len(packed[hit])
    assert unpack(bytes(broken), next_whole(bytes(broken), at + 1))[0] == frames[hit + 1 :]


@given(FRAMES, st.data())
def test_torn_is_a_beginning(frame: Frame, data: st.DataObject) -> None:
    """Every proper beginning of a frame is torn; a whole one is not, nor are other bytes."""
    packed = pack(*frame)
    assert torn(packed[: data.draw(st.integers(1, len(packed) - 1))])
    assert not torn(packed)
    assert not torn(bytes(40))


def test_the_largest_frame_fits_a_slice() -> None:
    """A frame of the largest key and value is no longer than what is read at a time."""
    assert len(pack(2**64 - 1, 2**64 - 1, 255, b"k" * 255, bytes(65_536))) == FRAME_BYTES_MAX == spools.SLICE_BYTES


def test_order_over_segments(tmp_path: Path) -> None:
    """Frames come back in their order across segments, and settled segments are deleted."""
    tally = Tally()
    spool = made(tmp_path, tally)
    append(spool, tally, range(500))
    assert len(list(spool.folder.glob("*.seg"))) > 20  # type: ignore[union-attr]
    assert drain(spool) == [frame(n) for n in range(500)]
    assert len(list(spool.folder.glob("*.seg"))) == 1  # type: ignore[union-attr]
    assert spool.waiting_bytes == 0
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_new_segment_is_no_damage(tmp_path: Path) -> None:
    """Read at the moment between a new segment's making and its first frame, a spool has nothing, and nothing wrong."""
    tally = Tally()
    spool = made(tmp_path, tally)
    append(spool, tally, range(200, 203))
    spool._roll()
    assert drain(spool) == [frame(n) for n in range(200, 203)]
    append(spool, tally, range(203, 205))
    assert drain(spool) == [frame(203), frame(204)]
    assert (tally.corrupt, tally.lost, list(tmp_path.glob("bad"))) == (0, 0, [])


@pytest.mark.parametrize("in_memory", [True, False])
def test_appending_and_taking_at_once(tmp_path: Path, in_memory: bool) -> None:
    """One thread appends over hundreds of segments while another takes and settles: every frame comes, once, in order."""
    tally, count = Tally(), 10_000 if in_memory else 4_000
    spool = Spool(SOURCE, None, tally, (1_000, 1 << 30)) if in_memory else made(tmp_path, tally)
    appender = threading.Thread(target=append, args=(spool, tally, range(count)))
    appender.start()
    found: list[Frame] = []
    while appender.is_alive() or spool.unread:
        found += drain(spool)
    assert found == [frame(n) for n in range(count)]
    assert (tally.corrupt, tally.lost) == (0, 0)
    spool.close()


def test_dropping_and_taking_at_once(tmp_path: Path) -> None:
    """While one thread appends and gives up the oldest, another takes: what comes is in order, and what does not is counted."""
    tally, count = Tally(), 6_000
    spool = made(tmp_path, tally)

    def append_and_drop() -> None:
        for n in range(0, count, 50):
            append(spool, tally, range(n, n + 50))
            while spool.size_bytes > 20_000 and spool.drop_oldest():
                pass

    appender = threading.Thread(target=append_and_drop)
    appender.start()
    found: list[Frame] = []
    while appender.is_alive() or spool.unread:
        found += drain(spool)
    expected = map(frame, range(count))
    assert all(one in expected for one in found)  # a subsequence
    assert len(found) + tally.dropped == count
    assert (tally.corrupt, tally.lost) == (0, 0)
    spool.close()


def test_memory_behaves_the_same(tmp_path: Path) -> None:
    """A spool in memory gives the same frames and frees what is settled."""
    tally = Tally()
    spool = Spool(SOURCE, None, tally, (1_000, 1 << 30))
    append(spool, tally, range(500))
    assert drain(spool) == [frame(n) for n in range(500)]
    assert spool.size_bytes <= 1_000
    spool.close()


def test_successor_takes_what_is_left(tmp_path: Path) -> None:
    """A dead process's spool is adopted with its source, from the place it knew acknowledged; a living one's is not."""
    tally = Tally()
    spool = made(tmp_path, tally)
    append(spool, tally, range(300))
    assert Spool.adopt(tmp_path / SOURCE, tally) is None
    first, _ = spool.take()
    spool.settle(spool.position)
    append(spool, tally, range(300, 400))
    spool.take()  # in flight when it dies
    spool.save_position()
    die(spool)
    successor = Spool.adopt(tmp_path / SOURCE, Tally())
    assert successor is not None
    assert successor.source == SOURCE
    assert drain(successor) == [frame(n) for n in range(len(first), 400)]
    successor.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", ["nothing", "half", "rubbish"])
def test_a_lost_position_means_all_again(tmp_path: Path, keep: str) -> None:
    """Where the note of what is acknowledged is missing or broken, a successor begins at the beginning."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=1 << 20)
    append(spool, tally, range(300))
    spool.take()
    spool.settle(spool.position)
    spool.save_position()
    die(spool)
    note = tmp_path / SOURCE / "acked"
    note.write_bytes({"nothing": b"", "half": note.read_bytes()[:11], "rubbish": struct.pack("<QQI", 1, 7, 7)}[keep])
    successor = Spool.adopt(tmp_path / SOURCE, Tally())
    assert successor is not None
    assert drain(successor) == [frame(n) for n in range(300)]


def test_rewind_takes_again_what_is_not_settled(tmp_path: Path) -> None:
    """After a rewind come exactly the frames whose sequences were not settled, in order, whatever was settled out of order."""
    tally = Tally()
    spool = made(tmp_path, tally)
    append(spool, tally, range(1000))
    begins: dict[int, Position] = {}
    taken = 0
    while (slice_ := spool.take())[0]:
        begins[taken] = slice_[1]
        taken += len(slice_[0])
    settled = {n % 256: frame(n)[1] for n in range(600) if n % 2 == 0 or n < 100}
    spool.progress.settle(settled)
    spool.settle(begins[max(n for n in begins if n <= 101)])  # 101 is the first that is not settled
    spool.rewind()
    assert drain(spool) == [f for f in map(frame, range(1000)) if f[1] > settled.get(f[2], 0)]
    append(spool, tally, range(1000, 1100))
    assert drain(spool) == [frame(n) for n in range(1000, 1100)]


def test_torn_end_is_dropped(tmp_path: Path) -> None:
    """A last frame that was cut anywhere is dropped and counted as torn: emit() had not returned. Nothing is set aside."""
    for cut in (1, 5, 20, 60):
        tally, source = Tally(), uuid7_hex(cut, 7)
        spool = made(tmp_path, tally, source, segment_bytes=1 << 20)
        append(spool, tally, range(200, 210))
        die(spool)
        path = tmp_path / source / "00000001.seg"
        os.truncate(path, path.stat().st_size - cut)
        successor = Spool.adopt(tmp_path / source, tally := Tally())
        assert successor is not None
        assert drain(successor) == [frame(n) for n in range(200, 209)]
        assert (tally.torn, tally.corrupt) == (1, 0)
        successor.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("damage", ["flip", "zeros", "length"])
def test_broken_middle_is_set_aside(tmp_path: Path, damage: str, alive: bool) -> None:
    """Bytes that are no frame in the middle of a segment are kept in a .bad file and counted; all other frames come."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=1 << 20)
    append(spool, tally, range(200, 300))
    path = tmp_path / SOURCE / "00000001.seg"
    data = bytearray(path.read_bytes())
    start = sum(len(pack(*frame(n))) for n in range(200, 250))
    length = len(pack(*frame(250)))
    damaged = {
        "flip": (start + 40, b"\xff\xfe"),
        "zeros": (start, bytes(length)),
        "length": (start + 2, b"\xff\xff\xff"),
    }
    at, patch = damaged[damage]
    data[at : at + len(patch)] = patch
    path.write_bytes(data)
    if not alive:
        die(spool)
        adopted = Spool.adopt(tmp_path / SOURCE, tally)
        assert adopted is not None
        spool = adopted
    assert drain(spool) == [frame(n) for n in range(200, 300) if n != 250]
    assert (tally.torn, tally.corrupt) == (0, 1)
    (bad,) = (tmp_path / "bad").iterdir()
    assert bad.read_bytes() == bytes(data[start : start + length])
    if alive:
        spool._roll()
        append(spool, tally, range(300, 301))
        assert drain(spool) == [frame(300)]
        assert tally.lost == 1
        assert tally.waiting == 100
    spool.close()


def test_a_vanished_segment_is_counted_and_passed(tmp_path: Path) -> None:
    """A segment that cannot be read at all is counted, its own events as lost, and the rest is sent."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=5_000)
    append(spool, tally, range(200, 260))
    first = (tmp_path / SOURCE / "00000001.seg").stat().st_size
    (tmp_path / SOURCE / "00000001.seg").unlink()
    rest = drain(spool)
    assert rest == [frame(n) for n in range(260 - len(rest), 260)]
    assert sum(len(pack(*frame(n))) for n in range(200, 260 - len(rest))) == first
    assert (tally.corrupt, tally.lost) == (1, 60 - len(rest))


def test_damage_in_anothers_spool_is_none_of_our_losses(tmp_path: Path) -> None:
    """Broken bytes in an adopted spool are set aside and counted; `lost` is of our own events alone. Foreign files stay away."""
    spool = made(tmp_path, made_tally := Tally())
    append(spool, made_tally, range(200, 260))
    die(spool)
    path = tmp_path / SOURCE / "00000001.seg"
    path.write_bytes(b"\0" * 50 + path.read_bytes())
    (tmp_path / SOURCE / "notes.seg").touch()
    successor = Spool.adopt(tmp_path / SOURCE, tally := Tally())
    assert successor is not None
    assert drain(successor) == [frame(n) for n in range(200, 260)]
    assert (tally.corrupt, tally.lost, tally.waiting) == (1, 0, 0)
    successor.close()
    assert [path.name for path in (tmp_path / SOURCE).iterdir()] == ["notes.seg"]


def test_what_cannot_be_deleted_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused unlink drops nothing and forgets nothing: what is acknowledged goes at the next try, with the folder."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=5_000)
    append(spool, tally, range(200, 300))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        assert not spool.drop_oldest()
        with pytest.raises(PermissionError):
            drain(spool)
    assert tally.dropped == 0
    assert drain(spool)[-1] == frame(299)
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_no_room_to_drop(tmp_path: Path) -> None:
    """Where the disk takes no new segment nothing is dropped to make room in the last one, and nothing is raised."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=1 << 20)
    append(spool, tally, range(200, 210))
    (tmp_path / SOURCE).rename(tmp_path / "elsewhere")
    assert not spool.drop_oldest()
    (tmp_path / "elsewhere").rename(tmp_path / SOURCE)
    assert drain(spool) == [frame(n) for n in range(200, 210)]
    assert tally.dropped == 0


def test_an_own_segment_cut_by_someone_is_a_loss(tmp_path: Path) -> None:
    """A living process's segment that became shorter is counted as corrupt and lost: emit() had returned for what is missing."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=1 << 20)
    append(spool, tally, range(200, 260))
    path = tmp_path / SOURCE / "00000001.seg"
    os.truncate(path, path.stat().st_size - 5)
    assert len(drain(spool)) == 59
    spool._roll()
    append(spool, tally, range(260, 261))
    assert drain(spool) == [frame(260)]
    assert (tally.corrupt, tally.torn, tally.lost) == (1, 0, 1)


def test_drop_oldest_gives_up_what_was_not_taken(tmp_path: Path) -> None:
    """The oldest untouched segment goes first, its events counted by lane; what was taken is never dropped, nor the last."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=5_000)
    append(spool, tally, range(200, 300))
    first, _ = spool.take()
    assert spool.drop_oldest()
    rest = drain(spool)
    dropped = 100 - len(first) - len(rest)
    assert first + rest == [frame(n) for n in (*range(200, 200 + len(first)), *range(200 + len(first) + dropped, 300))]
    assert tally.dropped == dropped > 0
    assert tally.waiting == 100 - dropped
    assert not spool.drop_oldest()


def test_drop_oldest_before_anything_was_taken(tmp_path: Path) -> None:
    """With the broker never reached, dropping begins at the very first event and can go on to the last."""
    tally = Tally()
    spool = made(tmp_path, tally, segment_bytes=5_000)
    append(spool, tally, range(200, 300))
    assert spool.drop_oldest()
    first = 200 + tally.dropped
    assert 200 < first < 300
    spool.rewind()
    while spool.drop_oldest():
        assert tally.dropped <= 100
    append(spool, tally, range(300, 310))
    assert tally.dropped == 100
    assert drain(spool) == [frame(n) for n in range(300, 310)]
    assert tally.waiting == 10
    spool.close()
    assert list(tmp_path.iterdir()) == []


def _hold(root: str, ready: "multiprocessing.connection.Connection") -> None:
    spool = made(Path(root))
    spool.append(pack(*frame(1)), 1)
    ready.send(spool.source)
    ready.recv()  # never comes: it ends by kill -9


def test_a_killed_owner_lets_go(tmp_path: Path) -> None:
    """While its owner lives a spool is nobody else's; once it is killed with -9 exactly one successor gets it."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), there))
    process.start()
    try:
        assert here.poll(30)
        here.recv()
        found: list[Spool] = []
        assert adopt_dead(tmp_path, Tally(), set(), set(), found.append).size_bytes > 0
        assert found == []
    finally:
        process.kill()
        process.join()
    for _ in range(2):
        adopt_dead(tmp_path, Tally(), set(), set(), found.append)
    (spool,) = found
    assert drain(spool) == [frame(1)]
    spool.close()
    assert adopt_dead(tmp_path, Tally(), set(), set(), found.append).size_bytes == 0
    assert len(found) == 1


def test_half_made_and_half_removed_folders(tmp_path: Path) -> None:
    """A folder whose making was cut short goes after an hour, one whose removal was goes at once, other folders stay."""
    half_made, half_removed, other = tmp_path / f".{SOURCE}", tmp_path / uuid7_hex(1, 1), tmp_path / "notes"
    for folder in (half_made, half_removed, other):
        folder.mkdir()
    assert adopt_dead(tmp_path, Tally(), set(), set(), print) == (0, False)
    assert {path.name for path in tmp_path.iterdir()} == {half_made.name, other.name}
    os.utime(half_made, (1, 1))
    assert adopt_dead(tmp_path, Tally(), set(), set(), print) == (0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_sync_reaches_every_segment(tmp_path: Path) -> None:
    """Syncing works while segments come and go, and again after them."""
    tally = Tally()
    spool = made(tmp_path, tally)
    append(spool, tally, range(200, 300))
    spool.sync()
    append(spool, tally, range(300, 400))
    drain(spool)
    spool.sync()
    spool.close()
