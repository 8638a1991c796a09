"""The least rights of each role at Kafka, Redis and ClickHouse: what operating.md lists, the doctor asks for and a test applies."""

from collections.abc import Iterable
from dataclasses import dataclass

from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, METER_EVENTS, TOPICS, USAGE

ROLES = {
    "emitter": "a service that emits, or ingest",
    "accounts": "worker of the group accounts",
    "audit": "worker of the group audit",
    "stripe": "worker of the group stripe",
    "gate": "a service that asks and captures",
    "control": "the control plane: topics, commands, migrations",
    "look": "people who look: status, dlq, quota, usage, audit verify",
}


@dataclass(frozen=True)
class KafkaRight:
    """Operations on one resource, in Kafka's words. `kind`: topic, group, transactional-id or cluster.

    Read and Write bring Describe with them.
    """

    kind: str
    name: str
    operations: tuple[str, ...]
    prefixed: bool = False

    def __str__(self) -> str:
        return f"{self.kind} `{self.name}{'*' if self.prefixed else ''}`: {', '.join(self.operations)}"


def _topics(**operations: str) -> tuple[KafkaRight, ...]:
    """A worker sees all topics and their settings, since it refuses unsafe ones; what else it may do is named."""
    extra = {topic.name: operations.get(topic.name.replace(".", "_"), "").split() for topic in TOPICS}
    return tuple(
        KafkaRight("topic", name, (*(more or ["Describe"]), "DescribeConfigs"), name == USAGE.name)
        for name, more in extra.items()
    )


def _log(*operations: str) -> KafkaRight:
    """A log that has grown is `usage.events.1`, `.2` …: whoever may use one may use the next."""
    return KafkaRight("topic", USAGE.name, operations, prefixed=True)


_HOST = (
    KafkaRight("topic", "tollway.control", ("Create", "Read")),
    KafkaRight("group", "tollway-folds-", ("Read",), prefixed=True),
)
"""Faust's own: an empty topic, and a group a process."""
CLUSTER = KafkaRight("cluster", "kafka-cluster", ("DescribeConfigs",))

KAFKA: dict[str, tuple[KafkaRight, ...]] = {
    "emitter": (_log("Write"),),
    "accounts": (
        *_topics(
            usage_events="Read Write",
            billing_meter_events="Write",
            dead_letters="Write",
            tollway_checkpoints="Read Write",
        ),
        KafkaRight("group", "tollway.accounts", ("Read",)),
        *_HOST,
    ),
    "audit": (
        *_topics(usage_events="Read Write", tollway_checkpoints="Read Write"),
        KafkaRight("group", "tollway.audit", ("Read",)),
        *_HOST,
    ),
    "stripe": (
        *_topics(billing_meter_events="Read", tollway_checkpoints="Read Write"),
        KafkaRight("group", "tollway.stripe", ("Read",)),
        KafkaRight("transactional-id", "stripe-", ("Write",), prefixed=True),
        *_HOST,
    ),
    "control": (
        _log("Create", "Read", "Write", "AlterConfigs", "DescribeConfigs"),
        KafkaRight("topic", METER_EVENTS.name, ("Create", "Read", "DescribeConfigs")),
        KafkaRight("topic", DEAD_LETTERS.name, ("Create", "Read", "Alter", "DescribeConfigs")),
        KafkaRight("topic", CHECKPOINTS.name, ("Create", "Read", "Write", "Alter", "DescribeConfigs")),
        CLUSTER,
    ),
    "look": _topics(usage_events="Read", billing_meter_events="Read", dead_letters="Read", tollway_checkpoints="Read"),
}
"""role → what its user must be allowed, and nothing else."""

_COMMANDS = "-@all +@read +@write +@connection -@dangerous -@admin -@scripting +time"
_SCRIPTS = "+eval +evalsha +script|load"
REDIS: dict[str, str] = {
    "accounts": f"~tw:* {_COMMANDS} {_SCRIPTS} +info +config|get",
    "gate": (
        "%R~tw:{???}:m %R~tw:{???}:p:* ~tw:{???}:g ~tw:{???}:s:* ~tw:{???}:h:* ~tw:{???}:hx ~tw:{???}:fx ~tw:{???}:i:*"
        f" %R~tw:b:* {_COMMANDS} {_SCRIPTS}"
    ),
    "look": "%R~tw:* -@all +@read +@connection -@dangerous -@admin +time",
}
"""role → rules of `ACL SETUSER`. The gate reads limits and the lane's state, and cannot write them."""

CLICKHOUSE: dict[str, tuple[str, ...]] = {
    "audit": ("GRANT SELECT, INSERT ON tollway.* TO audit", "GRANT SELECT ON system.disks TO audit"),
    "control": (
        "GRANT CREATE DATABASE, CREATE TABLE, CREATE VIEW, DROP VIEW, ALTER TABLE, SELECT, INSERT ON tollway.* TO control",
    ),
    "look": ("GRANT SELECT ON tollway.* TO look", "GRANT SELECT ON system.disks TO look"),
}
"""role → statements for a user of the role's name, and the database `tollway`."""


def kafka_rights(roles: Iterable[str]) -> list[KafkaRight]:
    """What all of these roles together need: one right a resource."""
    found: dict[tuple[str, str, bool], dict[str, None]] = {}
    for role in roles:
        for right in KAFKA.get(role, ()):
            operations = found.setdefault((right.kind, right.name, right.prefixed), {})
            operations.update(dict.fromkeys(right.operations))
    return [KafkaRight(kind, name, tuple(wanted), prefixed) for (kind, name, prefixed), wanted in found.items()]
