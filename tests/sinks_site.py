"""A log on a broker of its own and the three folds as engines in this process: whatever stands behind a fold can be taken away."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from tests.records import source, usage
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.kafka import Admin, ends, epoch_of, started_producer
from tollway.connectors.stripe import StripePort
from tollway.schemas import codec
from tollway.schemas.lane import lane
from tollway.schemas.topics import USAGE
from tollway.streams.accounts import AccountsFold, View, think_billing, think_quota
from tollway.streams.audit_fold import AuditFold, think_audit
from tollway.streams.bootstrap import create, new_command_id
from tollway.streams.engine import Engine, EngineConfig
from tollway.streams.failpoint import Failpoints
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import StripeFold, think_stripe

PARTITIONS = 4
MAX_POLL_S = 4.0
"""max.poll.interval of every engine here: 75 times shorter than the default, so that an outage of 12 s is three of them."""
DEADLINE_S = 120
WINDOWS = {"step_s": 1, "billing_window_s": 2, "billing_grace_s": 1}


def direct(think: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    """Think without the hop over a channel."""

    async def hand(subject: Any) -> Any:
        return think(subject)

    return hand


class Unshown:
    """A view that shows nothing, where the test is not about Redis."""

    async def assigned(self, states: dict[int, Any]) -> None:
        """Nothing to refresh."""

    async def revoked(self, partitions: list[int]) -> None:
        """Nothing to let go."""

    def note(self, partition: int, state: Any) -> None:
        """Nothing to show."""


class Site:
    """The log, a writer, and folds over it; `sent` counts accepted usage by account."""

    def __init__(self, settings: Settings, epoch: str, producer: AIOKafkaProducer) -> None:
        self.settings, self.epoch, self.producer = settings, epoch, producer
        self.signer = Signer.read(settings.data / "control.key")
        self.control = Control(producer, self.signer, PARTITIONS, new_command_id)
        self.source = source(time.monotonic_ns(), time.time_ns() // 1_000_000)
        self.sent: dict[str, int] = {}
        self._sequences: dict[int, int] = {}

    def account(self, partition: int, number: int = 0) -> str:
        """The number-th account that lives in a partition."""
        found = (name for name in (f"acct-{i}" for i in range(10_000)) if lane(name) % PARTITIONS == partition)
        return [next(found) for _ in range(number + 1)][-1]

    async def open(self, accounts: Iterable[str], bind: Callable[[str], str] | None = None) -> None:
        """Accounts that count and, with `bind`, are billed."""
        for name in accounts:
            await self.control.send(name, "account.open", {})
            if bind is not None:
                await self.control.send(name, "customer.bind", {"customer": bind(name)})

    async def emit(self, account: str, count: int = 1, **fields: Any) -> int:
        """Usage of one call each, in the log when this returns: the offset behind the last."""
        number = lane(account)
        at_ms = time.time_ns() // 1_000_000
        sent = []
        for _ in range(count):
            self._sequences[number] = self._sequences.get(number, 0) + 1
            given = {"account": account, "source": self.source, "sequence": self._sequences[number], **fields}
            value = codec.encode("UsageEvent", usage(at_ms=at_ms, **given))
            key, place = account.encode(), number % PARTITIONS
            sent.append(await self.producer.send(USAGE.name, value, key=key, partition=place))
        offsets = [metadata.offset for metadata in await asyncio.gather(*sent)]
        self.sent[account] = self.sent.get(account, 0) + count
        return max(offsets) + 1

    async def mark(self) -> dict[int, int]:
        """One more usage in each partition: the offsets behind them. Ticks carry a block over its end, they begin none."""
        return {number: await self.emit(self.account(number)) for number in range(PARTITIONS)}

    async def ends(self, topic: str = USAGE.name) -> dict[int, int]:
        """partition → next offset."""
        return await ends(self.settings.kafka_bootstrap, {}, topic, range(PARTITIONS))

    def accounts(self, view: View | None = None, **config: Any) -> Engine:
        """Group accounts."""
        think = direct(think_quota), direct(think_billing)
        return self._engine(
            AccountsFold(self.epoch, PARTITIONS, self.signer.public_key, *think, view or Unshown(), Failpoints()),
            config,
        )

    def audit(self, store: AuditStore, **config: Any) -> Engine:
        """Group audit."""
        key = self.signer.public_key
        return self._engine(AuditFold(self.epoch, PARTITIONS, key, direct(think_audit), store, Failpoints()), config)

    def stripe(self, port: StripePort, clock_s: Callable[[], int] | None = None, **config: Any) -> Engine:
        """Group stripe, by the machine's clock unless given another."""
        given: Any = {} if clock_s is None else {"clock_s": clock_s}
        fold = StripeFold(self.epoch, direct(think_stripe), port, self.settings, Failpoints(), **given)
        return self._engine(fold, config)

    def _engine(self, fold: Any, config: dict[str, Any]) -> Engine:
        given = {
            "instance_id": "0",
            "pace_ms": 20,
            "session_timeout_ms": 10_000,
            "max_poll_interval_ms": int(MAX_POLL_S * 1000),
            "checkpoint_s": 1.0,
            "tick_idle_s": 0.5,
            **config,
        }
        return Engine(fold, EngineConfig(self.settings.kafka_bootstrap, self.epoch, PARTITIONS, **given), Failpoints())


