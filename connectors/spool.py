"""The spool is the queue: one process life's events in a folder of segments, in order, until the broker has them.

`<root>/<source>/` holds `lock` (flock'd by whoever may send from it: when it can be taken, the owner is dead), `00000001.seg` …
and `acked`, the place up to which everything is acknowledged. `<root>/bad/` holds what could not be read.
"""

import fcntl
import logging
import os
import shutil
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tollway.connectors.frame import FRAME_BYTES_MAX, Frame, next_whole, torn, unpack
from tollway.connectors.progress import Progress
from tollway.connectors.segment import SUFFIX, FileSegment, MemorySegment, Segment
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES

SLICE_BYTES = FRAME_BYTES_MAX
"""Read at a time: one frame always fits."""
SEGMENT_BYTES, SEGMENT_EVENTS = 4 << 20, 1 << 20
BAD_FILES_MAX = 1_000
"""Stretches set aside; further ones are only counted."""
LOCK, ACKED, BAD = "lock", "acked", "bad"
_ACKED = struct.Struct("<QQI")

unforked = threading.RLock()
"""Held while a lock is taken and not yet listed: a child forked in between would hold it, and not know."""

log = logging.getLogger("tollway.emitter")


class Position(NamedTuple):
    """A place in a spool: everything before it is read, or acknowledged."""

    segment: int
    at: int


class End(NamedTuple):
    """What a spool held when it was asked: all before the place, which is all up to the sequences."""

    spool: "Spool"
    position: Position
    sequences: tuple[int, ...]


