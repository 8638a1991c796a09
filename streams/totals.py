"""Quota state as flat buffers: scopes and their totals by slot, one table a (window, start), dropped whole when it closes."""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tollway.schemas.command import SCOPE_KINDS
from tollway.schemas.lane import lane
from tollway.streams.policy import KIND_CODES
from tollway.streams.windows import end_s

Ints = npt.NDArray[np.int64]

SEGMENT = 16_384
"""Keys are stored in segments of this many; a full one is compressed once and kept compressed."""
METER_BITS = 16
METERS_MAX = 1 << METER_BITS
METER_MASK = METERS_MAX - 1
SCOPES_MAX = 100_000
"""Live scopes of one account; further ones are counted together in `other~`."""
OTHER = "other~"
TOTAL_MAX = 2**63 - 1
"""Where a total stops: above every possible limit, so that nothing more passes the gate on it."""

OTHER_CODE = len(SCOPE_KINDS)


def packed(data: bytes) -> bytes:
    """zstd, level 1: half a gigabyte a second, and equal bytes for equal data."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def unpacked(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def room(array: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """The array, or a copy with room for n items, doubling; what is new is zero."""
    if n <= len(array):
        return array
    wider = np.zeros(max(n, 2 * len(array)), array.dtype)
    wider[: len(array)] = array
    return wider


class Scopes:
    """`<account>~<scope>` ⇄ number. A number is free again when no total names it; the lowest free one is given out first."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.names: list[str] = []
        self.lanes = np.zeros(64, np.uint8)
        self.kinds = np.zeros(64, np.uint8)
        self.live: dict[str, int] = {}
        """account → scopes that have totals."""
        self._refs = np.zeros(64, np.int32)
        self._free: list[int] = []
        self._sealed: dict[int, bytes] = {}

    def add(self, named: list[tuple[str, str]]) -> list[int]:
        """Numbers of (account, scope) pairs that are not known yet, in this order."""
        numbers = [self._free.pop() for _ in range(min(len(self._free), len(named)))]
        names = [f"{account}~{scope}" for account, scope in named]
        for number, name in zip(numbers, names, strict=False):
            self.names[number] = name
            self._sealed.pop(number // SEGMENT, None)
        first = len(self.names)
        self.names += names[len(numbers) :]
        n = len(self.names)
        numbers += range(first, n)
        self.ids.update(zip(names, numbers, strict=True))
        self.lanes, self.kinds, self._refs = room(self.lanes, n), room(self.kinds, n), room(self._refs, n)
        self.lanes[numbers] = [lane(account) for account, _ in named]
        self.kinds[numbers] = [KIND_CODES.get(scope.partition(":")[0], OTHER_CODE) for _, scope in named]
        for account, _ in named:
            self.live[account] = self.live.get(account, 0) + 1
        return numbers

    def refer(self, ids: Ints) -> None:
        """Each of these has one total more."""
        np.add.at(self._refs, ids, 1)

    def release(self, ids: Ints) -> list[str]:
        """Each of these has one total less. Returns the accounts that have room for scopes again."""
        np.subtract.at(self._refs, ids, 1)
        reopened = []
        gone = np.unique(ids[self._refs[ids] == 0]).tolist()
        for number in gone:
            name = self.names[number]
            account = name[: name.index("~")]
            self.names[number] = ""
            self._sealed.pop(number // SEGMENT, None)
            del self.ids[name]
            self.live[account] -= 1
            if self.live[account] == SCOPES_MAX - 1:
                reopened.append(account)
            if not self.live[account]:
                del self.live[account]
        self._free = sorted([*self._free, *gone], reverse=True) if gone else self._free
        return reopened

    def full(self, account: str) -> bool:
        """Whether new scopes of this account go to `other~`."""
        return self.live.get(account, 0) >= SCOPES_MAX

    def dump(self) -> list[bytes]:
        """Compressed segments of names."""
        whole = len(self.names) // SEGMENT
        for segment in range(whole):
            if segment not in self._sealed:
                self._sealed[segment] = self._segment(segment)
        segments = [self._sealed[segment] for segment in range(whole)]
        return [*segments, self._segment(whole)] if len(self.names) > whole * SEGMENT else segments

    def _segment(self, number: int) -> bytes:
        return packed("\n".join(self.names[number * SEGMENT : (number + 1) * SEGMENT]).encode())

    @classmethod
    def load(cls, segments: list[bytes]) -> "Scopes":
        """The inverse of `dump`; the tables then `refer`."""
        scopes = cls()
        for data in segments:
            scopes.names += unpacked(data).decode().split("\n")
        scopes.ids = {name: number for number, name in enumerate(scopes.names) if name}
        scopes._free = sorted((number for number, name in enumerate(scopes.names) if not name), reverse=True)
        n = len(scopes.names)
        scopes.lanes, scopes.kinds = np.zeros(max(n, 64), np.uint8), np.zeros(max(n, 64), np.uint8)
        scopes._refs = np.zeros(max(n, 64), np.int32)
        lanes, kinds = bytearray(n), bytearray(n)
        for name, number in scopes.ids.items():
            account, _, scope = name.partition("~")
            lanes[number] = lane(account)
            kinds[number] = KIND_CODES.get(scope.partition(":")[0], OTHER_CODE)
            scopes.live[account] = scopes.live.get(account, 0) + 1
        scopes.lanes[:n], scopes.kinds[:n] = np.frombuffer(lanes, np.uint8), np.frombuffer(kinds, np.uint8)
        for segment in range(n // SEGMENT):
            scopes._sealed[segment] = segments[segment]
        return scopes


class Table:
    """Totals of one window. Key = scope number << 16 | meter number; slots in order of first appearance in the log."""

    def __init__(self, window: str, start: int) -> None:
        self.window, self.start, self.end = window, start, end_s(window, start)
        self.n = 0
        self.keys = np.zeros(16, np.int64)
        self.totals = np.zeros(16, np.int64)
        self.last = np.zeros(16, np.int64)
        """Step time of the last usage, in `L` alone."""
        self.dirty = np.zeros(16, np.bool_)
        self.known = np.zeros(16, np.bool_)
        """Redis has acknowledged this field, so it knows when the window ends."""
        self.touched: list[Ints] = []
        """Slots that are dirty, each once."""
        self._labels: list[str] = []
        self._index: dict[int, int] | None = {}
        self._sealed: list[bytes] = []
        self._cache: tuple[list[bytes], str, bytes, bytes] | None = None

    def add(self, keys: Ints, sums: Ints, rows: Ints, now_s: int) -> tuple[Ints, int]:
        """Add sums to the totals of different keys; `rows` say where in the log each key was first seen.

        Returns the keys that are new here and how many totals have just reached TOTAL_MAX, where they stay.
        """
        slots, fresh = self.slots(keys), keys[:0]
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            missing = missing[np.lexsort((keys[missing], rows[missing]))]
            fresh = keys[missing]
            slots[missing] = self._append(fresh)
        before = self.totals[slots]
        after = before + sums
        wrapped = after < 0
        if wrapped.any():
            after[wrapped] = TOTAL_MAX
        self.totals[slots] = after
        if self.end is None:
            self.last[slots] = now_s
        self._cache = None
        self.touch(slots)
        return fresh, int(np.count_nonzero((after == TOTAL_MAX) & (before != TOTAL_MAX)))

    def slots(self, keys: Ints) -> Ints:
        """Slot of each key, -1 where there is none."""
        if self._index is None:
            self._index = dict(zip(self.keys[: self.n].tolist(), range(self.n), strict=True))
        return np.array(list(map(self._index.get, keys.tolist(), repeat(-1))), np.int64)

    def _append(self, keys: Ints) -> Ints:
        """Slots of new keys."""
        first, self.n = self.n, self.n + len(keys)
        self.keys, self.totals = room(self.keys, self.n), room(self.totals, self.n)
        self.dirty, self.known = room(self.dirty, self.n), room(self.known, self.n)
        if self.end is None:
            self.last = room(self.last, self.n)
        self.keys[first : self.n] = keys
        assert self._index is not None
        self._index.update(zip(keys.tolist(), range(first, self.n), strict=True))
        return np.arange(first, self.n)

    def touch(self, slots: Ints) -> None:
        """Mark slots for the next write to Redis."""
        clean = slots[~self.dirty[slots]]
        if len(clean):
            self.dirty[clean] = True
            self.touched.append(clean)

    def drop(self, mask: npt.NDArray[np.bool_]) -> Ints:
        """Forget the slots where [n] mask is set. Returns their keys."""
        n, kept = self.n, ~mask
        gone = self.keys[:n][mask]
        self.n = int(np.count_nonzero(kept))
        for name in ("keys", "totals", "last", "dirty", "known"):
            array = getattr(self, name)
            array[: self.n] = array[:n][kept]
            array[self.n : n] = 0
        self._index, self._sealed, self._cache = None, [], None
        self.retouch()
        return gone

    def retouch(self) -> None:
        """List the dirty slots anew, after some were taken or moved."""
        if self.touched:
            self.touched = [found] if len(found := np.flatnonzero(self.dirty[: self.n])) else []

    def labels(self, meters: list[str]) -> list[str]:
        """Redis field of each meter's total."""
        for meter in meters[len(self._labels) :]:
            self._labels.append(f"{meter} {self.window}:{self.start} u")
        return self._labels

    def dump(self) -> list[Any]:
        """[window, start, key segments, type of totals, totals, last], buffers compressed; what did not change is not compressed again."""
        if self._cache is None:
            for at in range(len(self._sealed) * SEGMENT, self.n // SEGMENT * SEGMENT, SEGMENT):
                self._sealed.append(packed(self.keys[at : at + SEGMENT].tobytes()))
            tail = self.keys[len(self._sealed) * SEGMENT : self.n]
            segments = [*self._sealed, packed(tail.tobytes())] if len(tail) else list(self._sealed)
            totals = self.totals[: self.n]
            kind = str(np.min_scalar_type(int(totals.max()) if self.n else 0))
            last = packed(self.last[: self.n].tobytes()) if self.end is None else b""
            self._cache = segments, kind, packed(totals.astype(kind).tobytes()), last
        return [self.window, self.start, *self._cache]

    @classmethod
    def load(cls, state: Iterable[Any]) -> "Table":
        """The inverse of `dump`: nothing is dirty, nothing is known to Redis."""
        window, start, segments, kind, totals, last = state
        table = cls(window, start)
        table.keys = np.frombuffer(b"".join(unpacked(data) for data in segments), np.int64).copy()
        table.n = n = len(table.keys)
        table.totals = np.frombuffer(unpacked(totals), kind).astype(np.int64)
        if last:
            table.last = np.frombuffer(unpacked(last), np.int64).copy()
        table.dirty, table.known = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        table._index = None
        table._sealed = list(segments[: n // SEGMENT])
        return table
