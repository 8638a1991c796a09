"""What `tollway doctor` asks Kafka: brokers, topics, replicas, rights, its clock, and what the log says about itself."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.errors import CoordinatorNotAvailableError, TransactionalIdAuthorizationFailed
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource, ResourceType

from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.kafka import Admin, epoch_of, open_growth, read_newest
from tollway.connectors.rights import CLUSTER, KAFKA, KafkaRight, kafka_rights
from tollway.connectors.topic_id import NO_ID
from tollway.schemas import codec
from tollway.schemas.command import LogConfig, parse_body
from tollway.schemas.topics import CHECKPOINTS, TOPICS, USAGE, log_topic
from tollway.streams.directory import Directory
from tollway.streams.examination import ALL, CLOCKS_APART_MAX_S, DEADLINE_S, FAILED, Examination, one_line
from tollway.streams.settings import Settings
from tollway.streams.status import checkpoints_of
from tollway.streams.topic_faults import topics_faults
from tollway.streams.wiring import kafka_admin

RECENT_S = 60
"""With workers running a record comes at least every TOLLWAY_TICK_IDLE_S: an older one tells nothing about clocks."""
NOT_YET = (KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS)
"""The first question about a group wakes its coordinator."""


@dataclass
class LogFacts:
    """What the log says about itself, as far as it could be read. `meters`: meter → event name at Stripe."""

    config: LogConfig | None = None
    keys: dict[str, str] = field(default_factory=dict)
    meters: dict[str, str | None] | None = None


async def kafka(exam: Examination) -> LogFacts:
    """All that is asked; what stands on a failed answer, or needs a right that the role lacks, is not asked."""
    settings = exam.settings
    cure = "start it, or correct TOLLWAY_KAFKA_BOOTSTRAP and the other TOLLWAY_KAFKA_ settings"
    admin = await exam.ask("kafka", connect(settings), cure)
    if admin is FAILED:
        return LogFacts()
    cluster = await exam.ask("kafka", admin.cluster(), cure)
    if cluster is FAILED:
        return LogFacts()
    exam.well("kafka", f"it answers at {settings.kafka_bootstrap}, brokers: {len(cluster.brokers)}")
    wanted = rights_of(exam.role)
    if CLUSTER in wanted:
        await _broker_settings(exam, admin.client, cluster)
    if not await _topics(exam, cluster, wanted):
        return LogFacts()
    counts = {name: len(topic.partitions) for name, topic in cluster.topics.items()}
    growth = await exam.ask("kafka", open_growth(admin, counts), f"allow this user Describe on {USAGE.name}*")
    if growth is FAILED:
        return LogFacts()
    log = log_topic(growth)
    names = {topic.name: topic.name for topic in TOPICS} | {USAGE.name: log}
    _replicas(exam, cluster, list(names.values()))
    topic_id = await _rights(exam, admin.client, wanted, names)
    if may(wanted, "Read", USAGE.name):
        await _clock(exam, log, counts[log])
    if topic_id is None or not may(wanted, "Read", CHECKPOINTS.name):
        return LogFacts()
    return await _log(exam, log, epoch_of(topic_id, growth), wanted)


def rights_of(role: str) -> list[KafkaRight]:
    """The rights to ask for."""
    return kafka_rights(KAFKA if role == ALL else [role])


def may(wanted: list[KafkaRight], operation: str, topic: str) -> bool:
    """Whether the role has this right."""
    return any(right.kind == "topic" and right.name == topic and operation in right.operations for right in wanted)


async def connect(settings: Settings) -> Admin:
    """An admin client that waits less than a look; nothing is sent yet. Raises Refused where its settings cannot be used."""
    try:
        settings.kafka_security()  # the consumers' side reads the CA file here
        return kafka_admin(settings.model_copy(update={"kafka_admin_timeout_s": DEADLINE_S - 1}))
    except (OSError, ValueError) as error:
        text = f"the TLS or SASL settings cannot be used ({one_line(error)})"
        raise Refused(f"{text}: correct TOLLWAY_KAFKA_CA_FILE and the other TOLLWAY_KAFKA_ settings") from error


async def _broker_settings(exam: Examination, client: AdminClient, cluster: ClusterMetadata) -> None:
    """No topics out of typing errors; the cluster's own topics are as safe as ours."""
    least = exam.settings.replication
    if len(cluster.brokers) < least:
        what = f"it has {len(cluster.brokers)} brokers, TOLLWAY_REPLICATION is {least}"
        exam.ill("kafka", what, "start the others, or lower TOLLWAY_REPLICATION")
    broker = ConfigResource(ResourceType.BROKER, str(min(cluster.brokers)))
    future = client.describe_configs([broker], request_timeout=DEADLINE_S)[broker]
    cure = "allow this user DescribeConfigs on the cluster"
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


async def _topics(exam: Examination, cluster: ClusterMetadata, wanted: list[KafkaRight]) -> bool:
    """Whether the topics that the role needs are there; what is unsafe about them is found, where it may look."""
    needed = [topic for topic in TOPICS if may(wanted, "DescribeConfigs", topic.name)]
    if not needed:
        return _log_is_there(exam, cluster)
    faults = await exam.ask("kafka", topics_faults(exam.settings), "allow this user Describe and DescribeConfigs")
    if faults is FAILED:
        return False
    for fault in faults:
        exam.ill("kafka", f"{fault.topic}: {fault.what} ({fault.why})", fault.cure)
    if not faults:
        exam.well("kafka", f"the log's {len(TOPICS)} topics have the settings they need")
    return not any(fault.setting == "topic" for fault in faults)


