"""One worker process: which replica it is, its Faust app, its engines, its health."""

import asyncio
import fcntl
import gc
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from tollway.connectors.control import Signer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import CurrentLog
from tollway.streams.engine import EngineConfig
from tollway.streams.schema_registry import refuse_other_schemas
from tollway.streams.settings import Settings
from tollway.streams.topic_faults import refuse_unsafe

log = logging.getLogger(__name__)

GROUPS = ("accounts", "audit", "stripe")
REPLICAS_MAX = 256
GC_THRESHOLD = (200_000, 50, 1_000)
"""Each fetch makes some 20,000 record objects: the default runs the collector all the time (1.1 to 2.1 x, measured)."""
COLLECT_S = 60.0
"""A quiet worker would reach those thresholds after hours: until then its cycles stay, 1 kB a second."""


class Replica:
    """This worker's place in its groups: TOLLWAY_REPLICA, else the first free lock file of the data folder.

    aiokafka does not notice a twin with the same instance id, so a place is held by a lock for the process's life.
    """

    def __init__(self, name: str, held: int) -> None:
        self.name, self._held = name, held

    @classmethod
    def take(cls, data: Path, group: str, name: str) -> "Replica":
        """Raises Refused where the place is taken or the folder cannot be written."""
        folder = data / "replicas"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for place in [name] if name else [str(number) for number in range(REPLICAS_MAX)]:
                held = os.open(folder / f"{group}.{place}.lock", os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(held)
                    continue
                host = socket.gethostname() if not name else ""
                return cls(f"{host}-{place}" if host else place, held)
        except OSError as error:
            raise Refused(
                f"TOLLWAY_DATA is {str(data)!r}: not a folder this worker can write to ({error.strerror})"
            ) from error
        raise Refused(f"replica {name or 'slot'} of group {group} is running already: give another TOLLWAY_REPLICA")


def tune_collector() -> None:
    """At worker start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


async def collect_cycles() -> None:
    """For as long as the worker lives. What was there at its start is frozen and costs nothing."""
    while True:
        await asyncio.sleep(COLLECT_S)
        gc.collect()


def public_key_of(settings: Settings) -> str:
    """The control plane's public key: from settings, else of the key file. Raises Refused."""
    if settings.public_key:
        return settings.public_key
    return Signer.read(settings.data / "control.key").public_key


async def engine_config(settings: Settings, replica: Replica, log: CurrentLog, group: str) -> EngineConfig:
    """What a group's engine is told. The sender's topic and epoch are those of the first log."""
    epoch, partitions = (log.origin, log.billing_partitions) if group == "stripe" else (log.epoch, log.partitions)
    await refuse_unsafe(settings)
    await refuse_other_schemas(settings)
    return EngineConfig(
        bootstrap=settings.kafka_bootstrap,
        epoch=epoch,
        partitions=partitions,
        instance_id=replica.name,
        security=settings.kafka_security(),
        pace_ms=settings.pace_ms,
        session_timeout_ms=settings.session_timeout_ms,
        max_poll_interval_ms=settings.max_poll_interval_ms,
        checkpoint_s=settings.checkpoint_s,
        checkpoint_records=settings.checkpoint_records,
        tick_idle_s=settings.tick_idle_s,
    )


class Health:
    """GET /health on loopback: 200 while every group makes progress, 503 with the reasons otherwise."""

    def __init__(self, port: int, groups: list[Callable[[], dict[str, Any]]], extra: dict[str, Any]) -> None:
        self._port, self._groups, self._extra = port, groups, extra
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen, where a port is set. Raises Refused where it is taken."""
        if not self._port:
            return
        app = web.Application()
        app.router.add_get("/health", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        except OSError as error:
            raise Refused(f"TOLLWAY_HEALTH_PORT is {self._port}: {error.strerror}; give a free one") from error

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        groups = [read() for read in self._groups]
        extra = {name: read() for name, read in self._extra.items()}
        healthy = all(group["healthy"] for group in groups)
        return web.json_response(
            {"healthy": healthy, "pid": os.getpid(), "groups": groups, **extra}, status=200 if healthy else 503
        )
