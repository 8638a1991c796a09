"""What is unsafe about the topics, why, and what to do: said by `topics check`, refused by `topics create` and workers."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tollway.connectors.errors import Refused
from tollway.connectors.kafka import MIN_ISR, REPLICATION_MIN, Placed
from tollway.schemas.lane import LANES
from tollway.schemas.topics import USAGE, Topic, growths, log_topic, topics_of
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin

WHY = {
    "message.timestamp.type": "windows close by the brokers' clock; emitters' clocks would move them",
    "retention.ms": "records would be deleted by their age, read or not",
    "retention.bytes": "records would be deleted for their size, read or not",
    "max.message.bytes": "a record of that size would be refused, and its partition stop",
    "segment.bytes": "the newest segment is never compacted, and each start reads it whole",
    "unclean.leader.election.enable": "a broker that is behind could lead, and acknowledged records be gone",
    "min.insync.replicas": "an acknowledged record may have one copy, which is lost with its broker",
}
CLEANUP_WHY = {
    "delete": "compaction would keep an account's newest record alone",
    "compact": "what no newer record replaces must be kept for ever",
}
AT_LEAST, AT_MOST = {"max.message.bytes"}, {"segment.bytes"}


@dataclass(frozen=True)
class TopicFault:
    """One thing that is unsafe. `setting` is Kafka's name, or `partitions`, `replicas`, `topic`."""

    topic: str
    setting: str
    what: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.what} ({self.why}): {self.cure}"

    def to_json(self) -> dict[str, str]:
        """With the whole sentence as `text`."""
        return {**asdict(self), "text": str(self)}


def setting_faults(topic: Topic, actual: Mapping[str, str | None], *, single_broker: bool) -> list[TopicFault]:
    """Settings of a topic that lose, refuse or reorder records. `actual`: as the brokers have them."""
    wanted = dict(topic.settings)
    if not single_broker:
        wanted["min.insync.replicas"] = str(MIN_ISR)
    faults = []
    for name, value in wanted.items():
        found = actual.get(name)
        least, most = name in AT_LEAST or name == "min.insync.replicas", name in AT_MOST
        if found == value or (least and _number(found) > int(value)) or (most and 0 < _number(found) < int(value)):
            continue
        bound = "at least " if least else "at most " if most else ""
        why = CLEANUP_WHY[value] if name == "cleanup.policy" else WHY[name]
        cure = f"kafka-configs.sh --alter --entity-type topics --entity-name {topic.name} --add-config {name}={value}"
        faults.append(TopicFault(topic.name, name, f"{name} is {found}, must be {bound}{value}", why, cure))
    return faults


def log_of(present: Iterable[str]) -> tuple[Topic, ...]:
    """The table, with the log's topic under the name that it has after its latest growth step."""
    return topics_of(log_topic(next(iter(growths(present)), 0)))


def placement_faults(present: Mapping[str, Placed], *, single_broker: bool) -> list[TopicFault]:
    """Topics that are missing, in the wrong number of partitions, or in too few copies."""
    topics = log_of(present)
    faults = [
        TopicFault(
            topic.name,
            "topic",
            "it is not there, or this user may not see it",
            "the log is all of its topics",
            "run `tollway topics create`, or allow this user Describe on it",
        )
        for topic in topics
        if topic.name not in present
    ]
    there = {topic.name: present[topic.name] for topic in topics if topic.name in present}
    usage = topics[0].name
    count = there[usage].partitions if usage in there else None
    for name, placed in there.items():
        found = placed.partitions
        if not 0 < found <= LANES or found & (found - 1):
            what = f"it has {found} partitions, must be a power of two of at most {LANES}"
            why, cure = (
                "an account's lane would be on another partition for each client",
                "create the log anew with another count",
            )
            faults.append(TopicFault(name, "partitions", what, why, cure))
        elif count is not None and found != count and usage == USAGE.name:  # a grown one: `kafka.current_log`
            what = f"it has {found} partitions, must be {count} like {usage}"
            faults.append(
                TopicFault(name, "partitions", what, "partition n of each topic is one state", "create it anew")
            )
        if not single_broker and placed.copies < REPLICATION_MIN:
            what = f"a partition has {placed.copies} copies, must be at least {REPLICATION_MIN}"
            cure = "kafka-reassign-partitions.sh to more brokers, or declare a single broker (TOLLWAY_REPLICATION=1)"
            faults.append(TopicFault(name, "replicas", what, "the log is lost with the disks that hold it", cure))
    return faults


async def topics_faults(settings: Settings) -> list[TopicFault]:
    """What is missing or unsafe. Raises Unavailable, or Refused where this user may not look."""
    admin = kafka_admin(settings)
    refuse_replication(settings.replication)
    single_broker = settings.replication == 1
    present = await admin.topics()
    faults = placement_faults(present, single_broker=single_broker)
    for topic in log_of(present):
        if topic.name in present:
            actual = await admin.settings_of(topic.name)
            faults += setting_faults(topic, actual, single_broker=single_broker)
    return faults


async def refuse_unsafe(settings: Settings) -> None:
    """Raises Refused with every reason: what folds on such topics may lose records later, without a word."""
    faults = await topics_faults(settings)
    if faults:
        raise Refused(unsafe(faults))


def unsafe(faults: Iterable[TopicFault]) -> str:
    """One sentence of all faults."""
    return "the topics are unsafe: " + "; ".join(str(fault) for fault in faults)


def refuse_replication(replication: int) -> None:
    """Raises Refused for two copies: they either stop at the first loss or lose."""
    if 1 < replication < REPLICATION_MIN:
        raise Refused(
            f"TOLLWAY_REPLICATION is {replication}, which stops or loses when a broker is away:"
            f" give at least {REPLICATION_MIN}, or 1 to declare a single broker"
        )


def _number(text: Any) -> int:
    return int(text) if str(text).lstrip("-").isdigit() else 0
