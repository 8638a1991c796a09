"""A log on paper: records with offsets and append times that a test chooses, so that the oracle itself can be tried."""

import json
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.load_poison import Raw, target
from tests.oracle import Actual, expected_totals
from tests.oracle_book import Book, Record, Total
from tests.oracle_sides import as_the_view
from tests.oracle_wire import COMMAND_ID, frame, lane

EPOCH = "0-paper"


class Paper:
    """Appends at `now_ms`; the caller moves the clock."""

    def __init__(self, partitions: int, now_ms: int, auto_open: bool = False) -> None:
        self.partitions, self.now_ms = partitions, now_ms
        self.records: list[Record] = []
        self.offsets: Counter[int] = Counter()
        self.private, self.forger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        public = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
        config = {"epoch": EPOCH, "deployment": "paper", "kid": "k1", "public_key": public, "lanes": 256, "step_s": 5}
        config |= {"billing_window_s": 10, "billing_grace_s": 5, "snapshot_s": 60, "hold_grace_s": 900}
        self.command("*", "log.open", {**config, "auto_open": auto_open})

    def sign(self, value: bytes) -> list[tuple[str, bytes]]:
        return [("sig", self.private.sign(value)), ("kid", b"k1")]

    def forge(self, value: bytes) -> list[tuple[str, bytes]]:
        return [("sig", self.forger.sign(value)), ("kid", b"k1")]

    def append(self, partition: int, key: bytes | None, value: bytes | None, headers: Any = ()) -> tuple[int, int]:
        offset = self.offsets[partition]
        self.offsets[partition] += 1
        self.records.append(Record(partition, offset, self.now_ms, key, value, tuple(headers)))
        return partition, offset

    def raw(self, raw: Raw) -> tuple[int, int]:
        return self.append(target(raw, self.partitions), raw.key, raw.value, raw.headers)

    def command(self, account: str, kind: str, body: dict[str, Any]) -> None:
        """A broadcast stands once in every partition."""
        command = {"command_id": uuid.uuid4().hex, "account": account, "kind": kind, "body": json.dumps(body)}
        value = frame(COMMAND_ID, {**command, "signed_at": self.now_ms * 1000})
        raw = Raw("accepted", account.encode(), value)
        for partition in range(self.partitions) if account == "*" else [target(raw, self.partitions)]:
            self.append(partition, raw.key, value, self.sign(value))

    def tick(self, later_s: int = 0) -> None:
        """Move the clock and tick every partition."""
        self.now_ms += later_s * 1000
        for partition in range(self.partitions):
            self.append(partition, b"tick", None)


@dataclass
class PaperView:
    """A view that shows what it is given."""

    kept: dict[tuple[int, int], dict[str, Any]]
    sums: dict[Total, int]
    partitions: int

    def count(self) -> int:
        return len(self.kept)

    def rows(self, partition: int) -> dict[tuple[int, int], dict[str, Any]]:
        return {at: row for at, row in self.kept.items() if at[0] == partition}

    def totals(self, partition: int) -> dict[Total, int]:
        return {total: units for total, units in self.sums.items() if lane(total[0]) % self.partitions == partition}


def faithful(book: Book, original: dict[tuple[int, int], bytes | None]) -> Actual:
    """Sides that hold exactly what the book says."""
    events = [(row, row.event) for row in book.rows]
    shown = {(row.record.partition, row.record.offset): as_the_view(row, event) for row, event in events}
    return Actual(
        redis=dict(book.used),
        view=PaperView(shown, dict(expected_totals(events)), len(book.verdicts)),
        stripe=[
            {
                "identifier": identifier,
                "customer": delta.customer,
                "event_name": delta.event_name,
                "value": delta.units,
                "timestamp": delta.last_us // 10**6,
            }
            for identifier, delta in book.deltas.items()
        ],
        dead={at: (reason, original[at] or b"") for at, reason in book.dead.items()},
        meter_events={
            identifier: {"customer": delta.customer, "units": delta.units, "last_occurred_at": delta.last_us}
            for identifier, delta in book.deltas.items()
        },
    )
