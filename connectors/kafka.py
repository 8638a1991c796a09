"""Kafka: topics made and checked, topic ids, and the readers and writers that the folds use."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from tollway.connectors.errors import Refused, Unavailable
from tollway.schemas.topics import CHECKPOINTS, TOPICS, USAGE

REQUEST_BYTES_MAX = 17 * 1024 * 1024
CHECKPOINT_TAIL = 64
"""Newest records of a checkpoint partition that are read first; all of it only where they hold no valid one."""
ADMIN_TIMEOUT_S = 15


class Admin:
    """confluent-kafka's admin client (aiokafka gives no topic ids), one call at a time in a thread."""

    def __init__(self, bootstrap: str, security: dict[str, Any] | None = None) -> None:
        self._bootstrap = bootstrap
        quiet = {"log_level": 0, "error_cb": lambda _: None}  # what it raises says it all
        self._client = AdminClient({"bootstrap.servers": bootstrap, **quiet, **(security or {})})

    async def partitions(self) -> dict[str, int]:
        """topic → partition count. Raises Unavailable where no broker answers."""
        try:
            metadata = await asyncio.to_thread(self._client.list_topics, timeout=ADMIN_TIMEOUT_S)
        except KafkaException as error:
            raise Unavailable(f"no Kafka at {self._bootstrap}: {error.args[0].str()}") from error
        return {name: len(topic.partitions) for name, topic in metadata.topics.items()}

    async def create(self, partitions: int, replication: int) -> list[str]:
        """Create the topics that are not there yet, as the table says; returns their names."""
        present = await self.partitions()
        for topic in TOPICS:
            if topic.name in present and present[topic.name] != partitions:
                raise Refused(
                    f"topic {topic.name} has {present[topic.name]} partitions, not {partitions}: "
                    "a log grows by `topics grow`, never in place"
                )
        minimum = {"min.insync.replicas": "2"} if replication >= 3 else {}
        missing = [
            NewTopic(topic.name, partitions, replication, config={**topic.settings, **minimum})
            for topic in TOPICS
            if topic.name not in present
        ]
        if missing:
            futures = self._client.create_topics(missing, operation_timeout=ADMIN_TIMEOUT_S)
            for name, future in futures.items():
                try:
                    await asyncio.to_thread(future.result, ADMIN_TIMEOUT_S)
                except KafkaException as error:
                    raise Refused(f"topic {name} was not created: {error.args[0].str()}") from error
        return [topic.topic for topic in missing]

    async def new_topic_id(self, topic: str) -> str:
        """`topic_id` of a topic that may have been created just now: brokers learn of it a moment later."""
        until = time.monotonic() + ADMIN_TIMEOUT_S
        while True:
            try:
                return await self.topic_id(topic)
            except Refused:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def topic_id(self, topic: str) -> str:
        """The broker's id of a topic: a recreated topic has another one. Raises Refused where there is none."""
        from confluent_kafka import TopicCollection

        futures = self._client.describe_topics(TopicCollection([topic]), request_timeout=ADMIN_TIMEOUT_S)
        try:
            found = await asyncio.to_thread(futures[topic].result, ADMIN_TIMEOUT_S)
        except KafkaException as error:
            raise Refused(f"topic {topic} is not there: run `tollway topics create` ({error.args[0].str()})") from error
        return str(found.topic_id)

    async def settings_of(self, topic: str) -> dict[str, str]:
        """A topic's settings as the broker has them."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        future = self._client.describe_configs([resource], request_timeout=ADMIN_TIMEOUT_S)[resource]
        found = await asyncio.to_thread(future.result, ADMIN_TIMEOUT_S)
        return {name: entry.value for name, entry in found.items()}


def epoch_of(topic_id: str, growth: int = 0) -> str:
    """Epoch of a log: its growth step and the topic's id."""
    return f"{growth}-{topic_id}"


async def started_producer(bootstrap: str, security: dict[str, Any], **options: Any) -> AIOKafkaProducer:
    """An idempotent producer, acks=all. Raises Unavailable where no broker answers."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        acks="all",
        max_request_size=REQUEST_BYTES_MAX,
        **security,
        **options,
    )
    try:
        await producer.start()
    except KafkaConnectionError as error:
        await producer.stop()
        raise Unavailable(f"no Kafka at {bootstrap}: {error}") from error
    return producer


async def read_newest(
    bootstrap: str,
    security: dict[str, Any],
    topic: str,
    partitions: Iterable[int],
    tail: int | None,
    *,
    committed: bool = False,
    starts: Mapping[int, int] | None = None,
    keep: Callable[[ConsumerRecord], bool] = lambda _: True,
) -> dict[int, list[ConsumerRecord]]:
    """Records of partitions, in log order, up to the ends seen at the start: the last `tail` offsets or all.

    One manually assigned reader for all partitions; `committed`: transactions that did not commit are left out; `starts`:
    partition → first offset; `keep` says which records are worth their memory.
    """
    starts = starts or {}
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        auto_offset_reset="none",
        isolation_level="read_committed" if committed else "read_uncommitted",
        max_partition_fetch_bytes=REQUEST_BYTES_MAX,
        fetch_max_bytes=4 * REQUEST_BYTES_MAX,
        enable_auto_commit=False,
        **security,
    )
    try:
        await consumer.start()
        consumer.assign(wanted)
        ends = await consumer.end_offsets(wanted)
        begins = await consumer.beginning_offsets(wanted)
        left = set()
        for tp in wanted:
            start = max(begins[tp], starts.get(tp.partition, 0), ends[tp] - tail if tail is not None else 0)
            consumer.seek(tp, start)
            if start < ends[tp]:
                left.add(tp)
        found: dict[int, list[ConsumerRecord]] = {tp.partition: [] for tp in wanted}
        while left:
            got = await consumer.getmany(timeout_ms=500)
            for tp, records in got.items():
                found[tp.partition] += [record for record in records if keep(record)]
            left = {tp for tp in left if await consumer.position(tp) < ends[tp]}
        return found
    except KafkaError as error:
        raise Unavailable(f"{topic} cannot be read: {error}") from error
    finally:
        await consumer.stop()


async def read_checkpoints(
    bootstrap: str, security: dict[str, Any], partitions: Iterable[int], tail: int | None, *, committed: bool = False
) -> dict[int, list[tuple[bytes, bytes]]]:
    """(key, value) of checkpoint records, in log order."""
    found = await read_newest(bootstrap, security, CHECKPOINTS.name, partitions, tail, committed=committed)
    return {
        number: [(record.key, record.value) for record in records if record.key] for number, records in found.items()
    }


async def ends(bootstrap: str, security: dict[str, Any], topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """partition → end offset (the next record's)."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, **security)
    try:
        await consumer.start()
        wanted = [TopicPartition(topic, partition) for partition in partitions]
        return {tp.partition: end for tp, end in (await consumer.end_offsets(wanted)).items()}
    except KafkaError as error:
        raise Unavailable(f"no end offsets of {topic}: {error}") from error
    finally:
        await consumer.stop()


async def log_partitions(admin: Admin) -> int:
    """Partition count of the log. Raises Refused where the topics are not there or do not agree."""
    present = await admin.partitions()
    if USAGE.name not in present:
        raise Refused(f"topic {USAGE.name} is not there: run `tollway topics create`")
    count = present[USAGE.name]
    wrong = [topic.name for topic in TOPICS if present.get(topic.name) != count]
    if wrong:
        raise Refused(f"{', '.join(wrong)}: missing or not {count} partitions like {USAGE.name}")
    return count