def _log_is_there(exam: Examination, cluster: ClusterMetadata) -> bool:
    """For who writes to the log and sees nothing else."""
    if USAGE.name in cluster.topics:
        return True
    cure = f"run `tollway topics create`, or allow this user Write on the topic {USAGE.name}"
    exam.ill("kafka", f"topic {USAGE.name} is not there, or this user may not see it", cure)
    return False


def _replicas(exam: Examination, cluster: ClusterMetadata, topics: list[str]) -> None:
    """Each partition has a leader, as many copies as we want, all of them up to date."""
    least, faults = exam.settings.replication, []
    for topic in topics:
        if topic not in cluster.topics:
            continue
        rows = cluster.topics[topic].partitions.values()
        headless = sorted(row.id for row in rows if row.leader < 0)
        behind = sorted(row.id for row in rows if len(row.isrs) < len(row.replicas))
        if headless:
            faults.append((f"{topic}: no leader for partitions {headless}", "start the brokers that have them"))
        elif behind:
            faults.append((f"{topic}: copies of partitions {behind} are behind", "start the missing brokers"))
        if any(len(row.replicas) < least for row in rows):
            what = f"{topic}: less than {least} copies of a partition (TOLLWAY_REPLICATION)"
            faults.append((what, "reassign its partitions to more brokers"))
    for what, cure in faults:
        exam.ill("kafka", what, cure)
    if not faults:
        exam.well("kafka", "every partition has its leader and its copies")


async def _rights(
    exam: Examination, client: AdminClient, wanted: list[KafkaRight], names: dict[str, str]
) -> str | None:
    """What the brokers say this user may do with topics and groups; the log's topic id, where it can be told.

    `names`: topic as rights name it → as it is called now.
    """
    rights = {names[right.name]: right for right in wanted if right.kind == "topic" and right.name in names}
    asked = client.describe_topics(
        TopicCollection(list(rights)), include_authorized_operations=True, request_timeout=DEADLINE_S
    )
    topic_id, lacking = "", False
    for name, future in asked.items():
        cure = f"allow this user {' and '.join(rights[name].operations)} on the topic {name}"
        told = await exam.ask("kafka", asyncio.to_thread(future.result), cure)
        if told is FAILED:
            lacking = True
            continue
        have = {each.name for each in told.authorized_operations or ()}
        missing = [each for each in rights[name].operations if have and upper(each) not in have]
        if missing:
            lacking = True
            exam.ill("kafka", f"this user lacks {' and '.join(missing)} on the topic {name}", cure)
        if name == names[USAGE.name]:
            topic_id = str(told.topic_id)
    for right in wanted:
        if right.kind in ("group", "transactional-id"):
            cure = f"allow this user {' and '.join(right.operations)} on the {right.kind} {right.name}"
            told = await exam.ask("kafka", _asked(exam.settings, client, right), cure)
            lacking = lacking or told is FAILED
    if not lacking:
        exam.well("kafka", f"this user may do with topics and groups what the role {exam.role} needs")
    if topic_id == NO_ID:
        cure = "run Kafka 2.8 or newer: an id tells a recreated log from the old"
        exam.ill("kafka", "the brokers give topics no ids", cure)
        return None
    return topic_id or None


def upper(operation: str) -> str:
    """DescribeConfigs → DESCRIBE_CONFIGS, as librdkafka says it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()


async def _asked(settings: Settings, client: AdminClient, right: KafkaRight) -> None:
    """Raises Refused where this user lacks a right on a group, or sees nothing of a transactional id."""
    name = f"{right.name}doctor" if right.prefixed else right.name
    if right.kind == "group":
        await asyncio.to_thread(_group, client, name)
        return
    finder = AIOKafkaClient(bootstrap_servers=settings.kafka_bootstrap, **settings.kafka_security())
    try:
        await finder.bootstrap()
        await finder.coordinator_lookup(CoordinationType.TRANSACTION, name)
    except TransactionalIdAuthorizationFailed as error:
        raise Refused(f"this user lacks Write on the transactional-id {right.name}*: allow it") from error
    except CoordinatorNotAvailableError:
        return  # allowed to ask; the first question wakes it
    finally:
        await finder.close()


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
        if AclOperation.READ not in (told.authorized_operations or {AclOperation.READ}):
            raise Refused(f"this user lacks Read on the group {name}: allow it")
        return


async def _clock(exam: Examination, log: str, partitions: int) -> None:
    """A broker's clock shows in append times: one in our future is a fault, an old one tells nothing."""
    settings = exam.settings
    newest = await exam.ask(
        "kafka",
        read_newest(settings.kafka_bootstrap, settings.kafka_security(), log, range(partitions), 1),
        f"see whether its listeners are advertised under addresses that can be reached from here, and that {log} can be read",
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


async def _log(exam: Examination, topic: str, epoch: str, wanted: list[KafkaRight]) -> LogFacts:
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
    if facts.config is None and may(wanted, "Read", USAGE.name):  # nothing is folded yet: its first record says it
        first = await exam.ask("log", _opened(exam.settings, topic), "run `tollway topics create`")
        if first is FAILED:
            return LogFacts()
        facts.config, facts.keys = first, {first.kid: first.public_key}
    exam.well(
        "log", f"log {epoch} is open, its checkpoint is at offset {found['accounts', 0].next_offset} of partition 0"
    )
    return facts


async def _opened(settings: Settings, topic: str) -> Any:
    """The configuration that partition 0 begins with. Raises Refused where its first record is no log.open."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False, **settings.kafka_security()
    )
    try:
        await consumer.start()
        tp = TopicPartition(topic, 0)
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
