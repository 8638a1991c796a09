"""A batch: records of one partition, of one step, decoded to Arrow and judged. What the engine hands to every part."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

USAGE, COMMAND, TICK, POISON = 0, 1, 2, 3
KINDS = ("usage", "command", "tick", "poison")
ACCEPTED, DUPLICATE, REFUSED = 0, 1, 2
VERDICTS = ("accepted", "duplicate", "refused")

RECORDS_MAX = 32_768
"""Most records a batch: sums of bounded values stay inside int64 (Arrow wraps silently)."""


@dataclass
class Records:
    """Raw records of one partition as the broker gave them, columns of equal length n, ascending offsets."""

    offsets: npt.NDArray[np.int64]
    append_ms: npt.NDArray[np.int64]
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[tuple[tuple[str, bytes], ...]]

    def __len__(self) -> int:
        return len(self.values)

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
        )


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
