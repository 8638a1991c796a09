"""Writes records past the emitter: copies, shuffled sequences, poison. Journals each before it and when the broker has it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from confluent_kafka import Message, Producer

from tests.load import World, emitted_fields, traffic
from tests.load_poison import Raw, source_id, target
from tests.oracle_book import GROWN, Record
from tests.oracle_wire import USAGE_ID, Refused, frame, lane, unframe

TOPIC = "usage.events"


class JournalFile:
    """Lines that survive the writer's kill −9: each is one write(2) on an appending descriptor."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def line(self, **fields: Any) -> None:
        os.write(self._file, json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        self.line(end=True)
        os.close(self._file)


class RawWriter:
    """An idempotent confluent-kafka producer; every record goes to the partition that it is told."""

    def __init__(self, bootstrap: str, journal: Path, partitions: int, growth: int = 0) -> None:
        """`growth`: how often the log has grown; the journal names its partitions as the oracle does."""
        self.topic, self.base = f"{TOPIC}.{growth}" if growth else TOPIC, growth * GROWN
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "message.max.bytes": 131_072,
                "linger.ms": 20,
                "log_level": 2,
            }
        )
        self.journal, self.partitions = JournalFile(journal), partitions
        self.name, self.written = journal.stem, 0

    def write(self, raw: Raw, kind: str, partition: int | None = None) -> None:
        self.written += 1
        tag = raw.tag or f"{self.name}.{self.written}"
        self.journal.line(b=tag, raw=kind, want=raw.want)
        self.producer.produce(
            self.topic,
            value=raw.value,
            key=raw.key,
            partition=target(raw, self.partitions) if partition is None else partition,
            headers=list(raw.headers),
            on_delivery=lambda error, message: self._delivered(tag, error, message),
        )
        self.producer.poll(0)

    def _delivered(self, tag: str, error: Any, message: Message) -> None:
        if error is None:
            self.journal.line(r=tag, p=self.base + message.partition(), o=message.offset())

    def flush(self, deadline_s: float = 30.0) -> None:
        left = self.producer.flush(deadline_s)
        if left:
            raise TimeoutError(f"{left} raw records were not acknowledged within {deadline_s} s")

    def close(self) -> None:
        self.flush()
        self.journal.close()


def copies(records: Iterable[Record], random: Random, share: float, writers: set[str]) -> list[tuple[Raw, int]]:
    """A share of the usage records that one of `writers` emitted, to be written again: (record, partition)."""
    chosen = []
    for record in records:
        if random.random() >= share or not record.value:
            continue
        try:
            number, event = unframe(record.value)
        except Refused:
            continue
        if number == USAGE_ID and str(event["trace_id"]).split(".")[0] in writers:
            chosen.append((Raw("duplicate", record.key, record.value), record.partition))
    return chosen


def shuffled(made: World, seed: int, count: int, now_us: int) -> list[Raw]:
    """A source of its own that sends its sequences of every lane in any order within a stretch of 40."""
    random, name = Random(f"{seed}/shuffled"), f"shuffled{seed}"
    source, lanes, records = source_id(now_us // 1000, random.getrandbits(74)), dict[int, int](), []
    for number, call in enumerate(traffic(made, seed, name, len(made.principals), count, 1)):
        fields = emitted_fields(call, now_us)
        lanes[lane(fields["account"])] = sequence = lanes.get(lane(fields["account"]), 0) + 1
        event = {"event_id": f"{random.getrandbits(128):032x}", "source": source, "sequence": sequence, **fields}
        event = {**dict.fromkeys(OPTIONAL), **event, "trace_id": f"{name}.{number}"}
        records.append(Raw("accepted", fields["account"].encode(), frame(USAGE_ID, event), tag=event["trace_id"]))
    for start in range(0, len(records), 40):
        stretch = records[start : start + 40]
        random.shuffle(stretch)
        records[start : start + 40] = stretch
    return records


OPTIONAL = (
    "agent", "session", "run", "parent", "path", "hold", "rail", "price_ref", "revenue_nano", "revenue_asset",
    "cost_nano", "cost_asset", "payment_ref", "provider", "model", "trace_id", "attributes",
)  # fmt: skip
