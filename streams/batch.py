"""A batch: records of one partition, of one step, decoded to Arrow and judged. What the engine hands to every part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tollway.streams.columns import Ints, Quantities, encoded

USAGE, COMMAND, TICK, POISON = 0, 1, 2, 3
KINDS = ("usage", "command", "tick", "poison")
ACCEPTED, DUPLICATE, REFUSED = 0, 1, 2
VERDICTS = ("accepted", "duplicate", "refused")

RECORDS_MAX = 32_768
"""Most records a batch: sums of bounded values stay inside int64 (Arrow wraps silently)."""


HEAD_BYTES = 5
"""The framing: 0x00 and a four-byte schema id."""
_UNFRAMED = b"\xff\0\0\0\0"
_HEAD: Callable[[Any], bytes] = itemgetter(slice(0, HEAD_BYTES))

Framing = tuple[Ints, npt.NDArray[np.uint32]]


@dataclass
class Records:
    """Raw records of one partition as the broker gave them, columns of equal length n, ascending offsets."""

    offsets: npt.NDArray[np.int64]
    append_ms: npt.NDArray[np.int64]
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[tuple[tuple[str, bytes], ...]]
    _framing: Framing | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> Ints:
        """[n] bytes of each value, -1 where it is null."""
        return self._framed()[0]

    @property
    def schema_ids(self) -> npt.NDArray[np.uint32]:
        """[n] schema id of each value's framing, 0 where there is none."""
        return self._framed()[1]

    def _framed(self) -> Framing:
        if self._framing is None:
            self._framing = _framing(self.values)
        return self._framing

    def part(self, start: int, end: int) -> "Records":
        """Records start … end - 1; itself where that is all."""
        if start == 0 and end == len(self):
            return self
        return Records(
            self.offsets[start:end],
            self.append_ms[start:end],
            self.keys[start:end],
            self.values[start:end],
            self.headers[start:end],
            None if self._framing is None else (self._framing[0][start:end], self._framing[1][start:end]),
        )


def _framing(values: list[bytes | None]) -> Framing:
    """(lengths, schema ids) of values, all heads at a time."""
    try:
        heads, nulls = b"".join(map(_HEAD, values)), None
    except TypeError:  # ticks have no value
        nulls = np.array([value is None for value in values])
        values = [value or b"" for value in values]
        heads = b"".join(map(_HEAD, values))
    lengths = np.fromiter(map(len, values), np.int64, len(values))  # type: ignore[arg-type]
    if len(heads) < HEAD_BYTES * len(values):
        heads = b"".join([value[:HEAD_BYTES] if value and len(value) >= HEAD_BYTES else _UNFRAMED for value in values])
    framing = np.frombuffer(heads, np.uint8).reshape(len(values), HEAD_BYTES)
    ids = np.ascontiguousarray(framing[:, 1:]).view(">u4").ravel().astype(np.uint32)
    ids[framing[:, 0] != 0] = 0
    if nulls is not None:
        lengths[nulls] = -1
    return lengths, ids


@dataclass
class Batch:
    """Judged records. n = all records, m ≤ n = decodable usage, in offset order.

    A batch never mixes a command with anything else: a command is a batch of one (`command` set, m = 0).
    """

    partition: int
    step: int
    log_time_ms: int
    """Log time after the batch's last record."""
    records: Records
    kind: npt.NDArray[np.uint8]
    """[n] USAGE, COMMAND, TICK or POISON."""
    verdict: npt.NDArray[np.uint8]
    """[n] ACCEPTED, DUPLICATE or REFUSED (ticks and accepted commands are ACCEPTED)."""
    reasons: dict[int, tuple[str, str]]
    """row in n → (reason, detail) of every refused record."""
    usage: pa.RecordBatch
    """[m] decoded usage, columns as in usage.avsc (occurred_at as timestamp[us]), also of duplicate and refused rows."""
    row: npt.NDArray[np.int64]
    """[m] row in n of each usage row."""
    accepted: npt.NDArray[np.bool_]
    """[m] verdict is ACCEPTED."""
    occurred_us: npt.NDArray[np.int64]
    """[m] occurred_at, clamped to append time where it was > 60 s ahead: the time that billing uses."""
    window_us: npt.NDArray[np.int64]
    """[m] time whose quota windows count: occurred_at as it is with a hold, else max(occurred_us, append - 1 h)."""
    schema_ids: npt.NDArray[np.uint32]
    """[n] schema id of the framing, 0 where there is none."""
    command: dict[str, Any] | None = None
    """The accepted command: command_id, account, kind, body (parsed JSON), signed_at."""
    undeclared: dict[str, int] = field(default_factory=dict)
    """meter → records, for accepted usage in meters that no `meter.add` declared: stored, not counted, alarmed."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def accounts(self) -> tuple[Ints, list[str]]:
        """([m] index of each usage row's account, the accounts in order of first appearance)."""
        return encoded(self.usage.column("account"))

    @cached_property
    def quantities(self) -> Quantities:
        """Of all usage rows, refused ones too."""
        return Quantities.of(self.usage.column("quantities"))
