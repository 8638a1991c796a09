"""A usage topic of its own, read by confluent-kafka and decoded by fastavro; and what an emitter's tests say about it."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from tollway.connectors.emitter import Emitted, Emitter
from tollway.schemas import codec
from tollway.schemas.lane import lane
from tollway.schemas.topics import USAGE

PARTITIONS = 8
NOWHERE = "127.0.0.1:1"
CALL: dict[str, Any] = {
    "surface": "mcp", "operation": "search", "account": "acme", "principal_kind": "user", "principal": "u-1",
    "status": "ok", "latency_us": 1200, "quantities": {"tokens_out": 311},
}  # fmt: skip


def call(n: int) -> dict[str, Any]:
    return CALL | {"account": f"acct-{n % 40}", "latency_us": n}


async def eventually(holds: Callable[[], bool], deadline_s: float = 30.0) -> None:
    """Wait for a condition; fail at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not holds():
            await asyncio.sleep(0.02)


class Log:
    """A topic of its own, read by confluent-kafka and decoded by fastavro."""

    def __init__(self, bootstrap: str, opened: bool = True) -> None:
        self.bootstrap, self.name = bootstrap, f"usage-{uuid.uuid4().hex}"
        self.admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
        self.create()
        if opened:
            self.open(range(PARTITIONS))

    def create(self) -> None:
        self.admin.create_topics([NewTopic(self.name, PARTITIONS, 1, config=USAGE.settings)])[self.name].result(30)

    def open(self, partitions: range) -> None:
        producer = Producer({"bootstrap.servers": self.bootstrap, "log_level": 0})
        for partition in partitions:
            producer.produce(self.name, key=b"*", value=b"", partition=partition)
        assert producer.flush(30) == 0

    def configure(self, name: str, value: str) -> None:
        entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, self.name, incremental_configs=[entry])
        self.admin.incremental_alter_configs([resource])[resource].result(30)

    def read(self) -> list[tuple[int, int, dict[str, Any]]]:
        """(partition, offset, event) of all that is there."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "none", "enable.auto.commit": False})
        places = [TopicPartition(self.name, partition, 0) for partition in range(PARTITIONS)]
        found = []
        try:
            left = {place.partition: consumer.get_watermark_offsets(place, timeout=30)[1] for place in places}
            consumer.assign(places)
            while any(left.values()):
                message = consumer.poll(30)
                assert message is not None, f"these partitions could not be read to their ends: {left}"
                assert message.error() is None
                partition, offset, value = message.partition(), message.offset(), message.value()
                if offset + 1 == left[partition]:
                    left[partition] = 0
                if value:
                    event = codec.decode(value)[1]
                    assert message.key() == event["account"].encode()
                    found.append((partition, offset, event))
        finally:
            consumer.close()
        return sorted(found, key=lambda record: record[:2])

    def identities(self) -> list[Emitted]:
        """In the order of their offsets, partition by partition."""
        return [identity(event) for _, _, event in self.read()]


def identity(event: dict[str, Any]) -> Emitted:
    return Emitted(event["source"], lane(event["account"]), event["sequence"])


def in_order(identities: list[Emitted]) -> bool:
    """First appearances of every (source, lane) ascend."""
    last: dict[tuple[str, int], int] = defaultdict(int)
    seen: set[Emitted] = set()
    for one in identities:
        if one not in seen:
            if one.sequence < last[one[:2]]:
                return False
            last[one[:2]] = one.sequence
            seen.add(one)
    return True


def gapless(sequences: list[int]) -> bool:
    return sequences == [*range(1, len(sequences) + 1)]


def emitter_to(log: Log, spool_dir: Path, **options: Any) -> Emitter:
    return Emitter(log.bootstrap, topic=log.name, spool_dir=spool_dir, **options)
