"""`tollway ingest`: the HTTP edge for services that are not Python, and for Stripe's webhooks."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import uvicorn
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from tollway.connectors.bindings import Bindings
from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.identity import Bearer
from tollway.connectors.ingest import Ingest
from tollway.connectors.jwks import Jwks
from tollway.connectors.kafka import Admin, CurrentLog, current_log, started_producer
from tollway.connectors.principal import bound_by
from tollway.connectors.stripe_webhook import PATH, StripeWebhook
from tollway.schemas.lane import lane, partition
from tollway.streams.accounts_look import accounts_of
from tollway.streams.bootstrap import new_command_id
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin, redis_client

log = logging.getLogger(__name__)

Sent = TypeVar("Sent")

CONNECTIONS_MAX = 1_000
"""Requests at a time; beyond it callers get 503 at once."""
GRACE_S = 5
GROWN_LOOK_S = 1.0
"""While a log refuses usage and no other is open, one is looked for no more often than this."""
CUSTOMERS_S = 30.0
"""The book of customers is read again for an unknown one, but not more often than this."""


class OpenLog:
    """The log that takes usage now. One that gives way to a larger one refuses it, and then another is looked for."""

    def __init__(self, admin: Admin, log: CurrentLog) -> None:
        self._admin, self.now = admin, log
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")

    async def into(self, send: Callable[[CurrentLog], Awaitable[Sent]]) -> Sent:
        """What `send` gives for the log that takes it. Raises Unavailable while none does, or Kafka is away."""
        while True:
            log = self.now
            try:
                return await send(log)
            except (MessageSizeTooLargeError, Unavailable) as error:
                if not await self._moved(log):
                    raise Unavailable(f"{log.topic} takes nothing, its log grows: send it again") from error
            except KafkaError as error:
                raise Unavailable(f"Kafka has not taken it: {error}") from error

    async def _moved(self, log: CurrentLog) -> bool:
        """Whether there is another than this one, which refused. Raises Unavailable."""
        async with self._looking:
            if self.now is log and time.monotonic() - self._looked_at >= GROWN_LOOK_S:
                self.now = await current_log(self._admin)
                self._looked_at = time.monotonic()
        return self.now.epoch != log.epoch


class KafkaLog:
    """Usage to its account's partition."""

    def __init__(self, producer: AIOKafkaProducer, log: OpenLog) -> None:
        self._producer, self._log = producer, log

    async def append(self, account: str, value: bytes) -> None:
        """Returns once the broker has it. Raises Unavailable."""

        async def send(log: CurrentLog) -> None:
            home = partition(lane(account), log.partitions)
            await self._producer.send_and_wait(log.topic, value, key=account.encode(), partition=home)

        await self._log.into(send)


class Customers:
    """Customer → account, of the commands in the log."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[str, str] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def account_of(self, customer: str) -> str | None:
        """None where no account is bound to it. Raises Unavailable."""
        async with self._reading:
            if customer not in self._known and time.monotonic() - self._read_at >= CUSTOMERS_S:
                accounts = await accounts_of(self._settings)
                self._known = {found.customer: name for name, found in accounts.items() if found.customer}
                self._read_at = time.monotonic()
        return self._known.get(customer)


@contextlib.asynccontextmanager
async def ingest_of(settings: Settings) -> AsyncIterator[Ingest]:
    """The endpoints with their connections. Raises Refused where a setting is missing, Unavailable where Kafka is away."""
    for name in ("issuer", "audience", "jwks_url"):
        if not getattr(settings, f"ingest_{name}"):
            raise Refused(f"TOLLWAY_INGEST_{name.upper()} is empty: who may record usage would not be known")
    secret = settings.stripe_webhook_secret.get_secret_value()
    signer = Signer.read(settings.data / "control.key") if secret else None
    admin = kafka_admin(settings)
    log = OpenLog(admin, await current_log(admin))
    redis = redis_client(settings)
    producer = await started_producer(settings.kafka_bootstrap, settings.kafka_security(), linger_ms=2)
    try:
        identity = Bearer(
            issuer=settings.ingest_issuer,
            audience=settings.ingest_audience,
            jwks=Jwks(settings.ingest_jwks_url),
            directory=bound_by(Bindings(redis)),
        )
        attributes = frozenset(name.strip() for name in settings.ingest_attributes.split(",") if name.strip())
        ingest = Ingest(KafkaLog(producer, log), identity, attributes)
        if signer is not None:
            command = partial(_command, producer, signer, log)
            ingest.webhooks[PATH] = StripeWebhook(secret, command, Customers(settings).account_of)
        yield ingest
    finally:
        await producer.stop()
        await redis.aclose()


async def _command(
    producer: AIOKafkaProducer,
    signer: Signer,
    log: OpenLog,
    account: str,
    kind: str,
    body: dict[str, Any],
    command_id: str,
) -> dict[int, int]:
    """As `Control.send`. Raises Unavailable."""
    return await log.into(
        lambda where: Control(producer, signer, where.partitions, new_command_id, topic=where.topic).send(
            account, kind, body, command_id
        )
    )


class Server(uvicorn.Server):
    """Says where it listens, once it does; a signal is a reason to end well, not to die of it again afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"ingest on http://{self.config.host}:{self.config.port}/v1/events", flush=True)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; what was taken is answered first, for at most GRACE_S."""
    async with ingest_of(settings) as ingest:
        config = uvicorn.Config(
            ingest.app(),
            host=settings.ingest_host,
            port=settings.ingest_port,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=GRACE_S,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
        server = Server(config)
        await server.serve()
        if not server.started:
            raise Refused(
                f"TOLLWAY_INGEST_PORT is {settings.ingest_port}: it cannot be listened to on {settings.ingest_host}; "
                "give a free one"
            )
