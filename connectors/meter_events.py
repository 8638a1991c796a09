"""The topic `billing.meter_events`, looked back into: an account's meter events since some hour."""

from typing import Any, cast

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from tollway.connectors.errors import Unavailable
from tollway.schemas import codec
from tollway.schemas.meter_event import MeterEvent
from tollway.schemas.topics import METER_EVENTS

EARLY_S = 3600
"""A record is appended after the usage it sums, but for clocks that differ: far more than they may."""
FETCH_MS = 500


async def meter_events_since(
    bootstrap: str, security: dict[str, Any], partition: int, account: str, since_s: int
) -> list[MeterEvent]:
    """The account's meter events with usage since `since_s`, and perhaps older ones, as often as the topic has them.

    Reads the partition from that time to its end as of now; only the account's records are decoded. Raises Unavailable.
    """
    place = TopicPartition(METER_EVENTS.name, partition)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="none", **security
    )
    found: list[MeterEvent] = []
    try:
        await consumer.start()
        consumer.assign([place])
        end = (await consumer.end_offsets([place]))[place]
        first = (await consumer.offsets_for_times({place: max(0, since_s - EARLY_S) * 1000}))[place]
        if first is None:
            return []
        consumer.seek(place, first.offset)
        while await consumer.position(place) < end:
            for record in (await consumer.getmany(place, timeout_ms=FETCH_MS)).get(place, ()):
                if record.key == account.encode() and record.value:
                    found.append(cast(MeterEvent, codec.decode(record.value)[1]))
    except KafkaError as error:
        raise Unavailable(f"{METER_EVENTS.name} cannot be read: {error}") from error
    finally:
        await consumer.stop()
    return found
