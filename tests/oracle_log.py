"""A topic read to its end, as often as wanted, with confluent-kafka and explicit partitions: no group, no commits."""

import time

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from tests.oracle_book import Record

BATCH, WAIT_S, ASK_S = 2_000, 0.1, 5.0
STALLED_S = 30.0
"""No record within this time before the end: the broker is not answering."""
RENEWALS = 3
"""New clients that one reading may take; a client that has just begun may know no partitions either."""


class Log:
    """One topic from its first record on. `read()` returns what has been appended since the last call."""

    def __init__(self, bootstrap: str, topic: str, gapless: bool = False, base: int = 0) -> None:
        """`base` is added to the numbers of its partitions."""
        self.bootstrap, self.topic, self.gapless, self.base = bootstrap, topic, gapless, base
        self.consumer, self._admin = self._consumer(), self._asker()
        listed = self.consumer.list_topics(topic, timeout=15).topics[topic]
        if listed.error:
            raise KafkaException(listed.error)
        self.partitions = len(listed.partitions)
        self.next = dict.fromkeys(range(self.partitions), 0)
        self._found: list[Record] = []
        self._assign()

    def _consumer(self) -> Consumer:
        return Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": "oracle",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "fetch.message.max.bytes": 16_777_216,
                "log_level": 2,
            }
        )

    def _asker(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 2})

    def _assign(self) -> None:
        self.consumer.assign([TopicPartition(self.topic, number, offset) for number, offset in self.next.items()])

    def ends(self) -> dict[int, int]:
        """High watermark of every partition, asked of the broker: not on the consumer's connection, behind its idle fetches."""
        asked = {TopicPartition(self.topic, number): OffsetSpec.latest() for number in range(self.partitions)}
        answers = self._admin.list_offsets(asked, request_timeout=ASK_S)
        return {at.partition: answer.result().offset for at, answer in answers.items()}

    def read(self) -> list[Record]:
        """Records appended up to the ends as they are now, each partition's in offset order.

        Raises KafkaException while the broker is away; what it had given by then comes with the next call.
        """
        for left in reversed(range(RENEWALS + 1)):
            try:
                self._read()
                break
            except (KafkaException, TimeoutError):
                if not left:
                    raise
                # A client whose broker died may believe for minutes that the topic has no partitions.
                self.consumer.close()
                self.consumer, self._admin = self._consumer(), self._asker()
                self._assign()
        found, self._found = self._found, []
        return found

    def _read(self) -> None:
        missing = {number for number, end in self.ends().items() if end > self.next[number]}
        ends = self.ends()
        until = time.monotonic() + STALLED_S
        while missing:
            messages = self.consumer.consume(BATCH, WAIT_S)  # waits for all of the batch, or this long
            if messages:
                until = time.monotonic() + STALLED_S
            elif time.monotonic() > until:
                raise TimeoutError(f"{self.topic}: nothing for {STALLED_S} s before the end of {sorted(missing)}")
            for message in messages:
                number = message.partition()
                if message.error() is None:
                    self._found.append(self._record(message))
                    self.next[number] = message.offset() + 1
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    self.next[number] = max(self.next[number], message.offset())
                else:
                    raise KafkaException(message.error())
                if self.next[number] >= ends[number]:
                    missing.discard(number)

    def _record(self, message) -> Record:  # type: ignore[no-untyped-def]
        kind, append_ms = message.timestamp()
        if kind != TIMESTAMP_LOG_APPEND_TIME:
            raise AssertionError(f"{self.topic} must carry log append times")
        number, offset = message.partition(), message.offset()
        if self.gapless and offset != self.next[number]:
            raise AssertionError(f"{self.topic}/{number}: offset {offset} follows {self.next[number] - 1}")
        headers = tuple((name, value or b"") for name, value in message.headers() or ())
        return Record(self.base + number, offset, append_ms, message.key(), message.value(), headers)

    def close(self) -> None:
        self.consumer.close()
