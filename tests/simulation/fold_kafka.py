"""Kafka in memory: topics with offsets and append times, transactions that fence, acknowledgements that are lost, compaction."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from aiokafka.errors import KafkaError, KafkaTimeoutError, ProducerFenced

from tests.simulation.fold_loop import Process
from tests.simulation.fold_network import Away, Network
from tollway.connectors.errors import Refused, Unavailable

Place = tuple[str, int]
"""topic, partition"""


@dataclass(slots=True)
class Record:
    """As the broker gives it. `writer` is (transactional id, its epoch) until the transaction is committed."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    writer: tuple[str, int] | None = None


@dataclass
class Partition:
    """`start` = first offset that is still there."""

    records: list[Record] = field(default_factory=list)
    start: int = 0
    end: int = 0

    def fetch(self, offset: int, most: int) -> list[Record]:
        if len(self.records) == self.end - self.start:  # nothing was compacted
            return self.records[offset - self.start : offset - self.start + most]
        return [record for record in self.records if record.offset >= offset][:most]


class Cluster:
    """One broker. `clock_ms` stamps records; `heard` is told of each that is appended, and of commits."""

    def __init__(self, network: Network, clock_ms: Callable[[], int]) -> None:
        self.network, self.clock_ms = network, clock_ms
        self.partitions: dict[Place, Partition] = defaultdict(Partition)
        self.topic_ids: dict[str, str] = {}
        self.away = False
        self.heard: list[Callable[[str, int, Record], None]] = []
        self._epochs: dict[str, int] = {}

    # The broker's side.

    def append(
        self, place: Place, key: bytes | None, value: bytes | None, headers: Any, writer: tuple[str, int] | None = None
    ) -> Record:
        """One record more."""
        found = self.partitions[place]
        record = Record(found.end, self.clock_ms(), key, value, tuple((n, v) for n, v in headers), writer)
        found.records.append(record)
        found.end += 1
        if writer is None:
            self._tell(*place, record)
        return record

    def _tell(self, topic: str, partition: int, record: Record) -> None:
        for hear in self.heard:
            hear(topic, partition, record)

    def fence(self, transactional_id: str) -> int:
        """A new writer of an id: the open transaction of the former is aborted."""
        epoch = self._epochs[transactional_id] = self._epochs.get(transactional_id, 0) + 1
        for found in self.partitions.values():
            found.records = [r for r in found.records if r.writer is None or r.writer[0] != transactional_id]
        return epoch

    def check_writer(self, writer: tuple[str, int] | None) -> None:
        """Raises ProducerFenced where a newer writer has the id."""
        if writer is not None and self._epochs[writer[0]] != writer[1]:
            raise ProducerFenced

    def commit(self, writer: tuple[str, int]) -> None:
        self.check_writer(writer)
        for place, found in list(self.partitions.items()):
            for record in found.records:
                if record.writer == writer:
                    record.writer = None
                    self._tell(*place, record)

    def compact(self, topic: str, newest: int) -> None:
        """Keep the last of each key, and all of the newest."""
        for (name, _), found in self.partitions.items():
            if name == topic:
                last = {record.key: record.offset for record in found.records}
                found.records = [
                    r
                    for r in found.records
                    if r.offset >= found.end - newest or (last[r.key] == r.offset and r.value is not None)
                ]

    def recreate(self, topic: str) -> None:
        """Deleted and made anew under the same name."""
        self.topic_ids[topic] += "-again"
        for place, found in self.partitions.items():
            if place[0] == topic:
                self.partitions[place] = Partition(start=0, end=found.end)

    # What clients are given in place of the network's own functions.

    async def call(self, serve: Callable[[], Any], fate: str | None = None) -> Any:
        """Raises KafkaError where no answer came."""
        try:
            return await self.network.call(serve, away=self.away, fate=fate)
        except Away as error:
            raise KafkaTimeoutError(str(error)) from error

    async def started_producer(self, bootstrap: str, security: Any, **options: Any) -> "Producer":
        """In place of `connectors.kafka.started_producer`."""
        name = options.get("transactional_id")
        try:
            epoch = await self.call((lambda: self.fence(name)) if name else (lambda: 0))
        except KafkaError as error:
            raise Unavailable(f"no Kafka: {error}") from error
        return Producer(self, (name, epoch) if name else None)

    async def read_checkpoints(
        self, bootstrap: str, security: Any, partitions: Iterable[int], tail: int | None, *, committed: bool = False
    ) -> dict[int, list[tuple[bytes, bytes]]]:
        """In place of `connectors.kafka.read_checkpoints`."""
        wanted = list(partitions)

        def serve() -> dict[int, list[tuple[bytes, bytes]]]:
            found = {}
            for number in wanted:
                part = self.partitions["tollway.checkpoints", number]
                first = part.end - tail if tail is not None else 0
                found[number] = [
                    (r.key, r.value)
                    for r in part.records
                    if r.offset >= first and r.key and not (committed and r.writer)
                ]
            return found  # type: ignore[return-value]

        try:
            return await self.call(serve)  # type: ignore[no-any-return]
        except KafkaError as error:
            raise Unavailable(f"checkpoints cannot be read: {error}") from error

    async def values_since(self, place: Place, key: bytes) -> list[bytes]:
        """All values of one key."""
        try:
            return await self.call(  # type: ignore[no-any-return]
                lambda: [r.value for r in self.partitions[place].records if r.key == key and r.value]
            )
        except KafkaError as error:
            raise Unavailable(f"{place[0]} cannot be read: {error}") from error


