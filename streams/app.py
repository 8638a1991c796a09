"""The Faust app that hosts the folds: its agents in the order of the flow, and the service that runs the engines.

The folds read with their own consumers (`engine.py`); agents think about what comes over a channel. A plain agent on
`usage.events` would lose and double: ticks crash it, an exception skips its event.
"""

import asyncio
import logging
import os
import signal
import socket
from typing import Any

import faust
from mode import Service

from tollway.connectors.errors import TollwayError
from tollway.streams.accounts import AccountsFold, billing, quota
from tollway.streams.audit_fold import AuditFold, audit
from tollway.streams.engine import Engine
from tollway.streams.failpoint import Failpoints
from tollway.streams.hand import Hand
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import StripeFold, stripe
from tollway.streams.wiring import Parts
from tollway.streams.worker import Health, Replica, engine_config, public_key_of, run_engines, tune_collector

log = logging.getLogger(__name__)

STOP_S = 4.0
"""A worker ends within 5 s of SIGTERM: what is not settled by then is done again by the next owner."""


class Host:
    """A Faust app with one channel agent for each part of the groups that it runs."""

    def __init__(self, settings: Settings, groups: list[str]) -> None:
        self.settings, self.groups = settings, groups
        self.failure: BaseException | None = None
        # Faust's own group never holds a fold back: an id a process, 6 s sessions.
        self.app = faust.App(
            f"tollway-folds-{socket.gethostname()}-{os.getpid()}",
            broker=[f"kafka://{server}" for server in settings.kafka_bootstrap.split(",")],
            store="memory://",
            datadir=str(settings.data / "faust"),  # made at start, never written to
            topic_disable_leader=True,
            topic_replication_factor=settings.replication,
            consumer_auto_offset_reset="earliest",
            broker_session_timeout=6,
            broker_heartbeat_interval=1,
            web_enabled=False,
            broker_credentials=_credentials(settings),
        )
        self.quota, self.billing, self.audit, self.stripe = (self.app.channel(maxsize=1) for _ in range(4))
        self._agents()
        host = self

        @self.app.service
        class Folds(Service):  # type: ignore[misc]
            """Runs the engines beside Faust's own consumer."""

            async def on_start(self) -> None:
                host.start()

            async def on_stop(self) -> None:
                await host.stop()

        self._engines: list[Engine] = []
        self._running: asyncio.Task[None] | None = None

    def _agents(self) -> None:
        """The arrows of the flow. An app with channel agents alone crashes at subscribe: hence the control topic."""
        control = self.app.topic("tollway.control", partitions=1, internal=True, value_serializer="raw")

        for channel, name, agent in (
            (control, "control", nothing),
            (self.quota, "quota", quota),
            (self.billing, "billing", billing),
            (self.audit, "audit", audit),
            (self.stripe, "stripe", stripe),
        ):
            self.app.agent(channel, name=name)(agent)

    def start(self) -> None:
        """Begin folding."""
        self._running = asyncio.get_running_loop().create_task(self._run(), name="folds")

    async def stop(self) -> None:
        """Last checkpoints, then let go."""
        for engine in self._engines:
            await engine.stop()
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=STOP_S)

    async def _run(self) -> None:
        """Engines until stopped; a failure is kept for the exit and ends the worker."""
        try:
            await self._fold()
        except TollwayError as error:
            self.failure = error
        except Exception as error:
            log.exception("the folds crashed")
            self.failure = error
        finally:
            if self.failure is not None:
                os.kill(os.getpid(), signal.SIGTERM)

    async def _fold(self) -> None:
        settings = self.settings
        parts = Parts(settings)
        tune_collector()
        try:
            for group in self.groups:
                replica = Replica.take(settings.data, group, settings.replica)
                config = await engine_config(settings, replica)
                failpoints = Failpoints.read(settings.data, group)
                fold = await self._fold_of(group, config.epoch, config.partitions, parts, failpoints)
                self._engines.append(Engine(fold, config, failpoints))
            health = Health(settings.health_port, self._engines, parts.figures())
            await health.start()
            try:
                await run_engines(self._engines)
            finally:
                await health.stop()
        finally:
            await parts.close()

    async def _fold_of(self, group: str, epoch: str, partitions: int, parts: Parts, failpoints: Failpoints) -> Any:
        settings = self.settings
        if group == "accounts":
            view = await parts.views(epoch, partitions)
            key = public_key_of(settings)
            return AccountsFold(epoch, partitions, key, Hand(self.quota), Hand(self.billing), view, failpoints)
        if group == "audit":
            store = await parts.audit_store()
            key, copies = public_key_of(settings), parts.snapshot_copies(epoch, store)
            return AuditFold(epoch, partitions, key, Hand(self.audit), store, failpoints, copies)
        return StripeFold(epoch, Hand(self.stripe), await parts.stripe(), settings, failpoints)


async def nothing(stream: Any) -> None:
    """Agent control: keeps Faust's consumer in a group."""
    async for _ in stream:
        log.warning("a record on tollway.control: nothing is ever sent there")


def _credentials(settings: Settings) -> Any:
    """Faust's own connection takes the same TLS and SASL as ours."""
    security = settings.kafka_security()
    if not security:
        return None
    if "sasl_mechanism" in security:
        return faust.SASLCredentials(
            username=security["sasl_plain_username"],
            password=security["sasl_plain_password"],
            mechanism=security["sasl_mechanism"],
            ssl_context=security.get("ssl_context"),
        )
    return faust.SSLCredentials(security["ssl_context"])


def run(settings: Settings, groups: list[str]) -> BaseException | None:
    """Run a worker until a signal or a failure; returns the failure."""
    logging.getLogger("stripe").setLevel(logging.WARNING)  # it logs every request at INFO
    host = Host(settings, groups)
    worker = faust.Worker(host.app, loglevel="INFO", quiet=True)
    try:
        worker.execute_from_commandline()
    except SystemExit:
        return host.failure
    return host.failure
