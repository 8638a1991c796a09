"""What `tollway doctor` asks Kafka: brokers, topics, replicas, rights, its clock, and what the log says about itself."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource, ResourceType

from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.kafka import epoch_of, read_newest
from tollway.schemas import codec
from tollway.schemas.command import LogConfig, parse_body
from tollway.schemas.topics import TOPICS, USAGE
from tollway.streams.directory import Directory
from tollway.streams.examination import CLOCKS_APART_MAX_S, DEADLINE_S, FAILED, Examination, one_line
from tollway.streams.settings import Settings
from tollway.streams.status import checkpoints_of
from tollway.streams.topic_faults import topics_faults
from tollway.streams.worker import GROUPS

RECENT_S = 60
"""With workers running a record comes at least every TOLLWAY_TICK_IDLE_S: an older one tells nothing about clocks."""
RIGHTS = {AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE}
NO_ID = "A" * 22
"""A topic id of zeros: the broker has none."""
NOT_YET = (KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS)
"""The first question about a group wakes its coordinator."""


@dataclass
class LogFacts:
    """What the log says about itself, as far as it could be read. `meters`: meter → event name at Stripe."""

    config: LogConfig | None = None
    keys: dict[str, str] = field(default_factory=dict)
    meters: dict[str, str | None] | None = None


async def kafka(exam: Examination) -> LogFacts:
    """All that is asked; what stands on a failed answer is not asked."""
    settings = exam.settings
    cure = "start it, or correct TOLLWAY_KAFKA_BOOTSTRAP and the other TOLLWAY_KAFKA_ settings"
    client = await exam.ask("kafka", asyncio.to_thread(connect, settings), cure)
    if client is FAILED:
        return LogFacts()
    cluster = await exam.ask("kafka", asyncio.to_thread(metadata, client, settings.kafka_bootstrap), cure)
    if cluster is FAILED:
        return LogFacts()
    exam.well("kafka", f"it answers at {settings.kafka_bootstrap}, brokers: {len(cluster.brokers)}")
    await _broker_settings(exam, client, cluster)
    if not await _topics(exam):
        return LogFacts()
    _replicas(exam, cluster)
    epoch = await _rights(exam, client)
    partitions = len(cluster.topics[USAGE.name].partitions)
    await _clock(exam, partitions)
    return await _log(exam, epoch) if epoch else LogFacts()


def connect(settings: Settings) -> AdminClient:
    """An admin client; nothing is sent yet. Raises Refused where its settings cannot be used."""
    quiet = {"log_level": 0, "error_cb": lambda _: None}
    try:
        settings.kafka_security()  # the consumers' side reads the CA file here
        return AdminClient({"bootstrap.servers": settings.kafka_bootstrap, **quiet, **settings.admin_security()})
    except (KafkaException, OSError, ValueError) as error:
        text = f"the TLS or SASL settings cannot be used ({one_line(error)})"
        raise Refused(f"{text}: correct TOLLWAY_KAFKA_CA_FILE and the other TOLLWAY_KAFKA_ settings") from error


def metadata(client: AdminClient, where: str) -> ClusterMetadata:
    """Brokers, topics, partitions. Raises Unavailable where no broker answers."""
    try:
        return client.list_topics(timeout=DEADLINE_S - 1)
    except KafkaException as error:
        raise Unavailable(f"no Kafka at {where}: {one_line(error)}") from error


async def _broker_settings(exam: Examination, client: AdminClient, cluster: ClusterMetadata) -> None:
    """No topics out of typing errors; the cluster's own topics are as safe as ours."""
    least = exam.settings.replication
    if len(cluster.brokers) < least:
        what = f"it has {len(cluster.brokers)} brokers, TOLLWAY_REPLICATION is {least}"
        exam.ill("kafka", what, "start the others, or lower TOLLWAY_REPLICATION")
    broker = ConfigResource(ResourceType.BROKER, str(min(cluster.brokers)))
    future = client.describe_configs([broker], request_timeout=DEADLINE_S)[broker]
    cure = "allow this user DESCRIBE_CONFIGS on the cluster"
    told = await exam.ask("kafka", asyncio.to_thread(future.result), cure)
    if told is FAILED:
        return
    faults = broker_faults({name: entry.value for name, entry in told.items()}, least)
    for what in faults:
        exam.ill("kafka", what, "set it in the brokers' server.properties")
    if not faults:
        exam.well(
            "kafka", "brokers create no topics by themselves and keep offsets and transactions as safely as the log"
        )


