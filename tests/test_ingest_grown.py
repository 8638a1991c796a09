"""HTTP ingest while its log gives way to a larger one: refused with 503, never lost, and in the new log without a restart."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.ingest_site import PARTITIONS, Edge, Site, edge_of, event
from tests.issuer import issuing
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.kafka import current_log, epoch_of, read_newest, started_producer
from tollway.schemas import codec
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, USAGE, log_topic, topics_of
from tollway.streams.bootstrap import create, new_command_id
from tollway.streams.grow import NOTHING
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin

MORE = 2 * PARTITIONS


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """On parts of its own: the test closes the log."""
    with KafkaBroker(tmp_path / "kafka") as broker, ValkeyServer(tmp_path / "valkey") as valkey, issuing() as issuer:
        made = Settings(data=tmp_path, kafka_bootstrap=broker.bootstrap, partitions=PARTITIONS, replication=1)
        done = await create(made)
        site = Site(tmp_path, broker.bootstrap, valkey.url, issuer, done["epoch"])
        await site.tell("acme", "account.open", {})
        await site.tell("acme", "customer.bind", {"customer": "cus_acme"})
        await site.bind("svc")
        async with edge_of(site) as found:
            yield found


async def open_larger(settings: Settings) -> None:
    """What `topics grow` does last: the next log, open in every partition."""
    admin = kafka_admin(settings)
    await admin.make(topics_of(log_topic(1))[:1], MORE, 1)
    for topic in (CHECKPOINTS.name, DEAD_LETTERS.name):
        await admin.widen(topic, MORE)
    epoch = epoch_of(await admin.new_topic_id(log_topic(1)), 1)
    signer = Signer.read(settings.data / "control.key")
    body = {"epoch": epoch, "deployment": "test", "kid": signer.kid, "public_key": signer.public_key}
    producer = await started_producer(settings.kafka_bootstrap, {})
    try:
        await Control(producer, signer, MORE, new_command_id, topic=log_topic(1)).open(body, list(range(MORE)))
    finally:
        await producer.stop()
    assert (await current_log(admin)).topic == log_topic(1)


async def test_ingest_goes_over_to_the_log_that_takes_usage(edge: Edge) -> None:
    """While no log takes usage nothing is answered as taken; then events and webhooks are in the larger one, each once."""
    settings = edge.site.settings
    await kafka_admin(settings).set(USAGE.name, "max.message.bytes", str(NOTHING))
    hook = {"id": "evt_1", "type": "charge.dispute.created", "created": 1, "data": {"object": {"customer": "cus_acme"}}}
    async with asyncio.timeout(30):
        while (await edge.post(event("before")))[0] != 503:
            await asyncio.sleep(0.05)
    assert (await edge.deliver(hook))[0] == 503
    await open_larger(settings)
    async with asyncio.timeout(30):
        while (await edge.post(event("behind")))[0] != 202:
            await asyncio.sleep(0.05)
        while (await edge.deliver(hook))[0] != 200:
            await asyncio.sleep(0.05)
    found = await read_newest(settings.kafka_bootstrap, {}, log_topic(1), range(MORE), None)
    there = [codec.decode(record.value)[1] for records in found.values() for record in records if record.value]
    assert [each["kind"] for each in there if each["account"] == "acme" and "kind" in each] == ["rail.event"]
    assert len([each for each in there if "quantities" in each]) == 1
