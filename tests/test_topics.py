"""Unsafe topics are refused on a real broker: each setting is made unsafe by an admin client and named with reason and cure."""

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.kafka import Admin, Placed
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, METER_EVENTS, TOPICS, USAGE
from tollway.streams.bootstrap import create
from tollway.streams.settings import Settings
from tollway.streams.topic_faults import (
    CLEANUP_WHY,
    WHY,
    placement_faults,
    refuse_unsafe,
    setting_faults,
    topics_faults,
)

PARTITIONS = 2
DEADLINE_S = 60
AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A broker of our own with a safe log on it; it asks an authorizer."""
    data = tmp_path_factory.mktemp("topics")
    with KafkaBroker(data / "kafka", settings=AUTHORIZER) as broker:
        settings = Settings(data=data, kafka_bootstrap=broker.bootstrap, partitions=PARTITIONS, replication=1)
        asyncio.run(create(settings))
        yield settings


def command(settings: Settings, *argv: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command as a person runs it: never a traceback."""
    told = {
        "TOLLWAY_DATA": str(settings.data),
        "TOLLWAY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "TOLLWAY_REPLICATION": str(settings.replication),
        "TOLLWAY_PARTITIONS": str(settings.partitions),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tollway.streams.cli", *argv],
        env={**os.environ, **told, **env},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


@asynccontextmanager
async def altered(settings: Settings, topic: str, name: str, value: str) -> AsyncIterator[None]:
    """One setting of a topic made another, and made well again."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})

    async def alter(operation: AlterConfigOpType, value: str | None) -> None:
        entry = ConfigEntry(name, value, incremental_operation=operation)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        await asyncio.to_thread(admin.incremental_alter_configs([resource])[resource].result, DEADLINE_S)

    safe = next(each for each in TOPICS if each.name == topic).settings.get(name)
    await alter(AlterConfigOpType.SET, value)
    try:
        yield
    finally:
        await alter(AlterConfigOpType.SET if safe else AlterConfigOpType.DELETE, safe)


UNSAFE = [
    (USAGE, "message.timestamp.type", "CreateTime"),
    (USAGE, "retention.ms", "604800000"),
    (USAGE, "retention.bytes", "1073741824"),
    (USAGE, "cleanup.policy", "compact"),
    (USAGE, "max.message.bytes", "65536"),
    (USAGE, "unclean.leader.election.enable", "true"),
    (METER_EVENTS, "retention.ms", "86400000"),
    (METER_EVENTS, "cleanup.policy", "compact,delete"),
    (DEAD_LETTERS, "cleanup.policy", "delete"),
    (CHECKPOINTS, "cleanup.policy", "compact,delete"),
    (CHECKPOINTS, "max.message.bytes", "1048576"),
    (CHECKPOINTS, "segment.bytes", "1073741824"),
    (CHECKPOINTS, "unclean.leader.election.enable", "true"),
]


@pytest.mark.parametrize(("topic", "name", "value"), UNSAFE, ids=[f"{row[0].name}-{row[1]}" for row in UNSAFE])
async def test_an_unsafe_setting(settings: Settings, topic: Any, name: str, value: str) -> None:
    """The one fault names topic, setting, value, what it must be, why, and the very command that cures it."""
    assert await topics_faults(settings) == []
    async with altered(settings, topic.name, name, value):
        (fault,) = await topics_faults(settings)
    assert (fault.topic, fault.setting) == (topic.name, name)
    assert f"{name} is {value}, must be " in fault.what
    assert fault.why in {*WHY.values(), *CLEANUP_WHY.values()}
    assert fault.cure.endswith(f"--entity-name {topic.name} --add-config {name}={topic.settings[name]}")


async def test_more_room_than_needed_is_safe(settings: Settings) -> None:
    """A larger record limit and a smaller checkpoint segment refuse nothing."""
    async with altered(settings, USAGE.name, "max.message.bytes", "1048576"):
        assert await topics_faults(settings) == []
    async with altered(settings, CHECKPOINTS.name, "segment.bytes", "16777216"):
        assert await topics_faults(settings) == []


async def test_everyone_refuses_an_unsafe_log(settings: Settings) -> None:
    """`topics check`, `topics create` and a worker say the same sentence and exit 1."""
    sentence = (
        "usage.events: retention.ms is 604800000, must be -1 (records would be deleted by their age, read or not)"
    )
    async with altered(settings, USAGE.name, "retention.ms", "604800000"):
        checked = await asyncio.to_thread(command, settings, "topics", "check")
        told = await asyncio.to_thread(command, settings, "topics", "check", "--json")
        refused = [
            await asyncio.to_thread(command, settings, *argv)
            for argv in (("topics", "create"), ("worker", "--group", "accounts"))
        ]
    assert (checked.returncode, told.returncode) == (1, 1)
    assert checked.stdout.startswith(sentence)
    assert [fault["setting"] for fault in json.loads(told.stdout)["faults"]] == ["retention.ms"]
    for done in refused:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"tollway: the topics are unsafe: {sentence}")
    assert command(settings, "topics", "check").stdout == "topics are as they must be\n"


def test_one_broker_must_be_declared(settings: Settings) -> None:
    """Without a word about it, copies and min ISR of a single broker are refused; declared, they are taken."""
    silent = settings.model_copy(update={"replication": 3})
    done = command(silent, "topics", "check", "--json")
    faults = json.loads(done.stdout)["faults"]
    assert done.returncode == 1
    assert {(fault["topic"], fault["setting"]) for fault in faults} == {
        (topic.name, setting) for topic in TOPICS for setting in ("replicas", "min.insync.replicas")
    }
    assert "a partition has 1 copies, must be at least 3" in faults[0]["what"]
    assert command(silent, "topics", "check", "--single-broker").returncode == 0
    assert Settings.model_fields["replication"].default == 3


async def test_min_isr(settings: Settings) -> None:
    """With min ISR 2 or more nothing is said about it; with 1 the reason is the copy that is lost."""
    three = settings.model_copy(update={"replication": 3})
    async with altered(settings, USAGE.name, "min.insync.replicas", "2"):
        found = await topics_faults(three)
    said = [fault for fault in found if fault.setting == "min.insync.replicas"]
    assert {fault.topic for fault in said} == {topic.name for topic in TOPICS} - {USAGE.name}
    assert said[0].what == "min.insync.replicas is 1, must be at least 2"


async def test_two_copies_are_refused(settings: Settings) -> None:
    """Two copies stop or lose when one broker is away: neither made nor checked."""
    two = settings.model_copy(update={"replication": 2})
    for work in (create(two), topics_faults(two)):
        with pytest.raises(Refused, match="TOLLWAY_REPLICATION is 2, which stops or loses when a broker is away: give"):
            await work


async def test_more_copies_than_brokers(settings: Settings, tmp_path: Path) -> None:
    """Three copies on one broker are refused by the broker, in one sentence."""
    with KafkaBroker(tmp_path) as bare:
        alone = Settings(data=tmp_path, kafka_bootstrap=bare.bootstrap, partitions=PARTITIONS)
        with pytest.raises(Refused, match=r"topic usage\.events was not created \(INVALID_REPLICATION_FACTOR: "):
            await create(alone)
        missing = await topics_faults(alone)
        assert {(fault.topic, fault.setting) for fault in missing} == {(topic.name, "topic") for topic in TOPICS}
        await _uneven(bare.bootstrap)
        found = {(fault.topic, fault.setting): fault.what for fault in await topics_faults(_declared(alone))}
        assert found[USAGE.name, "partitions"] == "it has 3 partitions, must be a power of two of at most 256"
        assert found[DEAD_LETTERS.name, "partitions"] == "it has 4 partitions, must be 3 like usage.events"
        assert (CHECKPOINTS.name, "topic") in found
        with pytest.raises(Refused, match="must be a power of two"):
            await refuse_unsafe(_declared(alone))
        with pytest.raises(Refused, match="a log grows by `topics grow`, never in place"):
            await create(_declared(alone))


def _declared(settings: Settings) -> Settings:
    return settings.model_copy(update={"replication": 1})


async def _uneven(bootstrap: str) -> None:
    """Three partitions of the log, and dead letters that were given two more."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    topics = [
        NewTopic(USAGE.name, 3, 1, config=USAGE.settings),
        NewTopic(DEAD_LETTERS.name, 2, 1, config=DEAD_LETTERS.settings),
    ]
    for future in admin.create_topics(topics).values():
        await asyncio.to_thread(future.result, DEADLINE_S)
    grown = admin.create_partitions([NewPartitions(DEAD_LETTERS.name, 4)])
    await asyncio.to_thread(grown[DEAD_LETTERS.name].result, DEADLINE_S)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (
            AclOperation.DESCRIBE_CONFIGS,
            "the settings of dead.letters cannot be read (TOPIC_AUTHORIZATION_FAILED: Topic authorization failed):"
            " allow this user DescribeConfigs on the topic dead.letters",
        ),
        (AclOperation.DESCRIBE, "dead.letters: it is not there, or this user may not see it"),
    ],
    ids=["settings", "sight"],
)
async def test_a_right_to_look_that_is_lacking(settings: Settings, operation: AclOperation, said: str) -> None:
    """Without the right to see a topic or its settings the check says which right, in one sentence."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    rules = [
        AclBinding(ResourceType.TOPIC, DEAD_LETTERS.name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", *each)
        for each in ((AclOperation.ALL, AclPermissionType.ALLOW), (operation, AclPermissionType.DENY))
    ]
    await asyncio.gather(*(asyncio.to_thread(each.result, DEADLINE_S) for each in admin.create_acls(rules).values()))
    try:
        done = await asyncio.to_thread(command, settings, "topics", "check")
    finally:
        every = AclBindingFilter(ResourceType.TOPIC, DEAD_LETTERS.name, ResourcePatternType.LITERAL, None, None, AclOperation.ANY, AclPermissionType.ANY)  # fmt: skip
        await asyncio.gather(
            *(asyncio.to_thread(each.result, DEADLINE_S) for each in admin.delete_acls([every]).values())
        )
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1


async def test_the_admin_waits_no_longer_than_it_is_told() -> None:
    """A broker that is away costs the setting's time-out and is said to be away."""
    admin = Admin(f"127.0.0.1:{free_port()}", timeout_s=0.3)
    with pytest.raises(Unavailable, match="no Kafka at"):
        await admin.partitions()