class Spool:
    """Appended to by one thread at a time (the emitter's lock); read, settled and closed by the sender."""

    def __init__(
        self,
        source: str,
        folder: Path | None,
        tally: Tally,
        sizes: tuple[int, int] = (SEGMENT_BYTES, SEGMENT_EVENTS),
        *,
        segments: list[Segment] | None = None,
        lock_fd: int = -1,
    ) -> None:
        """`folder` None = in memory; `sizes` = a segment's bytes and events; `segments` = those of a dead process.

        Raises OSError.
        """
        self.source, self.folder = source, folder
        self.own = segments is None
        self.retired = not self.own
        """Nothing more is appended: once all is sent it can go."""
        self.begun_s = 0.0
        """Of an own one, by the clock that is never set."""
        self._tally, self._lock_fd = tally, lock_fd
        self._segment_bytes, self._segment_events = sizes
        self._lock = threading.Lock()  # the list of segments and the place read up to
        self._appended_bytes = sum(segment.size for segment in segments or ())
        self._freed_bytes = 0
        self._segments: list[Segment] = segments or [self._new_segment(1)]
        self._reading, self._at = self._segments[0], 0
        self._settled = self._saved = self._furthest = Position(self._reading.index, 0)
        self.sequences = [0] * LANES
        """lane → the last sequence that was given."""
        self.progress = Progress()
        self._synced = 0

    @classmethod
    def create(cls, root: Path, source: str, tally: Tally, sizes: tuple[int, int]) -> "Spool":
        """A new folder, locked before it gets its name: no successor ever finds it unlocked. Raises OSError."""
        half_made = root / f".{source}"
        half_made.mkdir(mode=0o700)
        lock_fd = os.open(half_made / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock_fd, b"%d\n" % os.getpid())
            half_made.rename(root / source)
            return cls(source, root / source, tally, sizes, lock_fd=lock_fd)
        except BaseException:
            os.close(lock_fd)
            for folder in (half_made, root / source):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def adopt(cls, folder: Path, tally: Tally) -> "Spool | None":
        """The spool of a dead process, to be sent as it is; None while its owner, or another successor, lives. Raises OSError."""
        try:
            lock_fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with suppress(OSError):  # a removal that was cut short
                folder.rmdir()
            return None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else another successor has sent and removed it between our open and our lock.
            if not os.path.samestat(os.fstat(lock_fd), os.stat(folder / LOCK)):
                raise BlockingIOError
            indices = sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal())
            segments: list[Segment] = [FileSegment(folder, index, new=False) for index in indices]
            if not segments:
                segments = [FileSegment(folder, 1, new=True)]
                segments[0].seal()
            spool = cls(folder.name, folder, tally, segments=segments, lock_fd=lock_fd)
            spool._resume()
            return spool
        except (BlockingIOError, FileNotFoundError):
            os.close(lock_fd)
            return None
        except BaseException:
            os.close(lock_fd)
            raise

    @property
    def size_bytes(self) -> int:
        """On disk (or in memory), acknowledged ones not yet deleted included."""
        return self._appended_bytes - self._freed_bytes

    @property
    def waiting_bytes(self) -> int:
        """Those behind the place up to which all is acknowledged."""
        with self._lock:
            done, at = self._settled
            return sum(s.size - (at if s.index == done else 0) for s in self._segments if s.index >= done)

    @property
    def position(self) -> Position:
        """Everything before it has been taken."""
        return Position(self._reading.index, self._at)

    @property
    def unread(self) -> bool:
        """Whether `take` has more."""
        return self._at < self._reading.size or self._reading is not self._segments[-1]

    def append(self, frame: bytes, lane: int) -> None:
        """Whole or not at all. Raises OSError."""
        tail = self._segments[-1]
        if tail.sealed or tail.size + len(frame) > self._segment_bytes or tail.events >= self._segment_events:
            tail = self._roll()
        tail.append(frame, lane)
        self._appended_bytes += len(frame)

    def _roll(self) -> Segment:
        tail = self._segments[-1]
        new = self._new_segment(tail.index + 1)
        with self._lock:
            self._segments.append(new)
        tail.seal()
        return new

    def make_room(self) -> None:
        """After an append that the disk refused: what is acknowledged gives up its place. Under the emitter's lock."""
        if self._segments[-1].size and self.all_settled:
            with suppress(OSError):
                self._roll()  # the sender deletes the segment behind it

    def _new_segment(self, index: int) -> Segment:
        return MemorySegment(index) if self.folder is None else FileSegment(self.folder, index, new=True)

    def take(self) -> tuple[list[Frame], Position]:
        """The next frames in order, some 64 KiB of them, and where they begin; none when all is read."""
        while True:
            with self._lock:
                while self._at >= self._reading.size:  # the next one may be empty still
                    if not self._next_segment():
                        return [], self.position
                segment, at = self._reading, self._at
                again = self.position < self._furthest
                self._furthest = max(self._furthest, Position(segment.index, at + 1))  # no longer to be dropped
            try:
                frames, used = unpack(segment.read(at, SLICE_BYTES))
                used = used or self._skip(segment, at, again)
            except OSError:
                self._set_aside(segment, at, b"", again)
                frames, used = [], segment.size - at
            self._at = at + used
            self._furthest = max(self._furthest, self.position)
            if again:
                done = self.progress.done
                frames = [frame for frame in frames if not done(frame[2], frame[1])]
            if frames:
                return frames, Position(segment.index, at)

    def rewind(self) -> None:
        """Take again what is not settled: its producer failed."""
        with self._lock:
            self._reading = next(s for s in self._segments if s.index >= self._settled.segment)
            self._at = self._settled.at if self._reading.index == self._settled.segment else 0

    def _next_segment(self) -> bool:
        """On to the segment behind the one that is read; False where there is none. Under the lock."""
        if self._reading is self._segments[-1]:
            return False
        if self._reading.broken:
            if self.own:
                self._tally.lose(self._lost(self._reading))
            self._reading.broken = False
        self._reading = next(segment for segment in self._segments if segment.index > self._reading.index)
        self._at = 0
        return True

    def _lost(self, segment: Segment) -> int:
        """Frames that were appended to a segment and cannot be read any more: its disk is broken."""
        lost, at = segment.events, 0
        with suppress(OSError):
            data = segment.read(0, segment.size)
            while at < len(data):
                frames, at = unpack(data, at)
                lost -= len(frames)
                at = next_whole(data, at + 1)
        return lost

    def _skip(self, segment: Segment, at: int, again: bool) -> int:
        """Bytes from `at` to the next whole frame: a write that a crash cut short is dropped, all else set aside."""
        rest = segment.read(at, segment.size)
        whole = next_whole(rest, 1)
        if not self.own and whole == len(rest) and segment is self._segments[-1] and torn(rest):
            self._tally.torn += not again
        else:
            self._set_aside(segment, at, rest[:whole], again)
        return whole if whole < len(rest) else segment.size - at

    def _set_aside(self, segment: Segment, at: int, data: bytes, again: bool) -> None:
        """Keep bytes that are no frame (the whole segment, where none can be read) in the folder `bad`, and count them."""
        if again:
            return
        self._tally.corrupt += 1
        segment.broken = True
        if self.folder is None or not isinstance(segment, FileSegment):
            return
        bad = self.folder.parent / BAD
        with suppress(OSError):  # a full or broken disk: the count stands
            bad.mkdir(mode=0o700, exist_ok=True)
            if len(os.listdir(bad)) < BAD_FILES_MAX:
                target = bad / f"{self.source}-{segment.index:08d}-{at}.bad"
                target.write_bytes(data) if data else os.link(segment.path, target)

    def drop_oldest(self) -> bool:
        """Give up the oldest segment of which nothing was taken yet; False where there is none. Under the emitter's lock."""
        tail = self._segments[-1]
        if tail.events and self._untouched(tail) and not any(map(self._untouched, self._segments[:-1])):
            try:
                self._roll()
            except OSError:
                return False
        with self._lock:
            victim = next(filter(self._untouched, self._segments[:-1]), None)
            if victim is None:
                return False
            try:
                victim.delete()
            except OSError:
                return False
            self.progress.drop((s.by_lane for s in self._segments if s.index < victim.index), victim.by_lane)
            self._gone(victim)
            if victim is self._reading:
                self._reading, self._at = self._segments[0], 0
        self._tally.drop(victim.events)
        return True

    def _gone(self, segment: Segment) -> None:
        """Its file is deleted. Under the lock."""
        self._segments = [s for s in self._segments if s is not segment]
        self._freed_bytes += segment.size
        self.progress.delete(segment.by_lane)

    def _untouched(self, segment: Segment) -> bool:
        return Position(segment.index, 0) >= self._furthest

    def settle(self, position: Position) -> None:
        """Everything before `position` is acknowledged: segments before it are deleted.

        Raises OSError where one cannot be: the next call tries again.
        """
        with self._lock:
            self._settled = position
            done = [s for s in self._segments[:-1] if s.index < position.segment and s is not self._reading]
        for segment in done:
            segment.delete()
            with self._lock:
                self._gone(segment)

    @property
    def end(self) -> End:
        """The place and the sequences up to which was appended. Under the emitter's lock."""
        tail = self._segments[-1]
        return End(self, Position(tail.index, tail.size), tuple(self.sequences))

    def settled_to(self, position: Position) -> bool:
        """Whether everything before a place is acknowledged or given up."""
        return self._settled >= position

    @property
    def all_settled(self) -> bool:
        return not self.unread and self._settled == self.position

    def save_position(self) -> None:
        """So that a successor need not send again what is acknowledged. Raises OSError."""
        if self.folder is None or self._settled == self._saved:
            return
        place = _ACKED.pack(*self._settled, crc32(struct.pack("<QQ", *self._settled)))
        fd = os.open(self.folder / ACKED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, place, 0)
        finally:
            os.close(fd)
        self._saved = self._settled

    def _resume(self) -> None:
        """Go to the place up to which the dead process knew everything acknowledged; without one, to the beginning."""
        assert self.folder is not None
        try:
            segment, at, checksum = _ACKED.unpack((self.folder / ACKED).read_bytes())
        except (FileNotFoundError, struct.error):
            return
        found = next((s for s in self._segments if s.index >= segment), None)
        if found is None or checksum != crc32(struct.pack("<QQ", segment, at)):
            return
        self._reading, self._at = found, min(at, found.size) if found.index == segment else 0
        self._furthest = self.position
        with suppress(OSError):  # the sender tries again
            self.settle(self.position)

    def sync(self) -> None:
        """What was appended, to the disk. Raises OSError."""
        segments = list(self._segments)
        for segment in segments:
            segment.sync()
        if self.folder is not None and segments[-1].index > self._synced:
            for folder in (self.folder, self.folder.parent):
                fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            self._synced = segments[-1].index

    def close(self) -> None:
        """Leave it to a successor; remove it where nothing is left in it. Raises OSError, and is closed all the same."""
        try:
            if self.all_settled:
                self.remove()
            else:
                self.save_position()
        finally:
            self.abandon()

    def remove(self) -> None:
        """All is settled: it goes. Raises OSError where it cannot; it may be tried again, and a successor can take it."""
        for segment in self._segments:
            segment.delete()
        if self.folder is not None:
            (self.folder / ACKED).unlink(missing_ok=True)
            # The last but one: a folder without a lock is nobody's, and what is in it would never be sent.
            (self.folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # a successor was quicker, or will do it; or somebody's own file is in it
                self.folder.rmdir()
        self.abandon()

    def abandon(self) -> None:
        """Close the files and nothing else: a forked child must not hold its parent's lock."""
        for segment in self._segments:
            segment.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