def broker_faults(actual: dict[str, str | None], replication: int) -> list[str]:
    """What of a broker's settings is unsafe."""
    faults = []
    if actual.get("auto.create.topics.enable") != "false":
        faults.append("auto.create.topics.enable is on: a misspelt topic would be made, with unsafe settings")
    for name in ("offsets.topic.replication.factor", "transaction.state.log.replication.factor"):
        if int(actual.get(name) or 0) < replication:
            faults.append(f"{name} is {actual.get(name)}, less than TOLLWAY_REPLICATION ({replication})")
    return faults


async def _topics(exam: Examination) -> bool:
    """Whether the log's topics are all there; what is unsafe about them is found."""
    cure = "allow this user DESCRIBE and DESCRIBE_CONFIGS on the log's topics"
    faults = await exam.ask("kafka", topics_faults(exam.settings), cure)
    if faults is FAILED:
        return False
    missing = [fault for fault in faults if fault.setting == "topic"]
    for fault in faults:
        exam.ill("kafka", f"{fault.topic}: {fault.what} ({fault.why})", fault.cure)
    if not faults:
        exam.well("kafka", f"the log's {len(TOPICS)} topics have the settings they need")
    return not missing


def _replicas(exam: Examination, cluster: ClusterMetadata) -> None:
    """Each partition has a leader, as many copies as we want, all of them up to date."""
    least, faults = exam.settings.replication, []
    for topic in TOPICS:
        rows = cluster.topics[topic.name].partitions.values()
        headless = sorted(row.id for row in rows if row.leader < 0)
        behind = sorted(row.id for row in rows if len(row.isrs) < len(row.replicas))
        if headless:
            faults.append((f"{topic.name}: no leader for partitions {headless}", "start the brokers that have them"))
        elif behind:
            faults.append((f"{topic.name}: copies of partitions {behind} are behind", "start the missing brokers"))
        if any(len(row.replicas) < least for row in rows):
            what = f"{topic.name}: less than {least} copies of a partition (TOLLWAY_REPLICATION)"
            faults.append((what, "reassign its partitions to more brokers"))
    for what, cure in faults:
        exam.ill("kafka", what, cure)
    if not faults:
        exam.well("kafka", "every partition has its leader and its copies")


async def _rights(exam: Examination, client: AdminClient) -> str | None:
    """What the brokers say this user may do with topics and groups; the log's epoch, where it can be told."""
    names = TopicCollection([topic.name for topic in TOPICS])
    asked = client.describe_topics(names, include_authorized_operations=True, request_timeout=DEADLINE_S)
    topic_id, lacking = "", False
    for name, future in asked.items():
        cure = f"allow this user READ, WRITE and DESCRIBE on the topic {name}"
        told = await exam.ask("kafka", asyncio.to_thread(future.result), cure)
        if told is FAILED:
            lacking = True
            continue
        missing = sorted(right.name for right in RIGHTS - set(told.authorized_operations or RIGHTS))
        if missing:
            lacking = True
            exam.ill("kafka", f"this user lacks {' and '.join(missing)} on the topic {name}", cure)
        if name == USAGE.name:
            topic_id = str(told.topic_id)
    for group in GROUPS:
        name = f"tollway.{group}"
        cure = f"allow this user READ and DESCRIBE on the group {name}"
        told = await exam.ask("kafka", asyncio.to_thread(_group, client, name), cure)
        lacking = lacking or told is FAILED
    if not lacking:
        exam.well("kafka", "this user may read and write the log's topics and join its groups")
    if topic_id == NO_ID:
        exam.ill(
            "kafka",
            "the brokers give topics no ids",
            "run Kafka 2.8 or newer: an id tells a recreated log from the old",
        )
        return None
    return epoch_of(topic_id) if topic_id else None


