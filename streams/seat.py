"""One group's place in a worker: its engine, made anew for as long as Kafka is away or another worker has its partitions.

An engine that ends because Kafka is away, or because a transaction of its was not taken, is dropped with all that it held in
memory. The next one joins the group, is given partitions by the group's coordinator, shuts former owners out of those alone,
and loads its state from the log before anything is sent.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from tollway.connectors.closing import close
from tollway.connectors.errors import Refused, Unavailable
from tollway.streams.engine import Engine
from tollway.streams.fold import Unseated

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 15.0
LASTED_S = 60.0
"""An engine that worked this long did not fail to start: back-off begins again."""
LOOK_S, ANSWER_S = 5.0, 5.0
"""How often a working engine's brokers are asked for the ends of its partitions, and how long that may take."""
SAID_S = 60.0
"""While Kafka is away one line is logged this often."""
AGAIN = (Unavailable, Unseated, KafkaError, TimeoutError, ConnectionError)


class Absence:
    """Since when Kafka is away, and why; one line when it goes, one a minute, one when it is back."""

    def __init__(self, who: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._who, self._clock = who, clock
        self._since: float | None = None
        self._said = 0.0
        self._why = ""

    def note(self, why: str) -> None:
        """It is away, or still is."""
        now, self._why = self._clock(), why
        self._since = now if self._since is None else self._since
        if now - self._said >= SAID_S or self._since == now:
            self._said = now
            log.warning("%s: waits for Kafka, for %.0f s now: %s", self._who, now - self._since, why)

    def over(self) -> None:
        """It answers."""
        if self._since is not None:
            log.warning("%s: Kafka is back after %.0f s", self._who, self._clock() - self._since)
        self._since = None

    @property
    def reasons(self) -> dict[str, str]:
        """For the health answer; empty where Kafka is there."""
        return {} if self._since is None else {"kafka": f"away for {self._clock() - self._since:.0f} s: {self._why}"}


class Seat:
    """Runs one group's engines, one after the other. `make` gives a new one. `work()` returns after `stop()`, or raises."""

    def __init__(self, group: str, make: Callable[[], Awaitable[Engine]]) -> None:
        self.group, self._make = group, make
        self.engine: Engine | None = None
        self.absence = Absence(group)
        self.rejoined = 0
        """How often an engine was made again."""
        self._stopping = asyncio.Event()

    async def work(self) -> None:
        """Raises what no waiting cures: Refused, Fatal, and faults of our own."""
        delay_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._sit()
            except AGAIN as error:
                self.absence.note(f"{type(error).__name__}: {error}")
            if time.monotonic() - began > LASTED_S:
                delay_s = RETRY_FIRST_S
            await self._rest(delay_s)
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    async def stop(self) -> None:
        """Ask the engine to end."""
        self._stopping.set()
        if self.engine is not None:
            await self.engine.stop()

    def health(self) -> dict[str, Any]:
        """The engine's, red while Kafka is away."""
        shown: dict[str, Any] = {"group": self.group, "partitions": [], "reasons": {}}
        if self.engine is not None:
            shown = self.engine.health()
        reasons = {**shown["reasons"], **self.absence.reasons}
        if self.engine is None and not reasons:
            reasons = {"group": "not joined yet"}
        return {**shown, "healthy": not reasons, "reasons": reasons, "rejoined": self.rejoined}

    async def _sit(self) -> None:
        """One engine's life."""
        former = self.engine
        try:
            engine = await self._make()
        except Refused as error:
            if former is None:
                raise
            # It was there before: brokers that come back do not know every topic at once.
            raise Unavailable(str(error)) from error
        if former is not None:
            self.rejoined += 1
            engine.events, engine.losses = former.events, former.losses
        self.engine = engine
        if self._stopping.is_set():
            return
        look = asyncio.create_task(self._look(engine), name=f"{self.group}.look")
        try:
            await engine.work()
        finally:
            look.cancel()
            await asyncio.wait({look})

    async def _look(self, engine: Engine) -> None:
        """Whether the brokers answer: an engine with nothing to fetch would not notice."""
        while True:
            await asyncio.sleep(LOOK_S)
            if engine.consumer is None or not engine.joined:
                continue
            wanted = [TopicPartition(engine.fold.topic, number) for number in engine.owned or (0,)]
            try:
                await asyncio.wait_for(engine.consumer.end_offsets(wanted), ANSWER_S)
            except (KafkaError, TimeoutError) as error:
                self.absence.note(f"no answer for {ANSWER_S:.0f} s ({type(error).__name__})")
            else:
                self.absence.over()

    async def _rest(self, delay_s: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), delay_s)
        except TimeoutError:
            return


async def run_seats(seats: list[Seat]) -> None:
    """Work until all are stopped; the first that fails stops the others and is raised."""
    tasks = [asyncio.create_task(seat.work(), name=seat.group) for seat in seats]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for seat in seats:
            await seat.stop()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def answers(bootstrap: str, security: dict[str, Any]) -> None:
    """Raises Unavailable where no broker answers."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, **security)
    try:
        await asyncio.wait_for(consumer.start(), ANSWER_S)
    except (KafkaError, TimeoutError, OSError) as error:
        raise Unavailable(f"no Kafka at {bootstrap}: {error or 'no answer'}") from error
    finally:
        await close(consumer, ANSWER_S)


async def listens(bootstrap: str) -> bool:
    """Whether anything takes a connection at one of the addresses."""
    for address in bootstrap.split(","):
        host, _, port = address.rpartition(":")
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), ANSWER_S)
        except (OSError, TimeoutError, ValueError):
            continue
        writer.close()
        return True
    return False


async def wait_for_kafka(
    bootstrap: str,
    security: dict[str, Any],
    absence: Absence,
    stop: asyncio.Event,
    ask: Callable[[], Awaitable[Any]],
) -> bool:
    """Until a broker answers, with back-off, for as long as it takes; False where `stop` came first.

    `ask` is called where something listens and does not answer us: it raises Refused for what no waiting cures, such as a
    wrong password.
    """
    delay_s = RETRY_FIRST_S
    while not stop.is_set():
        try:
            await answers(bootstrap, security)
        except Unavailable as error:
            absence.note(str(error))
            if await listens(bootstrap):
                with suppress(Unavailable):
                    await ask()
        else:
            absence.over()
            return True
        try:
            await asyncio.wait_for(stop.wait(), delay_s)
        except TimeoutError:
            delay_s = min(delay_s * 2, RETRY_MAX_S)
    return False