class TopicIds:
    """In place of `connectors.topic_id.TopicIds`."""

    cluster: Cluster

    def __init__(self, *_: Any, **__: Any) -> None: ...

    async def topic_id(self, topic: str) -> str:
        found = self.cluster.topic_ids
        try:
            known: str | None = await self.cluster.call(lambda: found.get(topic))
        except KafkaError as error:
            raise Unavailable(f"no Kafka: {error}") from error
        if known is None:
            raise Refused(f"topic {topic} is not there")
        return known

    async def close(self) -> None: ...


class Producer:
    """An idempotent producer: batches of a partition in order; one that failed takes the rest of its partition with it."""

    def __init__(self, cluster: Cluster, writer: tuple[str, int] | None) -> None:
        self._cluster, self._writer = cluster, writer
        self._waiting: list[tuple[Place, Any, asyncio.Future[Any]]] = []
        self._broken: set[Place] = set()
        self._sending: asyncio.Task[None] | None = None

    async def send(
        self, topic: str, value: bytes | None = None, *, key: bytes | None = None, partition: int, headers: Any = ()
    ) -> asyncio.Future[Any]:
        Process.current()
        done = self._cluster.network.loop.create_future()
        self._waiting.append(((topic, partition), (key, value, headers), done))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())
        return done

    async def send_and_wait(self, topic: str, value: bytes | None = None, **about: Any) -> Any:
        return await (await self.send(topic, value, **about))

    async def _send(self) -> None:
        while self._waiting:
            batches: dict[Place, list[Any]] = defaultdict(list)
            for place, record, done in self._waiting:
                batches[place].append((record, done))
            self._waiting = []
            await asyncio.gather(*(self._request(place, batch) for place, batch in batches.items()))

    async def _request(self, place: Place, batch: list[Any]) -> None:
        failure: Exception | None = KafkaTimeoutError("a batch before it failed")
        answers: list[Record] = []
        if place not in self._broken:
            try:
                answers, failure = await self._cluster.call(lambda: self._serve(place, batch)), None
            except KafkaError as error:
                failure = error
                self._broken.add(place)
        for number, (_, done) in enumerate(batch):
            if done.done():
                continue
            if failure is not None:
                done.set_exception(failure)
                done.exception()  # an engine that gave up does not ask
            else:
                done.set_result(answers[number])

    def _serve(self, place: Place, batch: list[Any]) -> list[Record]:
        self._cluster.check_writer(self._writer)
        return [self._cluster.append(place, *record, writer=self._writer) for record, _ in batch]

    async def begin_transaction(self) -> None:
        Process.current()

    async def commit_transaction(self) -> None:
        assert self._writer is not None
        writer = self._writer
        await self._cluster.call(lambda: self._cluster.commit(writer))

    async def stop(self) -> None:
        """What was not sent yet is dropped."""
        for _, _, done in self._waiting:
            done.cancel()
        self._waiting = []
