"""Kafka: topics made and checked, topic ids, and the readers and writers that the folds use."""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaConnectionError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.errors import KafkaError as ClientError
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import TopicPartition as Place
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ClusterMetadata,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from tollway.connectors.closing import close
from tollway.connectors.errors import Refused, TollwayError, Unavailable
from tollway.schemas.topics import CHECKPOINTS, METER_EVENTS, TOPICS, USAGE, Topic, growths, log_topic

REQUEST_BYTES_MAX = 17 * 1024 * 1024
CHECKPOINT_TAIL = 64
"""Newest records of a checkpoint partition that are read first; all of it only where they hold no valid one."""
ADMIN_TIMEOUT_S = 15.0
CUT_OFF_S = 2.0
SAID_MAX = 16
REPLICATION_MIN, MIN_ISR = 3, 2
"""Outside a single broker: with fewer copies an acknowledged record can be lost with one machine."""
AWAY = (
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._RESOLVE,
    KafkaError._AUTHENTICATION,
)
DENIED = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
UNREACHED = (
    ("_AUTHENTICATION", "correct TOLLWAY_KAFKA_SASL_USERNAME, _PASSWORD and _MECHANISM"),
    ("_SSL", "correct TOLLWAY_KAFKA_CA_FILE, or TOLLWAY_KAFKA_SECURITY_PROTOCOL where the broker talks no TLS"),
)


@dataclass(frozen=True)
class Placed:
    """Where a topic is: `copies` = replicas of the partition that has fewest."""

    partitions: int
    copies: int


