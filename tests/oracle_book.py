"""The oracle's vocabulary: records, rows, totals, deltas, windows, scopes, and the book in which they are entered."""

import base64
import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.oracle_wire import decode

HOUR, DAY = 3_600, 86_400
LENGTH_S = {"m": 60, "h": HOUR, "d": DAY}
KEEP_S = {"m": 2 * HOUR, "h": 2 * DAY, "d": 3 * DAY, "M": 35 * DAY}
PRINCIPAL_SCOPE = {"user": "user", "client": "client", "anonymous": "anon"}
DEFAULT_COUNTS = [{"meter": "calls", "windows": ["m", "h", "d", "M"], "scopes": ["acct", "principal"]}]
HOLES_MAX = 1_000
UNITS_MAX = 999_999_999_999_999
ACCEPTED, DUPLICATE, REFUSED, TICK = "accepted", "duplicate", "refused", "tick"

Total = tuple[str, str, str, str, int]
"""account, scope, meter, window, start."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as the broker gave it."""

    partition: int
    offset: int
    append_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Accepted usage and the times under which it is billed and counted. Kept as bytes: a million dictionaries are 4 GB."""

    record: Record
    tag: str
    """The event's trace_id, by which the journals know it."""
    billed_us: int
    counted_us: int
    customer: str | None
    """Bound at its offset; None = not yet."""
    version: int = 1
    """Of the fold, at its step."""

    @property
    def event(self) -> dict[str, Any]:
        """Decoded anew at each call."""
        return decode(self.record.value or b"")


GROWN = 1_000
"""Partition p of the log after its g-th growth step is g · GROWN + p here: each log has offsets of its own."""
BILLED = {1: ("ok",), 2: ("ok", "error")}
"""Fold version → statuses that bill. Version 2 is that of the build that `tests.builds` makes."""


@dataclass(frozen=True)
class Delta:
    """One Stripe meter event that must be there."""

    account: str
    customer: str
    meter: str
    event_name: str
    window_start_s: int
    units: int
    last_us: int


@dataclass
class Account:
    customer: str | None = None
    counts: list[dict[str, Any]] = field(default_factory=lambda: DEFAULT_COUNTS)


@dataclass
class Book:
    """What all partitions together amount to."""

    used: dict[Total, int] = field(default_factory=lambda: defaultdict(int))
    deltas: dict[str, Delta] = field(default_factory=dict)
    dead: dict[tuple[int, int], str] = field(default_factory=dict)
    verdicts: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """partition → the verdict of each offset; `tick` has none."""
    rows: list[Row] = field(default_factory=list)
    principals: set[tuple[str, str]] = field(default_factory=set)
    """(account, principal) of accepted usage."""
    records: int = 0
    late: int = 0
    """Accepted more than a minute after it occurred."""
    log_time_ms: dict[int, int] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    """account → the first customer it was bound to."""
    meters: dict[str, str | None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    epochs: set[str] = field(default_factory=set)

    def verdict(self, partition: int, offset: int) -> str | None:
        """What became of one record: accepted, duplicate, a dead letter's reason, tick; None = not in the log."""
        found = self.verdicts[partition]
        return self.dead.get((partition, offset)) or (found[offset] if offset < len(found) else None)


def window_start(window: str, at_s: int) -> int:
    """First second of the window that `at_s` lies in."""
    if window == "L":
        return 0
    if window == "M":
        at = datetime.fromtimestamp(at_s, UTC)
        return int(datetime(at.year, at.month, 1, tzinfo=UTC).timestamp())
    return at_s - at_s % LENGTH_S[window]


def window_end(window: str, start_s: int) -> int | None:
    """First second behind the window; None = never ends."""
    if window == "L":
        return None
    if window == "M":
        at = datetime.fromtimestamp(start_s, UTC)
        year, month = (at.year + 1, 1) if at.month == 12 else (at.year, at.month + 1)
        return int(datetime(year, month, 1, tzinfo=UTC).timestamp())
    return start_s + LENGTH_S[window]


def scopes_of(event: dict[str, Any], kind: str) -> str | None:
    """The scope of one kind that an event falls into."""
    if kind == "acct":
        return "acct"
    own = PRINCIPAL_SCOPE[event["principal_kind"]]
    if kind in ("principal", own):
        return f"{own}:{event['principal']}"
    name = {"agent": "agent", "sess": "session", "run": "run"}.get(kind)
    return f"{kind}:{event[name]}" if name and event[name] is not None else None


def stripe_identifier(deployment: str, delta_key: tuple[str, str, str, str, int], flush: int, part: int) -> str:
    """`tw1_` + base32(SHA-256(identity))[:40]."""
    account, customer, meter, price_ref, start = delta_key
    words = [deployment, account, customer, meter, price_ref, str(start), str(flush), str(part)]
    return "tw1_" + base64.b32encode(hashlib.sha256("\x1f".join(words).encode()).digest()).decode().lower()[:40]
