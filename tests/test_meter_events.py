"""Looking back into the topic of meter events: every event of the account since that time, nothing of others."""

import time

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.stripe_world import Topic
from tollway.connectors.embedded.process import LOOPBACK, free_port
from tollway.connectors.errors import Unavailable
from tollway.connectors.kafka import started_producer
from tollway.connectors.meter_events import EARLY_S, meter_events_since
from tollway.schemas import codec
from tollway.schemas.meter_event import MeterEvent
from tollway.schemas.topics import METER_EVENTS

PARTITION = 1


@pytest.fixture
async def producer(kafka: str) -> AIOKafkaProducer:
    """A writer to the topic, made where it is not there yet; append times are the test's, to look back in time."""
    admin = AdminClient({"bootstrap.servers": kafka})
    if METER_EVENTS.name not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(METER_EVENTS.name, 4, 1)])[METER_EVENTS.name].result(10)
    made = await started_producer(kafka, {})
    yield made
    await made.stop()


async def write(producer: AIOKafkaProducer, event: MeterEvent, append_s: int) -> None:
    await producer.send_and_wait(
        METER_EVENTS.name,
        codec.encode("MeterEvent", dict(event)),
        key=event["account"].encode(),
        partition=PARTITION,
        timestamp_ms=append_s * 1000,
    )


async def test_an_accounts_events_since_an_hour_are_found(kafka: str, producer: AIOKafkaProducer) -> None:
    """From an hour before the time asked for, to the end as it is now, each as often as it was written."""
    now_s, topic = int(time.time()), Topic()
    ages_s = [3 * 86_400, 7200 + EARLY_S + 60, 7200 + EARLY_S - 60, 7200, 60, 60]
    events = [topic.publish(account="look-back", at_s=now_s - age_s) for age_s in ages_s[:-1]]
    events.append(events[-1])
    for event, age_s in zip(events, ages_s, strict=True):
        await write(producer, event, now_s - age_s)
        await write(producer, topic.publish(account="somebody-else", at_s=now_s), now_s - age_s)
    found = await meter_events_since(kafka, {}, PARTITION, "look-back", now_s - 7200)
    assert found == events[2:]
    assert await meter_events_since(kafka, {}, PARTITION, "look-back", now_s - 30 * 86_400) == events
    assert await meter_events_since(kafka, {}, PARTITION, "look-back", now_s + 2 * EARLY_S) == []
    assert await meter_events_since(kafka, {}, PARTITION + 1, "look-back", 0) == []


async def test_without_kafka_it_is_unavailable() -> None:
    """No broker is a reason to try again, not an empty history."""
    with pytest.raises(Unavailable):
        await meter_events_since(f"{LOOPBACK}:{free_port()}", {}, PARTITION, "a1", 0)