@contextmanager
def log_of(data: Path, **given: Any) -> Iterator[Settings]:
    """A broker with an open log, its meter `calls` and no accounts."""
    with KafkaBroker(data / "kafka", settings={"group.min.session.timeout.ms": "500"}) as broker:
        settings = Settings(
            data=data,
            kafka_bootstrap=broker.bootstrap,
            partitions=PARTITIONS,
            replication=1,
            deployment="away",
            **WINDOWS,
            **given,
        )
        asyncio.run(create(settings))
        yield settings


@asynccontextmanager
async def site_of(settings: Settings) -> AsyncIterator[Site]:
    """The log of `log_of` with a writer of this loop."""
    producer = await started_producer(settings.kafka_bootstrap, {})
    try:
        yield Site(settings, epoch_of(await Admin(settings.kafka_bootstrap).topic_id(USAGE.name)), producer)
    finally:
        await producer.stop()


@asynccontextmanager
async def running(*engines: Engine) -> AsyncIterator[None]:
    """Engines at work; one that fails fails the test."""
    tasks = [asyncio.create_task(engine.work()) for engine in engines]
    try:
        await until(lambda: all(engine.joined and len(engine.owned) == PARTITIONS for engine in engines))
        yield
    finally:
        for engine in engines:
            await engine.stop()
        await asyncio.gather(*tasks)


class Watch:
    """Looks at an engine at each poll: the most it held, whether its partitions were paused, whether they stayed."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.generation = engine, engine.generation
        self.stash = self.stash_bytes = 0
        self.paused: set[int] = set()

    def look(self) -> None:
        for number, owned in self.engine.owned.items():
            self.stash = max(self.stash, len(owned.stash))
            self.stash_bytes = max(self.stash_bytes, owned.stash_bytes)
            if owned.paused:
                self.paused.add(number)

    def kept(self) -> bool:
        """Every partition is ours without a break since the watch began."""
        engine = self.engine
        return engine.generation == self.generation and not engine.losses and len(engine.owned) == PARTITIONS


async def until(holds: Callable[[], Any], deadline_s: float = DEADLINE_S, watches: Iterable[Watch] = ()) -> None:
    """Wait for a condition, looking on at each poll."""
    watches = list(watches)
    async with asyncio.timeout(deadline_s):
        while True:
            for watch in watches:
                watch.look()
            if holds():
                return
            await asyncio.sleep(0.02)


def folded(engine: Engine, wanted: dict[int, int]) -> bool:
    """Whether the engine has settled everything below these offsets."""
    return len(engine.owned) == PARTITIONS and all(
        (owned := engine.owned[number]).state.next_offset >= end and not owned.unsettled and not owned.stopped
        for number, end in wanted.items()
    )


def used(engine: Engine, account: str) -> int:
    """Life total of calls that the accounts fold has counted for an account."""
    state = engine.owned[lane(account) % PARTITIONS].state
    totals: dict[tuple[str, str, str, int], int] = state.parts["quota"].totals(account)
    return sum(n for (scope, meter, window, _), n in totals.items() if (scope, meter, window) == ("acct", "calls", "M"))


async def caught_up(site: Site, engine: Engine, watches: Iterable[Watch] = ()) -> None:
    """Wait until an engine has settled all that the log holds now."""
    wanted = await site.ends()
    await until(lambda: folded(engine, wanted), watches=watches)