def _group(client: AdminClient, name: str) -> None:
    """Raises Refused where this user may not read as this group. Waits for the group's coordinator."""
    until = time.monotonic() + DEADLINE_S
    while True:
        futures = client.describe_consumer_groups(
            [name], include_authorized_operations=True, request_timeout=DEADLINE_S
        )
        try:
            told = futures[name].result()
        except KafkaException as error:
            if error.args[0].code() in NOT_YET and time.monotonic() < until:
                time.sleep(0.2)
                continue
            raise Unavailable(f"group {name}: {one_line(error)}") from error
        if AclOperation.READ not in (told.authorized_operations or RIGHTS):
            raise Refused(f"this user lacks READ on the group {name}: allow it")
        return


async def _clock(exam: Examination, partitions: int) -> None:
    """A broker's clock shows in append times: one in our future is a fault, an old one tells nothing."""
    settings = exam.settings
    newest = await exam.ask(
        "kafka",
        read_newest(settings.kafka_bootstrap, settings.kafka_security(), USAGE.name, range(partitions), 1),
        f"see whether its listeners are advertised under addresses that can be reached from here, and that {USAGE.name} can be read",
    )
    times_ms = [record.timestamp for records in newest.values() for record in records] if newest is not FAILED else []
    if not times_ms:
        return
    age_s = exam.clock_s() - max(times_ms) / 1000
    if age_s < -CLOCKS_APART_MAX_S:
        exam.ill("kafka", f"its clock is {-age_s:.0f} s ahead of ours", "let a time server keep both clocks")
    elif age_s > RECENT_S:
        exam.well("kafka", f"its newest record is {age_s:.0f} s old: its clock does not show, no worker ticks")
    else:
        exam.well("kafka", f"its newest record is less than {RECENT_S} s old, none is in our future")


async def _log(exam: Examination, epoch: str) -> LogFacts:
    """Configuration, keys and meters, of partition 0: what concerns all accounts stands in every partition."""
    cure = "see `tollway status`; the state of partition 0 may be too large to read in time"
    found = await exam.ask("log", checkpoints_of(exam.settings, epoch, 1, ["accounts"]), cure)
    if found is FAILED:
        return LogFacts()
    if not found:
        cure = "run `tollway topics create`: it finishes what an interrupted run began"
        exam.ill("log", f"log {epoch} has no checkpoint for partition 0", cure)
        return LogFacts()
    directory = Directory.load(found["accounts", 0].state["directory"])
    facts = LogFacts(directory.config, directory.keys, directory.meters)
    if facts.config is None:  # nothing is folded yet: its first record says it
        first = await exam.ask("log", _opened(exam.settings), "run `tollway topics create`")
        if first is FAILED:
            return LogFacts()
        facts.config, facts.keys = first, {first.kid: first.public_key}
    exam.well(
        "log", f"log {epoch} is open, its checkpoint is at offset {found['accounts', 0].next_offset} of partition 0"
    )
    return facts


async def _opened(settings: Settings) -> Any:
    """The configuration that partition 0 begins with. Raises Refused where its first record is no log.open."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False, **settings.kafka_security()
    )
    try:
        await consumer.start()
        tp = TopicPartition(USAGE.name, 0)
        consumer.assign([tp])
        if (await consumer.end_offsets([tp]))[tp] == 0:
            raise Refused("partition 0 of the log has no log.open: run `tollway topics create`")
        consumer.seek(tp, (await consumer.beginning_offsets([tp]))[tp])
        record = await consumer.getone()
        command = codec.decode(record.value)[1] if record.value else {}
        if command.get("kind") != "log.open":
            raise Refused("the log does not begin with log.open (was it trimmed?): start the workers, then ask again")
        return LogConfig(**parse_body(command["body"]))
    finally:
        await consumer.stop()
