"""The log of one partition from an offset on: from Kafka where it has it, before that from ClickHouse's byte-equal copy."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import Refused, Unavailable
from tollway.streams.audit import LOG_SCHEMA, records_of
from tollway.streams.refold import Row

PAGE_ROWS = 20_000
FETCH_MS = 500
_ROWS = f"""
SELECT {", ".join(LOG_SCHEMA.names)} FROM usage_log FINAL
WHERE epoch = {{epoch:String}} AND kafka_partition = {{partition:UInt16}}
    AND kafka_offset BETWEEN {{first:UInt64}} AND {{last:UInt64}}
ORDER BY kafka_offset
"""


async def bounds(
    bootstrap: str, security: dict[str, Any], topic: str, partitions: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """partition → (first offset that Kafka has, offset behind the last). Raises Unavailable."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, **security)
    places = [TopicPartition(topic, number) for number in partitions]
    try:
        await consumer.start()
        begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        return {place.partition: (begins[place], ends[place]) for place in places}
    except KafkaError as error:
        raise Unavailable(f"no offsets of {topic}: {error}") from error
    finally:
        await consumer.stop()


async def log_pages(
    bootstrap: str,
    security: dict[str, Any],
    store: AuditStore,
    log: tuple[str, str],
    partition: int,
    start: int,
    kafka: tuple[int, int],
) -> AsyncIterator[Sequence[Row]]:
    """Records from `start` to the end that `kafka` names (see `bounds`). Raises Refused where the copy has a gap.

    `log`: its topic and its epoch.
    """
    (topic, epoch), (first, end) = log, kafka
    async for page in _stored(store, epoch, partition, start, min(first, end)):
        yield page
    async for page in _kept(bootstrap, security, topic, partition, max(start, first), end):
        yield page


async def _stored(store: AuditStore, epoch: str, partition: int, start: int, end: int) -> AsyncIterator[list[Row]]:
    while start < end:
        last = min(start + PAGE_ROWS, end) - 1
        place = {"epoch": epoch, "partition": partition, "first": start, "last": last}
        records = records_of(await asyncio.to_thread(lambda: store.arrow(_ROWS, **place)))  # noqa: B023 run at once
        if records.offsets.tolist() != list(range(start, last + 1)):
            raise Refused(
                f"partition {partition}: neither Kafka nor ClickHouse has all of offsets {start} to {last}: "
                "rebuild --from a later snapshot, or restore them"
            )
        columns = (records.offsets.tolist(), records.append_ms.tolist(), records.keys, records.values, records.headers)
        yield [Row(*fields) for fields in zip(*columns, strict=True)]
        start = last + 1


async def _kept(
    bootstrap: str, security: dict[str, Any], topic: str, partition: int, start: int, end: int
) -> AsyncIterator[list[Row]]:
    if start >= end:
        return
    place = TopicPartition(topic, partition)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="none", **security
    )
    try:
        await consumer.start()
        consumer.assign([place])
        consumer.seek(place, start)
        while start < end:
            got = await consumer.getmany(place, timeout_ms=FETCH_MS, max_records=PAGE_ROWS)
            page = [
                Row(record.offset, record.timestamp, record.key, record.value, record.headers)
                for record in got.get(place, ())
                if record.offset < end
            ]
            if page:
                if page[0].offset != start:
                    raise Refused(f"partition {partition}: Kafka goes on at {page[0].offset}, not {start}: a gap")
                start = page[-1].offset + 1
                yield page
    except KafkaError as error:
        raise Unavailable(f"{topic} cannot be read: {error}") from error
    finally:
        await consumer.stop()
