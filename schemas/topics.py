"""The topics, in the order of the flow: one table that the admin, the workers and the docs read."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Topic:
    """A topic as it must be: `settings` are Kafka's own names. `keyed` topics share one partition count."""

    name: str
    key: str
    records: str
    keyed: bool = True
    settings: dict[str, str] = field(default_factory=dict)


USAGE = Topic(
    "usage.events",
    key="account; `*` = broadcast command; `tick`",
    records="UsageEvent, Command, tick (null)",
    settings={
        "message.timestamp.type": "LogAppendTime",  # else a replayed spool is deleted by its own age
        "retention.ms": "-1",  # trimmed only behind what `audit verify` has proven
        "retention.bytes": "-1",
        "cleanup.policy": "delete",
        "max.message.bytes": "131072",
        "unclean.leader.election.enable": "false",
    },
)
METER_EVENTS = Topic(
    "billing.meter_events",
    key="account",
    records="MeterEvent",
    settings={
        "message.timestamp.type": "LogAppendTime",
        "retention.ms": "-1",
        "retention.bytes": "-1",
        "cleanup.policy": "delete",
        "unclean.leader.election.enable": "false",
    },
)
DEAD_LETTERS = Topic(
    "dead.letters",
    key="epoch, partition, offset",
    records="original bytes; reason, source, attempts in headers",
    settings={
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "compact",
        "max.message.bytes": "262144",
        "unclean.leader.election.enable": "false",
    },
)
CHECKPOINTS = Topic(
    "tollway.checkpoints",
    key="group, epoch, partition, slot",
    records="state",
    settings={
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "compact",
        "max.message.bytes": "16777216",
        "segment.bytes": "67108864",
        "unclean.leader.election.enable": "false",
    },
)
TOPICS = (USAGE, METER_EVENTS, DEAD_LETTERS, CHECKPOINTS)


def log_topic(growth: int) -> str:
    """The log's topic after so many growth steps: `usage.events`, `usage.events.1` …"""
    return f"{USAGE.name}.{growth}" if growth else USAGE.name


def growths(names: Iterable[str]) -> list[int]:
    """Growth steps of the logs among topics' names, the latest first."""
    after = f"{USAGE.name}."
    found = {int(name[len(after) :]) for name in names if name.startswith(after) and name[len(after) :].isdecimal()}
    return sorted({*found, *([0] if USAGE.name in names else [])}, reverse=True)


def topics_of(log: str) -> tuple[Topic, ...]:
    """The table for a log whose topic has another name."""
    return (replace(USAGE, name=log), *TOPICS[1:])


TICK_KEY = b"tick"
BROADCAST = "*"
PARTITIONS_EMBEDDED = 16
PARTITIONS_PRODUCTION = 64
