"""Records of the engine's consumer: the C parser's own objects, with all that aiokafka's have."""

import asyncio
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

from tollway.connectors.kafka import Admin
from tollway.connectors.parsed_records import as_parsed
from tollway.schemas.topics import Topic

COUNT, MIDDLE = 250, 130
HEADERS = [("kid", b"k1"), ("kid", b""), ("empty", None)]


async def read(bootstrap: str, topic: str, start: int, **options: Any) -> list[Any]:
    """Everything from an offset on."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="none", **options)
    await consumer.start()
    try:
        tp = TopicPartition(topic, 0)
        consumer.assign([tp])
        consumer.seek(tp, start)
        found: list[Any] = []
        async with asyncio.timeout(30):
            while not found or found[-1].offset < COUNT - 1:
                got = await consumer.getmany(timeout_ms=500, max_records=60)
                found += got.get(tp, [])
        return found
    finally:
        await consumer.stop()


def told(records: list[Any]) -> list[tuple[Any, ...]]:
    return [
        (each.offset, each.timestamp, each.timestamp_type, each.key, each.value, list(each.headers)) for each in records
    ]


async def test_parsed_records_say_what_records_say(kafka: str) -> None:
    """Offsets, append times, keys, values and headers are equal, from the middle of a batch too; no record is built twice."""
    topic = f"parsed.{uuid4().hex[:8]}"
    await Admin(kafka, {}).make(
        [Topic(topic, "any", "any", settings={"message.timestamp.type": "LogAppendTime"})], 1, 1
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka, linger_ms=20)
    await producer.start()
    try:
        sent = [
            await producer.send(
                topic,
                None if number % 6 == 1 else b"v%d" % number,
                key=b"k%d" % number if number % 3 else None,
                headers=HEADERS if number % 5 == 0 else [],
                partition=0,
            )
            for number in range(COUNT)
        ]
        await asyncio.gather(*sent)
    finally:
        await producer.stop()
    plain = await read(kafka, topic, 0)
    parsed = await read(kafka, topic, 0, value_deserializer=as_parsed)
    assert len(plain) == COUNT
    assert all(isinstance(each, ConsumerRecord) for each in plain)
    assert not any(isinstance(each, ConsumerRecord) for each in parsed)
    assert told(parsed) == told(plain)
    assert told(await read(kafka, topic, MIDDLE, value_deserializer=as_parsed)) == told(plain[MIDDLE:])
