"""Peer: Quix Streams, a tumbling window of 60 s per key (the principal) with one Sum per meter, state in RocksDB with changelog.

Each update leaves the window; the sink writes to Redis what is newest per window at each commit, as its batching sinks do.
`--least` is kinder than equal work: no changelog, and only closed windows leave, into nothing.
"""

import logging
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

import redis
from confluent_kafka import Consumer, TopicPartition
from quixstreams import Application
from quixstreams.dataframe.windows.aggregations import Sum
from quixstreams.models import Deserializer, SerializationContext
from quixstreams.sinks.base import BatchingSink, SinkBatch
from work import TOPIC, WINDOW_S, Stopwatch, decode, given

NAME = "quix"
METERS = ("calls", "tokens_in", "tokens_out")
GRACE = timedelta(minutes=5)


class Usage(Deserializer):
    """Quantities of a usage record and its time; ticks and commands are empty."""

    def __init__(self, events: int) -> None:
        super().__init__()
        self.events = self.left = events
        self.watch = Stopwatch()

    def __call__(self, value: bytes, ctx: SerializationContext) -> dict[str, int]:
        if self.left == self.events:
            self.watch = Stopwatch()
        self.left -= 1
        event = decode(value)
        if event is None:
            return {}
        quantities = event["quantities"]
        return {"at_ms": event["occurred_at"] // 1000, **{meter: quantities.get(meter, 0) for meter in METERS}}


class Shown(BatchingSink):
    """Running sums → Redis."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.client = redis.Redis.from_url(url)

    def write(self, batch: SinkBatch) -> None:
        newest: dict[Any, dict[str, int]] = {}
        for item in batch:
            start, fields = item.value["start"] // 1000, newest.setdefault(item.key, {})
            for meter in METERS:
                fields[f"{meter} m:{start}"] = item.value[meter]
        pipe = self.client.pipeline(transaction=False)
        for key, fields in newest.items():
            pipe.hset(f"{NAME}:{key}", mapping=fields)
        pipe.execute()


class Nowhere(BatchingSink):
    """Takes closed windows."""

    def write(self, batch: SinkBatch) -> None:
        pass


def start_at(bootstrap: str, group: str, starts: dict[int, int]) -> None:
    """Commit where the group begins."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False})
    consumer.commit(
        offsets=[TopicPartition(TOPIC, number, offset) for number, offset in starts.items()], asynchronous=False
    )
    consumer.close()


def main() -> None:
    least = "--least" in sys.argv
    sys.argv = [each for each in sys.argv if each != "--least"]
    arguments = given(__doc__)
    logging.disable(logging.WARNING)
    group, usage = f"{NAME}-{time.time_ns()}", Usage(arguments.events)
    start_at(arguments.bootstrap, group, arguments.starts)
    with tempfile.TemporaryDirectory() as state:
        app = Application(
            broker_address=arguments.bootstrap,
            consumer_group=group,
            auto_offset_reset="earliest",
            commit_interval=arguments.safe_s,
            use_changelog_topics=not least,
            state_dir=state,
            loglevel=None,
        )
        topic = app.topic(
            TOPIC,
            key_deserializer="str",
            value_deserializer=usage,
            timestamp_extractor=lambda value, headers, at_ms, kind: value.get("at_ms", at_ms),
        )
        frame = app.dataframe(topic).filter(bool)
        window = frame.tumbling_window(timedelta(seconds=WINDOW_S), GRACE)
        sums = window.agg(**{meter: Sum(meter) for meter in METERS})
        if least:
            sums.final().sink(Nowhere())
        else:
            sums.current().sink(Shown(arguments.redis))
        frame.update(lambda _: app.stop() if not usage.left else None)
        app.run()
        usage.watch.tell(arguments.events)


if __name__ == "__main__":
    main()
