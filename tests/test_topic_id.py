"""A topic's id, asked again and again over one connection."""

import asyncio
import gc
from pathlib import Path
from uuid import uuid4

import confluent_kafka
import pytest

from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.kafka import Admin
from tollway.connectors.topic_id import NO_ID, TopicIds
from tollway.schemas.topics import Topic

ASKED = 300


async def test_it_is_the_brokers_id_and_another_one_when_made_anew(kafka: str) -> None:
    """The same text as the admin client's; a topic that is gone is refused by name, one made anew has another id."""
    topic, admin, ids = f"named.{uuid4().hex[:8]}", Admin(kafka, {}), TopicIds(kafka, {}, 10)
    try:
        with pytest.raises(Refused, match=rf"topic {topic} is not there: run `tollway topics create`"):
            await ids.topic_id(topic)
        await admin.make([Topic(topic, "any", "any")], 3, 1)
        first = await admin.new_topic_id(topic)
        assert await ids.topic_id(topic) == first != NO_ID
        admin.client.delete_topics([topic])[topic].result()
        await admin.make([Topic(topic, "any", "any")], 3, 1)
        async with asyncio.timeout(30):
            while (second := await admin.new_topic_id(topic)) == first:
                await asyncio.sleep(0.05)
        assert await ids.topic_id(topic) == second
    finally:
        await ids.close()


async def test_asking_leaves_nothing_behind(kafka: str) -> None:
    """The admin client keeps every id that it has told for ever; the folds ask ten times a second."""
    topic, ids = f"asked.{uuid4().hex[:8]}", TopicIds(kafka, {}, 10)
    await Admin(kafka, {}).make([Topic(topic, "any", "any")], 16, 1)
    try:
        found = {await ids.topic_id(topic) for _ in range(20)}
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(ASKED):
            found.add(await ids.topic_id(topic))
        gc.collect()
        assert len(gc.get_objects()) - before < ASKED / 10
        assert len(found) == 1
        assert not any(isinstance(each, confluent_kafka.Uuid) and str(each) in found for each in gc.get_objects())
    finally:
        await ids.close()


async def test_away_is_unavailable_and_back_is_answered_anew(tmp_path: Path) -> None:
    """A broker that is not there yet, and one that ended and came back, need no new asker."""
    port = free_port()
    ids = TopicIds(f"127.0.0.1:{port}", {}, 5)
    try:
        with pytest.raises(Unavailable, match="no broker says what topic t is"):
            await ids.topic_id("t")
        found = []
        for turn in range(2):
            with KafkaBroker(tmp_path / "kafka", port) as broker:
                admin = Admin(broker.bootstrap, {})
                if not turn:
                    await admin.make([Topic("t", "any", "any")], 1, 1)
                await admin.new_topic_id("t")
                found.append(await ids.topic_id("t"))
            with pytest.raises(Unavailable):
                await ids.topic_id("t")
        assert found[0] == found[1]
    finally:
        await ids.close()
