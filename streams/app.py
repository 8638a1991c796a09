"""The Faust app that hosts the folds: its agents in the order of the flow, and the service that runs the engines.

The folds read with their own consumers (`engine.py`); agents think about what comes over a channel. A plain agent on
`usage.events` would lose and double: ticks crash it, an exception skips its event.
"""

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import faust
from mode import Service

from tollway.connectors.errors import Fatal, TollwayError, Unavailable
from tollway.connectors.hush import hush
from tollway.connectors.kafka import CurrentLog, current_log, open_growth
from tollway.streams.accounts import AccountsFold, billing, quota
from tollway.streams.audit_fold import AuditFold, audit
from tollway.streams.engine import Engine
from tollway.streams.failpoint import Failpoints
from tollway.streams.hand import Hand
from tollway.streams.seat import Absence, Seat, answers, run_seats, wait_for_kafka
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import StripeFold, stripe
from tollway.streams.wiring import Parts, kafka_admin
from tollway.streams.worker import Health, Replica, collect_cycles, engine_config, public_key_of, tune_collector

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often a worker asks which log is current."""
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

        self._seats: list[Seat] = []
        self._made: dict[str, Any] = {}
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
        for seat in self._seats:
            await seat.stop()
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
                self._seats.append(Seat(group, partial(self._engine, group, replica, parts, self._failpoints(group))))
            health = Health(settings.health_port, [seat.health for seat in self._seats], parts.figures())
            await health.start()
            watch = asyncio.create_task(self._until_grown(), name="log")
            collecting = asyncio.create_task(collect_cycles(), name="collector")
            try:
                await run_seats(self._seats)
            finally:
                watch.cancel()
                collecting.cancel()
                await health.stop()
            if watch.done() and not watch.cancelled():
                raise Unavailable(watch.result())
        finally:
            await parts.close()

    async def _until_grown(self) -> str:
        """Returns, with the seats stopped, when another log is current: a new start works on that one."""
        admin = kafka_admin(self.settings)  # one for all looks: a client has threads of its own
        while True:
            await asyncio.sleep(LOOK_S)
            former: CurrentLog | None = self._made.get("log")
            with suppress(TollwayError):  # Kafka is away, perhaps: the engines say so
                # confluent-kafka never frees a topic id that it was told: they are asked for when something has changed.
                if former is not None and await open_growth(admin, await admin.partitions()) > former.growth:
                    log = await current_log(admin)
                    for seat in self._seats:
                        await seat.stop()
                    return grown(former, log)

    def _failpoints(self, group: str) -> Failpoints:
        return Failpoints.read(self.settings.data, group)

    async def _engine(self, group: str, replica: Replica, parts: Parts, failpoints: Failpoints) -> Engine:
        """A new engine with a new fold: nothing of the former one's memory, only its connections. Raises Fatal on another log."""
        await answers(self.settings.kafka_bootstrap, self.settings.kafka_security())
        log = await current_log(kafka_admin(self.settings))
        config = await engine_config(self.settings, replica, log, group)
        former = self._made.setdefault("log", log)
        if log.growth > former.growth:
            raise Unavailable(grown(former, log))
        if log != former:
            raise Fatal(
                f"the log is {log.epoch} now and was {former.epoch}: its topic was made anew; start workers for that log"
            )
        return Engine(await self._fold_of(group, log, parts, failpoints), config, failpoints)

    async def _fold_of(self, group: str, log: CurrentLog, parts: Parts, failpoints: Failpoints) -> Any:
        settings, made, epoch, partitions = self.settings, self._made, log.epoch, log.partitions
        if group == "accounts":
            view = made.get("view") or made.setdefault("view", await parts.views(epoch, partitions))
            key = public_key_of(settings)
            agents = Hand(self.quota), Hand(self.billing)
            places = log.topic, log.billing_partitions
            return AccountsFold(epoch, partitions, key, *agents, view, failpoints, *places)
        if group == "audit":
            store = made.get("store") or made.setdefault("store", await parts.audit_store())
            copies = made.get("copies") or made.setdefault("copies", parts.snapshot_copies(epoch, store))
            key = public_key_of(settings)
            return AuditFold(epoch, partitions, key, Hand(self.audit), store, failpoints, copies, log.topic)
        port = made.get("port") or made.setdefault("port", await parts.stripe())
        return StripeFold(log.origin, Hand(self.stripe), port, settings, failpoints)


def grown(former: CurrentLog, log: CurrentLog) -> str:
    """Why a worker of the former log ends."""
    return f"the log has grown from {former.partitions} to {log.partitions} partitions: started again, this worker folds those"


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


async def _kafka_answers(settings: Settings, groups: list[str]) -> bool:
    """Wait for Kafka, red all the while; False where a signal came first."""
    stop, absence = asyncio.Event(), Absence(",".join(groups))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    red = {"group": ",".join(groups), "partitions": [], "healthy": False}
    health = Health(settings.health_port, [lambda: {**red, "reasons": absence.reasons}], {})
    await health.start()
    try:
        where = settings.kafka_bootstrap, settings.kafka_security()
        return await wait_for_kafka(*where, absence, stop, kafka_admin(settings).partitions)
    finally:
        await health.stop()


def run(settings: Settings, groups: list[str]) -> BaseException | None:
    """Run a worker until a signal or a failure; returns the failure: Unavailable where a new start cures it."""
    logging.getLogger("stripe").setLevel(logging.WARNING)  # it logs every request at INFO
    hush()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    if not asyncio.run(_kafka_answers(settings, groups)):
        return None
    logging.getLogger().handlers.clear()  # Faust brings its own
    host = Host(settings, groups)
    worker = faust.Worker(host.app, loglevel="INFO", quiet=True)
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        if host.failure is None and end.code:
            return Unavailable("Faust's own connection to Kafka ended: start this worker again")
    return host.failure
