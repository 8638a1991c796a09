"""The work of a peer: one 60 s sum by event time per principal and meter, shown in Redis. Imports nothing of ours.

Peers run as scripts, some in environments of their own. Each reads [starts, ends) of `usage.events`, writes every changed sum
to the hash `<name>:<principal>`, field `<meter> m:<start>`, and prints {"events", "cpu_s", "wall_s"} of its process, from the
first record to the last sum written and the last offset (or state) made safe. What stops it in between it can recover from.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import fastavro

TOPIC = "usage.events"
USAGE_HEADER = b"\x00\x00\x0f\x42\x40"
WINDOW_S = 60
BATCH = 10_000
"""Records a turn, where a peer may choose: a larger one gains nothing."""


def given(doc: str | None) -> argparse.Namespace:
    """What the benchmark tells a peer; `starts` and `ends` become partition → offset."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--starts", required=True, help="JSON: partition → first offset")
    parser.add_argument("--ends", required=True, help="JSON: partition → offset behind the last")
    parser.add_argument("--safe-s", type=float, default=2.0, help="seconds between two commits (or snapshots)")
    arguments = parser.parse_args()
    for name in ("starts", "ends"):
        setattr(
            arguments, name, {int(number): offset for number, offset in json.loads(getattr(arguments, name)).items()}
        )
    arguments.events = sum(arguments.ends.values()) - sum(arguments.starts.values())
    return arguments


def schema() -> Any:
    """usage.avsc without logical types: timestamps stay integers."""
    text = json.loads((Path(__file__).resolve().parents[2] / "schemas" / "usage.avsc").read_text())
    for field in text["fields"]:
        if isinstance(field["type"], dict) and "logicalType" in field["type"]:
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(text)


PARSED = schema()


def decode(value: bytes | None) -> dict[str, Any] | None:
    """A usage event; None for ticks and commands."""
    if value is None or value[:5] != USAGE_HEADER:
        return None
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), PARSED, None)  # type: ignore[return-value]


def start_of(event: dict[str, Any]) -> int:
    """Second at which the window of an event begins."""
    return int(event["occurred_at"]) // 1_000_000 // WINDOW_S * WINDOW_S


class Sums:
    """Totals by principal and field, and which of them are to be written."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, int]] = {}
        self.changed: dict[str, dict[str, int]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Count one event."""
        principal, start = event["principal"], start_of(event)
        totals = self.totals.get(principal)
        if totals is None:
            totals = self.totals[principal] = {}
        changed = self.changed.get(principal)
        if changed is None:
            changed = self.changed[principal] = {}
        for meter, units in event["quantities"].items():
            field = f"{meter} m:{start}"
            changed[field] = totals[field] = totals.get(field, 0) + units

    def take(self) -> dict[str, dict[str, int]]:
        """What changed since the last time."""
        changed, self.changed = self.changed, {}
        return changed


class Stopwatch:
    """CPU of this process, all threads, and time."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.monotonic()

    def tell(self, events: int) -> None:
        """Print what it took."""
        spent = {"cpu_s": time.process_time() - self.cpu, "wall_s": time.monotonic() - self.wall}
        print(json.dumps({"events": events, **spent}), flush=True)