class Admin:
    """confluent-kafka's admin client (aiokafka gives no topic ids), one call at a time in a thread.

    Every method raises Unavailable where no broker answers within `timeout_s`, Refused in one sentence with the cure where
    the brokers refuse.
    """

    def __init__(
        self, bootstrap: str, security: dict[str, Any] | None = None, *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> None:
        self._bootstrap, self._timeout_s = bootstrap, timeout_s
        said = self.said = deque[str](maxlen=SAID_MAX)
        """What the client complained about last, in its words: it tells a refused password from a broker that is away."""

        def hear(
            error: KafkaError,
        ) -> None:  # knows nothing of this object: its threads end with it, not with the collector
            said.append(f"{error.name()} {error.str()}")

        try:
            self.client = AdminClient(
                {"bootstrap.servers": bootstrap, "log_level": 0, "error_cb": hear, **(security or {})}
            )
        except KafkaException as error:
            raise Refused(
                f"the TLS or SASL settings cannot be used ({error.args[0].str()}): correct TOLLWAY_KAFKA_CA_FILE and the"
                " other TOLLWAY_KAFKA_ settings"
            ) from error

    async def topics(self) -> dict[str, Placed]:
        """Topics that this user may see."""
        metadata = await self.cluster()
        return {
            name: Placed(
                len(topic.partitions), min((len(row.replicas) for row in topic.partitions.values()), default=0)
            )
            for name, topic in metadata.topics.items()
        }

    async def cluster(self) -> ClusterMetadata:
        """Brokers, and the topics that this user may see with their partitions."""
        self.said.clear()
        try:
            return await asyncio.to_thread(self.client.list_topics, timeout=self._timeout_s)
        except KafkaException as error:
            raise self.unreached(error) from error

    def unreached(self, error: KafkaException) -> TollwayError:
        """What it means that no broker answered: Refused for a password or a certificate, else Unavailable."""
        self.client.poll(0)  # hands over what it has complained about
        for words, cure in UNREACHED:
            found = next((said for said in reversed(self.said) if words in said), None)
            if found:
                return Refused(f"no way into Kafka at {self._bootstrap} ({_bare(found)}): {cure}")
        return Unavailable(f"no Kafka at {self._bootstrap}: {error.args[0].str()}")

    async def partitions(self) -> dict[str, int]:
        """topic → partition count."""
        return {name: placed.partitions for name, placed in (await self.topics()).items()}

    async def create(self, partitions: int, replication: int) -> list[str]:
        """Create the topics that are not there yet, as the table says; returns their names."""
        present = await self.partitions()
        for topic in TOPICS:
            if topic.name in present and present[topic.name] != partitions:
                raise Refused(
                    f"topic {topic.name} has {present[topic.name]} partitions, not {partitions}: "
                    "a log grows by `topics grow`, never in place"
                )
        missing = [topic for topic in TOPICS if topic.name not in present]
        await self.make(missing, partitions, replication)
        return [topic.name for topic in missing]

    async def make(self, topics: Iterable[Topic], partitions: int, replication: int) -> None:
        """Create topics that are not there."""
        minimum = {"min.insync.replicas": str(MIN_ISR)} if replication >= REPLICATION_MIN else {}
        new = [NewTopic(topic.name, partitions, replication, config={**topic.settings, **minimum}) for topic in topics]
        futures = self.client.create_topics(new, operation_timeout=self._timeout_s) if new else {}
        for name, future in futures.items():
            await self._answer(future, f"topic {name} was not created", f"allow this user Create on {name}")

    async def widen(self, topic: str, partitions: int) -> None:
        """More partitions for a topic whose records name theirs: `partitions` in all."""
        future = self.client.create_partitions([NewPartitions(topic, partitions)])[topic]
        await self._answer(future, f"{topic} got no more partitions", f"allow this user Alter on {topic}")

    async def set(self, topic: str, name: str, value: str) -> None:
        """Change one setting of a topic; the others stay."""
        entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        future = self.client.incremental_alter_configs([resource], request_timeout=self._timeout_s)[resource]
        await self._answer(future, f"{name} of {topic} was not set", f"allow this user AlterConfigs on {topic}")

    async def new_topic_id(self, topic: str) -> str:
        """`topic_id` of a topic that may have been created just now: brokers learn of it a moment later."""
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                return await self.topic_id(topic)
            except Refused:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def topic_id(self, topic: str) -> str:
        """The broker's id of a topic: a recreated topic has another one."""
        from confluent_kafka import TopicCollection

        futures = self.client.describe_topics(TopicCollection([topic]), request_timeout=self._timeout_s)
        cure = f"allow this user Describe on {topic}"
        found = await self._answer(futures[topic], f"topic {topic} is not there", cure, "run `tollway topics create`")
        return str(found.topic_id)

    async def ends(self, topic: str, partitions: int) -> dict[int, int]:
        """partition → end offset (the next record's)."""
        asked = {Place(topic, number): OffsetSpec.latest() for number in range(partitions)}
        futures = self.client.list_offsets(asked, request_timeout=self._timeout_s)
        what, right = f"the ends of {topic} cannot be read", f"allow this user Describe on {topic}"
        return {place.partition: (await self._answer(future, what, right)).offset for place, future in futures.items()}

    async def settings_of(self, topic: str) -> dict[str, str]:
        """A topic's settings as the broker has them."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        future = self.client.describe_configs([resource], request_timeout=self._timeout_s)[resource]
        cure = f"allow this user DescribeConfigs on the topic {topic}"
        found = await self._answer(future, f"the settings of {topic} cannot be read", cure)
        return {name: entry.value for name, entry in found.items()}

    async def _answer(self, future: Any, what: str, right: str, cure: str = "see the brokers' logs") -> Any:
        """`right`: the cure where the brokers say that this user may not."""
        try:
            return await asyncio.to_thread(future.result, self._timeout_s)
        except KafkaException as error:
            fault = error.args[0]
            if fault.code() in AWAY:
                raise self.unreached(error) from error
            text = f"{what} ({fault.name()}: {fault.str().rstrip('.: ')})"
            raise Refused(f"{text}: {right if fault.code() in DENIED else cure}") from error
        except TimeoutError as error:
            raise Unavailable(f"{what}: no answer of Kafka at {self._bootstrap} in {self._timeout_s:g} s") from error


def _bare(said: str) -> str:
    """What librdkafka says, without its own places and advice."""
    return re.sub(
        r"^\w+ (\S+/bootstrap: |sasl_\w+://\S+: |ssl://\S+: )*|\(after.*|: [^:]*verify that.*", "", said
    ).strip()[:160]


def epoch_of(topic_id: str, growth: int = 0) -> str:
    """Epoch of a log: its growth step and the topic's id."""
    return f"{growth}-{topic_id}"


async def started_producer(bootstrap: str, security: dict[str, Any], **options: Any) -> AIOKafkaProducer:
    """An idempotent producer, acks=all. Raises Unavailable where no broker answers, Refused where this user may write nothing."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        acks="all",
        max_request_size=REQUEST_BYTES_MAX,
        **security,
        **options,
    )
    try:
        await producer.start()
    except asyncio.CancelledError:
        await close(producer, CUT_OFF_S)
        raise
    except (KafkaConnectionError, AssertionError) as error:  # aiokafka asserts that it knows a broker: none is back yet
        await producer.stop()
        raise Unavailable(f"no Kafka at {bootstrap}: {error}") from error
    except (ClusterAuthorizationFailedError, TransactionalIdAuthorizationFailed) as error:
        await producer.stop()
        text = f"this user may not write to Kafka at {bootstrap} ({type(error).__name__})"
        raise Refused(f"{text}: allow it Write on its topics, and on its transactional-id where it has one") from error
    return producer


async def read_newest(
    bootstrap: str,
    security: dict[str, Any],
    topic: str,
    partitions: Iterable[int],
    tail: int | None,
    *,
    committed: bool = False,
    starts: Mapping[int, int] | None = None,
    keep: Callable[[ConsumerRecord], bool] = lambda _: True,
) -> dict[int, list[ConsumerRecord]]:
    """Records of partitions, in log order, up to the ends seen at the start: the last `tail` offsets or all.

    One manually assigned reader for all partitions; `committed`: transactions that did not commit are left out; `starts`:
    partition → first offset; `keep` says which records are worth their memory.
    """
    starts = starts or {}
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        auto_offset_reset="none",
        isolation_level="read_committed" if committed else "read_uncommitted",
        max_partition_fetch_bytes=REQUEST_BYTES_MAX,
        fetch_max_bytes=4 * REQUEST_BYTES_MAX,
        enable_auto_commit=False,
        **security,
    )
    try:
        await consumer.start()
        consumer.assign(wanted)
        ends = await consumer.end_offsets(wanted)
        begins = await consumer.beginning_offsets(wanted)
        left = set()
        for tp in wanted:
            start = max(begins[tp], starts.get(tp.partition, 0), ends[tp] - tail if tail is not None else 0)
            consumer.seek(tp, start)
            if start < ends[tp]:
                left.add(tp)
        found: dict[int, list[ConsumerRecord]] = {tp.partition: [] for tp in wanted}
        while left:
            got = await consumer.getmany(timeout_ms=500)
            for tp, records in got.items():
                found[tp.partition] += [record for record in records if keep(record)]
            left = {tp for tp in left if await consumer.position(tp) < ends[tp]}
        return found
    except ClientError as error:
        raise Unavailable(f"{topic} cannot be read: {error}") from error
    finally:
        await consumer.stop()


async def read_checkpoints(
    bootstrap: str, security: dict[str, Any], partitions: Iterable[int], tail: int | None, *, committed: bool = False
) -> dict[int, list[tuple[bytes, bytes]]]:
    """(key, value) of checkpoint records, in log order."""
    found = await read_newest(bootstrap, security, CHECKPOINTS.name, partitions, tail, committed=committed)
    return {
        number: [(record.key, record.value) for record in records if record.key] for number, records in found.items()
    }


async def ends(bootstrap: str, security: dict[str, Any], topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """partition → end offset (the next record's)."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, **security)
    try:
        await consumer.start()
        wanted = [TopicPartition(topic, partition) for partition in partitions]
        return {tp.partition: end for tp, end in (await consumer.end_offsets(wanted)).items()}
    except ClientError as error:
        raise Unavailable(f"no end offsets of {topic}: {error}") from error
    finally:
        await consumer.stop()


@dataclass(frozen=True)
class CurrentLog:
    """The log that takes usage now. What bills does not grow with it: the sender's topic keeps its count and its epoch."""

    topic: str
    growth: int
    partitions: int
    epoch: str
    origin: str
    """Epoch of the first log: that of meter events and of their sender."""
    billing_partitions: int


async def current_log(admin: Admin) -> CurrentLog:
    """The latest growth step whose every partition is open. Raises Refused where the topics are not there or do not agree."""
    present = await admin.partitions()
    if USAGE.name not in present:
        raise Refused(f"topic {USAGE.name} is not there: run `tollway topics create`")
    grown, growth = growths(present), await open_growth(admin, present)
    topic = log_topic(growth)
    count, origin = present[topic], epoch_of(await admin.topic_id(USAGE.name))
    wrong = [
        other.name for other in TOPICS[1:] if not _fits(other.name, present.get(other.name), count, len(grown) > 1)
    ]
    if wrong:
        raise Refused(f"{', '.join(wrong)}: missing or not {count} partitions like {topic}")
    epoch = epoch_of(await admin.topic_id(topic), growth) if growth else origin
    return CurrentLog(topic, growth, count, epoch, origin, present[METER_EVENTS.name])


async def open_growth(admin: Admin, present: dict[str, int]) -> int:
    """The latest growth step whose every partition is open; 0, the first log, where there is no other. `present`: topic → count."""
    for growth in growths(present):
        topic = log_topic(growth)
        if growth and all((await admin.ends(topic, present[topic])).values()):
            return growth
    return 0


def _fits(topic: str, found: int | None, count: int, grown: bool) -> bool:
    """Whether a topic's partition count goes with the log's: equal, but for what growing makes of them."""
    if found is None or not grown:
        return found == count
    return found <= count if topic == METER_EVENTS.name else found >= count


async def log_partitions(admin: Admin) -> int:
    """Partition count of the log. Raises as `current_log`."""
    return (await current_log(admin)).partitions
