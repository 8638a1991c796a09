"""Group stripe as a process of its own, by a clock that a test sets and runs fast; it dies where a failpoint says."""

import asyncio
import multiprocessing
import os
import struct
import time
from pathlib import Path
from typing import Any

from tests.sinks_site import DEADLINE_S, PARTITIONS, direct
from tollway.connectors.stripe import StripePort
from tollway.streams.engine import Engine, EngineConfig
from tollway.streams.failpoint import Failpoints
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import StripeFold, think_stripe

PORT_TIMEOUT_S = 1
_PLACE = struct.Struct("<ddd")


class SharedClock:
    """Seconds since 1970 in a file: set at a moment of the machine's clock, running `rate` times as fast from there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> int:
        at_s, machine_s, rate = _PLACE.unpack(self._path.read_bytes())
        return int(at_s + (time.time() - machine_s) * rate)

    def set(self, at_s: int, rate: int) -> None:
        new = self._path.with_suffix(".new")
        new.write_bytes(_PLACE.pack(at_s, time.time(), rate))
        new.replace(self._path)


def work(settings: Settings, epoch: str, clock: SharedClock) -> None:
    """The process: one engine until it is killed."""
    os.setpgrp()
    asyncio.run(_work(settings, epoch, clock))


async def _work(settings: Settings, epoch: str, clock: SharedClock) -> None:
    failpoints = Failpoints.read(settings.data, "stripe")
    port = StripePort(settings.stripe_key.get_secret_value(), settings.stripe_url, timeout_s=PORT_TIMEOUT_S)
    fold = StripeFold(epoch, direct(think_stripe), port, settings, failpoints, clock)
    config = EngineConfig(
        settings.kafka_bootstrap,
        epoch,
        PARTITIONS,
        "sender",
        pace_ms=20,
        session_timeout_ms=6_000,
    )
    await Engine(fold, config, failpoints).work()


class Sender:
    """Starts the process, arms its failpoints, kills it. Forked from a server that has imported everything once."""

    def __init__(self, settings: Settings, epoch: str, clock: SharedClock) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._arguments = settings, epoch, clock
        self._armed = settings.data / "failpoint.stripe"
        self._process: Any = None
        self.deaths: list[int] = []
        """Exit codes, oldest first."""

    def start(self, failpoint: str = "") -> None:
        """A new life, perhaps with a place to die at: `<name>:<k>`."""
        if failpoint:
            self._armed.write_text(failpoint)
        self._process = self._context.Process(target=work, args=self._arguments, daemon=True)
        self._process.start()

    def died(self) -> bool:
        """Whether this life is over; noted once."""
        if self._process is None or self._process.exitcode is None:
            return False
        self.deaths.append(self._process.exitcode)
        self._process = None
        return True

    def keep(self) -> None:
        """Start it again where it has ended by itself, as it does when it has lost its partitions."""
        if self.died():
            self.start()

    def kill(self) -> None:
        """kill -9, and waited for."""
        if self._process is not None:
            self._process.kill()
            self._process.join(DEADLINE_S)
            self.died()
