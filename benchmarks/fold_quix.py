"""Contender: Quix Streams, a tumbling window of 60 s per principal (the record's key) with one Sum per meter.

Without changelog topics, and only closed windows leave it, into a sink that throws them away: less work than the others do.
Runs in an environment of its own (benchmarks/requirements.txt). Prints {"events", "cpu_s", "wall_s"}.
"""

import argparse
import io
import json
import logging
import tempfile
import time
from datetime import timedelta
from typing import Any

import fastavro
from confluent_kafka import Consumer, TopicPartition
from fold_schema import USAGE_HEADER, schema
from quixstreams import Application
from quixstreams.dataframe.windows.aggregations import Sum
from quixstreams.sinks.base import BatchingSink, SinkBatch

METERS = ("calls", "tokens_in", "tokens_out")


class Nowhere(BatchingSink):
    """Takes closed windows."""

    def write(self, batch: SinkBatch) -> None:
        pass


class Meter:
    """Counts decoded events and the CPU between the first and the last."""

    def __init__(self, events: int) -> None:
        self.left, self.events, self.parsed = events, events, schema()
        self.cpu = self.wall = 0.0
        self.answer: dict[str, Any] = {}

    def decode(self, value: bytes | None) -> dict[str, int] | None:
        """Quantities of a usage record; None for ticks and commands."""
        if value is None or value[:5] != USAGE_HEADER:
            return None
        if self.left == self.events:
            self.cpu, self.wall = time.process_time(), time.monotonic()
        event = fastavro.schemaless_reader(io.BytesIO(value[5:]), self.parsed, None)
        self.left -= 1
        if self.left == 0:
            spent = {"cpu_s": time.process_time() - self.cpu, "wall_s": time.monotonic() - self.wall}
            self.answer = {"events": self.events, **spent}
        quantities: dict[str, int] = event["quantities"]
        return {meter: quantities.get(meter, 0) for meter in METERS}


def start_at(bootstrap: str, group: str, starts: dict[str, int]) -> None:
    """Commit where the group begins."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False})
    offsets = [TopicPartition("usage.events", int(number), offset) for number, offset in starts.items()]
    consumer.commit(offsets=offsets, asynchronous=False)
    consumer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--starts", required=True, help="JSON: partition → first offset")
    parser.add_argument("--events", type=int, required=True)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    group, meter = f"quix-{time.time_ns()}", Meter(arguments.events)
    start_at(arguments.bootstrap, group, json.loads(arguments.starts))
    with tempfile.TemporaryDirectory() as state:
        app = Application(
            broker_address=arguments.bootstrap,
            consumer_group=group,
            auto_offset_reset="earliest",
            use_changelog_topics=False,
            auto_create_topics=False,
            state_dir=state,
            loglevel=None,
        )
        topic = app.topic("usage.events", key_deserializer="str", value_deserializer="bytes")
        frame = app.dataframe(topic).apply(meter.decode).filter(lambda quantities: quantities is not None)
        window = frame.tumbling_window(timedelta(seconds=60))
        window.agg(**{name: Sum(name) for name in METERS}).final().sink(Nowhere())
        frame.filter(lambda _: _stop_when_done(app, meter))
        app.run()
    print(json.dumps(meter.answer))


def _stop_when_done(app: Application, meter: Meter) -> bool:
    if not meter.left:
        app.stop()
    return False


if __name__ == "__main__":
    main()