def test_every_setting_of_the_table_has_its_reason() -> None:
    """A topic with none of its settings is at fault for each of them, with a reason."""
    for topic in TOPICS:
        faults = setting_faults(topic, {}, single_broker=False)
        assert {fault.setting for fault in faults} == {*topic.settings, "min.insync.replicas"}
        assert all(fault.why for fault in faults)


def test_placement_is_judged_topic_by_topic() -> None:
    """A log of 256 partitions in three copies is well placed; 512 are too many, none is no power of two."""
    well = {topic.name: Placed(256, 3) for topic in TOPICS}
    assert placement_faults(well, single_broker=False) == []
    for count in (0, 3, 512):
        wrong = placement_faults({**well, USAGE.name: Placed(count, 3)}, single_broker=False)
        assert (wrong[0].topic, wrong[0].setting) == (USAGE.name, "partitions")


def test_a_client_that_is_let_go_of_leaves_no_thread() -> None:
    """Who waits for a Kafka that is away asks with a new client each time: each ends with its last mention, uncollected."""
    tasks = Path("/proc/self/task")
    gc.disable()  # a worker collects seldom
    try:
        asked = Admin("127.0.0.1:1", timeout_s=0.1)
        alone = len(list(tasks.iterdir()))
        for _ in range(5):
            asked = Admin("127.0.0.1:1", timeout_s=0.1)
            asked.client.poll(0)
        assert len(list(tasks.iterdir())) <= alone + 2
        del asked
    finally:
        gc.enable()
