"""A segment: a stretch of frames that is appended to, read and deleted as a whole; in a file, or in memory."""

import os
from array import array
from contextlib import suppress
from pathlib import Path

from tollway.schemas.lane import LANES

SUFFIX = ".seg"


class FileSegment:
    """Frames in `<index>.seg`. An append is one write(2): it survives the death of the process, not that of the machine."""

    def __init__(self, folder: Path, index: int, *, new: bool) -> None:
        """Create it for appending (`new`), or open what a dead process left, for reading. Raises OSError."""
        self.index = index
        self.path = folder / f"{index:08d}{SUFFIX}"
        self.by_lane = array("I", bytes(4 * LANES))
        """Frames a lane that this process appended."""
        self.events = 0
        self.broken = False
        self.sealed = not new
        self._synced = 0
        self._reader = -1
        self._writer = -1
        if new:
            self._writer = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0 if new else self.path.stat().st_size

    def append(self, frame: bytes, lane: int) -> None:
        """Append whole or not at all. Raises OSError (disk full, limit, disk gone)."""
        written = -1
        try:
            written = os.write(self._writer, frame)
            if written != len(frame):
                raise OSError(f"{written} of {len(frame)} bytes were written")
        except OSError:
            if written > 0:
                self._cut()
            raise
        # Asked, not added up: what a signal handler raises in here must not make size and file disagree for good.
        self.size = os.lseek(self._writer, 0, os.SEEK_CUR)
        self.events += 1
        self.by_lane[lane] += 1

    def _cut(self) -> None:
        """Take back a write that was cut short, or end the segment here: its reader stops at `size`."""
        try:
            os.ftruncate(self._writer, self.size)
        except OSError:
            self.seal()

    def seal(self) -> None:
        """No more is appended."""
        self.sealed = True
        fd, self._writer = self._writer, -1
        _close(fd)

    def read(self, at: int, size: int) -> bytes:
        """Raises OSError."""
        if self._reader < 0:
            self._reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._reader, min(size, self.size - at), at)

    def sync(self) -> None:
        """To the disk, what was appended since the last time. Raises OSError."""
        size = self.size
        if size > self._synced:
            with suppress(FileNotFoundError):  # acknowledged and deleted meanwhile
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
                finally:
                    os.close(fd)
            self._synced = size

    def close(self) -> None:
        """Leave the file as it is."""
        fds, self._writer, self._reader = (self._writer, self._reader), -1, -1
        for fd in fds:
            _close(fd)

    def delete(self) -> None:
        """Raises OSError."""
        self.close()
        self.path.unlink(missing_ok=True)


class MemorySegment:
    """The same in memory: lost with the process."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = self.events = 0
        self.sealed = self.broken = False
        self.by_lane = array("I", bytes(4 * LANES))
        self._data = bytearray()

    def append(self, frame: bytes, lane: int) -> None:
        self._data += frame
        self.size += len(frame)
        self.events += 1
        self.by_lane[lane] += 1

    def seal(self) -> None:
        self.sealed = True

    def read(self, at: int, size: int) -> bytes:
        return bytes(self._data[at : min(at + size, self.size)])

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def delete(self) -> None:
        self._data = bytearray()


Segment = FileSegment | MemorySegment


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
