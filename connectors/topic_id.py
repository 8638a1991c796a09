"""Which topic a name stands for, asked over one connection, as often as wanted.

The admin client's answer cannot be used for that: confluent-kafka (2.16) never lets go of a topic id that it has handed out,
and the folds ask before every effect.
"""

import asyncio
import base64
from contextlib import suppress
from io import BytesIO
from typing import Any, ClassVar

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from tollway.connectors.errors import Refused, Unavailable

UNKNOWN_TOPIC, DENIED = 3, 29
NO_ID = "A" * 22
"""A topic id of zeros: none."""
CLOSE_S = 2.0


class _Uuid(AbstractType[str]):  # type: ignore[misc]
    """Sixteen bytes ⇄ Kafka's base64 text without padding."""

    @classmethod
    def encode(cls, value: str) -> bytes:
        return base64.b64decode(f"{value}==")

    @classmethod
    def decode(cls, data: BytesIO) -> str:
        return base64.b64encode(data.read(16))[:22].decode()


class _Told(Response):  # type: ignore[misc]
    """Metadata of one topic up to its id; what follows, a few bytes for each partition, is not looked at."""

    API_KEY, API_VERSION = 3, 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        ("topics", CompactArray(("error_code", Int16), ("name", CompactString()), ("topic_id", _Uuid))),
    )


class _Question(RequestStruct):  # type: ignore[misc]
    """Metadata, in the version that tells ids (KIP-516)."""

    API_KEY, API_VERSION, FLEXIBLE_VERSION = 3, 12, True
    RESPONSE_TYPE = _Told
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _Asking(Request[_Question]):  # type: ignore[misc]
    API_KEY: ClassVar[int] = 3

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def build(self, request_struct_class: type[_Question]) -> _Question:
        return request_struct_class([(NO_ID, self._topic, {})], False, False, {})


class TopicIds:
    """Connects at the first question, and anew after one that was not answered."""

    def __init__(self, bootstrap: str, security: dict[str, Any], timeout_s: float) -> None:
        """`security` as aiokafka takes it."""
        self._bootstrap, self._security, self._timeout_s = bootstrap, security, timeout_s
        self._client: AIOKafkaClient | None = None
        self._node: int | None = None
        """The broker that is asked; None until the client knows one."""
        self._asking = asyncio.Lock()

    async def topic_id(self, topic: str) -> str:
        """Kafka's text of the id. Raises Refused where there is no such topic for this user, Unavailable where none answers."""
        async with self._asking:
            try:
                async with asyncio.timeout(self._timeout_s):
                    client, node = await self._connected()
                    answer = await client.send(node, _Asking(topic))
            except (KafkaError, TimeoutError, OSError) as error:
                await self.close()
                raise Unavailable(f"no broker says what topic {topic} is: {type(error).__name__} {error}") from error
        code, _, topic_id, *_ = answer.topics[0]
        if code == UNKNOWN_TOPIC:
            raise Refused(f"topic {topic} is not there: run `tollway topics create`")
        if code == DENIED:
            raise Refused(f"topic {topic} is not shown to this user: allow this user Describe on {topic}")
        if code:
            raise Unavailable(f"topic {topic}: Kafka's error {code}")
        return str(topic_id)

    async def _connected(self) -> tuple[AIOKafkaClient, int]:
        if self._client is None or self._node is None:
            await self.close()  # one whose start was cut off
            self._client = AIOKafkaClient(
                bootstrap_servers=self._bootstrap, request_timeout_ms=int(self._timeout_s * 1000), **self._security
            )
            await self._client.bootstrap()
            self._node = int(self._client.get_random_node())
        return self._client, self._node

    async def close(self) -> None:
        """Open again at the next question."""
        client, self._client, self._node = self._client, None, None
        if client is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(client.close(), CLOSE_S)
