"""The engine on a real broker: checkpoint and seek, stop one partition and not the others, ticks, take-overs."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.records import source, usage
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.errors import Fatal, Refused, Unavailable
from tollway.connectors.kafka import Admin, ends, epoch_of, read_newest, started_producer
from tollway.schemas import codec
from tollway.schemas.lane import lane
from tollway.schemas.topics import DEAD_LETTERS, METER_EVENTS, USAGE
from tollway.streams.accounts import AccountsFold, think_billing, think_quota
from tollway.streams.bootstrap import create, new_command_id
from tollway.streams.checkpoint_log import newest_checkpoints
from tollway.streams.engine import Engine, EngineConfig
from tollway.streams.failpoint import Failpoints
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState

PARTITIONS = 4
DEADLINE_S = 40


class Shown:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.offsets: dict[int, int] = {}

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """Nothing to refresh."""

    async def revoked(self, partitions: list[int]) -> None:
        """Nothing to let go."""

    def note(self, partition: int, state: PartitionState) -> None:
        """Offsets up to which effects are acknowledged."""
        self.offsets[partition] = state.next_offset


def direct(think: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    """Think without the hop over a channel."""

    async def hand(subject: Any) -> Any:
        return think(subject)

    return hand


class Log:
    """A new log on a broker of its own."""

    def __init__(self, settings: Settings, epoch: str, producer: AIOKafkaProducer) -> None:
        self.settings, self.epoch, self.producer = settings, epoch, producer
        self.source = source(1, time.time_ns() // 1_000_000)
        self.control = Control(producer, Signer.read(settings.data / "control.key"), PARTITIONS, new_command_id)

    def account(self, partition: int) -> str:
        """An account that lives in a partition."""
        return next(name for name in (f"acct-{i}" for i in range(100)) if lane(name) % PARTITIONS == partition)

    async def emit(self, partition: int, sequence: int, **fields: Any) -> None:
        """One usage event, waited for."""
        event = usage(
            at_ms=time.time_ns() // 1_000_000,
            **{"account": self.account(partition), "source": self.source, "sequence": sequence, **fields},
        )
        await self.producer.send_and_wait(
            USAGE.name, codec.encode("UsageEvent", event), key=event["account"].encode(), partition=partition
        )

    def engine(self, view: Shown, clock_ms: Callable[[], int] | None = None, **config: Any) -> Engine:
        """Group accounts over this log."""
        key = Signer.read(self.settings.data / "control.key").public_key
        fold = AccountsFold(self.epoch, PARTITIONS, key, direct(think_quota), direct(think_billing), view, Failpoints())
        given = {
            "checkpoint_s": 3600.0,
            "tick_idle_s": 3600.0,
            "session_timeout_ms": 1000,
            "instance_id": "0",
            **config,
        }
        return Engine(
            fold,
            EngineConfig(self.settings.kafka_bootstrap, given.pop("epoch", self.epoch), PARTITIONS, **given),
            Failpoints(),
            *([clock_ms] if clock_ms else []),
        )

    async def end(self, partition: int) -> int:
        """The partition's next offset."""
        return (await ends(self.settings.kafka_bootstrap, {}, USAGE.name, [partition]))[partition]

    async def values(self, topic: str) -> list[Any]:
        """Every record of a topic."""
        found = await read_newest(self.settings.kafka_bootstrap, {}, topic, range(PARTITIONS), None)
        return [record for records in found.values() for record in records]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A broker and a log of this module's own."""
    data = tmp_path_factory.mktemp("engine")
    with KafkaBroker(data / "kafka", settings={"group.min.session.timeout.ms": "500"}) as broker:
        given = {"partitions": PARTITIONS, "replication": 1, "billing_window_s": 10, "billing_grace_s": 5}
        settings = Settings(data=data, kafka_bootstrap=broker.bootstrap, **given)
        asyncio.run(create(settings))
        yield settings


@pytest.fixture
async def log(settings: Settings) -> AsyncIterator[Log]:
    """The log, with a writer."""
    producer = await started_producer(settings.kafka_bootstrap, {})
    try:
        opened = Log(settings, epoch_of(await Admin(settings.kafka_bootstrap).topic_id(USAGE.name)), producer)
        if not await opened.values(DEAD_LETTERS.name) and await opened.end(0) == 1:
            await opened.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
            for partition in range(PARTITIONS):
                await opened.control.send(opened.account(partition), "account.open", {})
        yield opened
    finally:
        await producer.stop()


@asynccontextmanager
async def running(*engines: Engine, crash: bool = False) -> AsyncIterator[None]:
    """Engines at work; ended cleanly, or dropped as they are where a crash is meant."""
    tasks = [asyncio.create_task(engine.work()) for engine in engines]
    try:
        yield
    finally:
        for engine in engines:
            if crash:
                engine.owned = {}  # nothing is checkpointed any more
            await engine.stop()
        await asyncio.gather(*tasks)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition, at most DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.02)


def used(state: PartitionState, account: str) -> int:
    """Month total of `calls` at the account's scope."""
    totals: dict[tuple[str, str, str, int], int] = state.parts["quota"].totals(account)
    return sum(
        units for (scope, meter, window, _), units in totals.items() if (scope, meter, window) == ("acct", "calls", "M")
    )


async def test_a_crash_repeats_and_doubles_nothing(log: Log) -> None:
    """What was folded after the last checkpoint is folded again from there: same totals, each dead letter once."""
    account = log.account(1)
    for sequence in range(1, 6):
        await log.emit(1, sequence)
    await log.emit(1, 3)
    await log.emit(1, 6, principal="not an id")
    end = await log.end(1)
    first = Shown()
    engine = log.engine(first)
    async with running(engine, crash=True):
        await until(lambda: first.offsets.get(1) == end)
        assert used(engine.owned[1].state, account) == 5
    second = Shown()
    again = log.engine(second)
    async with running(again):
        await until(lambda: second.offsets.get(1) == end)
        assert used(again.owned[1].state, account) == 5
    third = Shown()
    resumed = log.engine(third)
    async with running(resumed):
        await until(lambda: 1 in resumed.owned)
        assert (resumed.owned[1].checkpointed, used(resumed.owned[1].state, account)) == (end, 5)
    letters = await log.values(DEAD_LETTERS.name)
    assert {(record.key, dict(record.headers)["reason"]) for record in letters} == {
        (f"{log.epoch}|1|{end - 1}".encode(), b"bad_id")
    }


class Barred:
    """A fold whose sinks take nothing for a while."""

    def __init__(self, fold: Any) -> None:
        self._fold, self.away, self.refused = fold, False, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fold, name)

    async def settle(self, effects: list[Any], send: Any) -> None:
        if self.away:
            self.refused += 1
            raise Unavailable("the sink is away")
        await self._fold.settle(effects, send)


async def test_a_stop_while_a_sink_is_away_saves_nothing_that_it_has_not(log: Log) -> None:
    """The turn that waits for the sink is given up: no checkpoint passes it, and the next worker has its effects."""
    engine = log.engine(Shown(), checkpoint_s=0.1)
    engine.fold = barred = Barred(engine.fold)
    async with running(engine):
        await until(lambda: len(engine.owned) == PARTITIONS and not engine.owned[2].unsettled)
        barred.away = True
        letters = len(await log.values(DEAD_LETTERS.name))
        before = await log.end(2)
        await log.emit(2, 1, principal="not an id either")
        await until(lambda: barred.refused > 1)
    found = await newest_checkpoints(
        log.settings.kafka_bootstrap, {}, log.epoch, {"accounts": False}, list(range(PARTITIONS))
    )
    assert found.of("accounts", 2).next_offset <= before
    view = Shown()
    async with running(log.engine(view)):
        end = await log.end(2)
        await until(lambda: view.offsets.get(2) == end)
    assert len(await log.values(DEAD_LETTERS.name)) == letters + 1


class Slow(Shown):
    """A view that takes its time with new partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.go = 0, asyncio.Event()

    async def assigned(self, states: dict[int, Any]) -> None:
        self.taken += 1
        await self.go.wait()


async def test_a_load_may_outlast_the_session(log: Log) -> None:
    """Loading for three session time-outs loses no partition: the group is given each once, and folds on from there."""
    slow = Slow()
    engine = log.engine(slow)
    async with running(engine):
        await until(lambda: slow.taken > 0)
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 3 * engine.config.session_timeout_ms / 1000)
        slow.go.set()
        await log.emit(2, 1)
        end = await log.end(2)
        await until(lambda: slow.offsets.get(2) == end)
        assert (slow.taken, engine.losses) == (1, [])


async def test_an_idle_partition_is_ticked_and_its_window_closes(log: Log) -> None:
    """Usage is billed although nothing comes behind it: ticks carry log time over the flush."""
    await log.control.send(log.account(0), "customer.bind", {"customer": "cus_0"})
    await log.emit(0, 1, quantities={"calls": 7})
    engine = log.engine(Shown(), tick_idle_s=1.0)
    async with running(engine):
        found: list[Any] = []
        async with asyncio.timeout(DEADLINE_S):
            while not found:
                found = await log.values(METER_EVENTS.name)
    _, event = codec.decode(found[0].value)
    assert (event["customer"], event["units"], event["n"], found[0].partition) == ("cus_0", 7, 1, 0)


async def test_no_checkpoint_and_another_logs_checkpoint_are_refused(log: Log) -> None:
    """A worker never guesses that a log is new, and never mixes two."""
    with pytest.raises(Refused, match="another log than the checkpoint's"):
        await log.engine(Shown(), epoch="0-other").work()


async def test_a_second_create_changes_nothing(log: Log) -> None:
    """`topics create` on a log that stands finds nothing to do."""
    done = await create(log.settings)
    assert (done["created"], done["opened"], done["epoch"]) == ([], [], log.epoch)
    admin = Admin(log.settings.kafka_bootstrap)
    assert epoch_of(await admin.topic_id(USAGE.name)) == log.epoch


async def test_two_workers_share_and_take_over(log: Log) -> None:
    """A second worker takes partitions over from their checkpoints; after it is gone the first has all again."""
    account = [log.account(partition) for partition in range(PARTITIONS)]
    for partition in range(PARTITIONS):
        await log.emit(partition, 1)
    one, two = log.engine(Shown(), instance_id="1"), log.engine(Shown(), instance_id="2")
    async with running(one):
        await until(
            lambda: (
                len(one.owned) == 4
                and all(owned.state.parts["quota"].totals(account[n]) for n, owned in one.owned.items())
            )
        )
        before = {number: used(owned.state, account[number]) for number, owned in one.owned.items()}
        async with running(two):
            await until(lambda: len(two.owned) == 2 and len(one.owned) == 2)
            for partition in range(PARTITIONS):
                await log.emit(partition, 2)
            both = lambda: {**one.owned, **two.owned}  # noqa: E731
            await until(
                lambda: (
                    {n: used(o.state, account[n]) for n, o in both().items()}
                    == {n: units + 1 for n, units in before.items()}
                )
            )
        await until(
            lambda: (
                {n: used(o.state, account[n]) for n, o in one.owned.items()}
                == {n: units + 1 for n, units in before.items()}
            )
        )


async def test_one_partition_stops_red_and_the_others_go_on(log: Log) -> None:
    """A schema id from a newer emitter stops its partition with the reason; usage elsewhere is still counted."""
    newer = b"\0" + (1_000_099).to_bytes(4, "big") + b"\x02"
    await log.producer.send_and_wait(USAGE.name, newer, key=log.account(2).encode(), partition=2)
    await log.emit(0, 9)
    ends = [await log.end(partition) for partition in range(PARTITIONS)]
    engine = log.engine(shown := Shown())
    async with running(engine):
        await until(lambda: shown.offsets.get(0) == ends[0] and engine.owned[2].stopped is not None)
        health = engine.health()
        assert (health["healthy"], list(health["reasons"])) == (False, ["2"])
        assert "deploy workers before emitters" in health["reasons"]["2"]
        await log.emit(3, 9)
        await until(lambda: shown.offsets.get(3) == ends[3] + 1)


async def test_a_clock_that_is_far_ahead_stops_the_worker_before_anything_is_folded(log: Log) -> None:
    """More than 5 minutes between the broker's clock and the worker's: the worker ends, and no window closes early."""
    await log.emit(0, 21)
    letters, bills = await log.values(DEAD_LETTERS.name), await log.values(METER_EVENTS.name)
    shown = Shown()
    behind = log.engine(shown, clock_ms=lambda: time.time_ns() // 1_000_000 - 301_000)
    with pytest.raises(Fatal, match="clock is more than 5 minutes ahead"):
        await asyncio.wait_for(behind.work(), DEADLINE_S)
    assert shown.offsets == {}
    assert (await log.values(DEAD_LETTERS.name), await log.values(METER_EVENTS.name)) == (letters, bills)
    near = log.engine(shown, clock_ms=lambda: time.time_ns() // 1_000_000 - 290_000)
    async with running(near):
        end = await log.end(0)
        await until(lambda: shown.offsets.get(0) == end)


async def test_an_offset_that_the_log_no_longer_has_stops_its_partition_for_good(log: Log) -> None:
    """Trimmed beyond the checkpoint: red with the reason, never a jump; the other partitions go on."""
    for sequence in range(31, 34):
        await log.emit(1, sequence)
    end = await log.end(1)
    client = AdminClient({"bootstrap.servers": log.settings.kafka_bootstrap, "log_level": 0})
    for future in client.delete_records([TopicPartition(USAGE.name, 1, end)]).values():
        future.result(30)
    await log.emit(1, 34)
    await log.emit(0, 31)
    other = await log.end(0)
    engine = log.engine(shown := Shown())
    async with running(engine):
        await until(lambda: shown.offsets.get(0) == other and engine.owned[1].stopped is not None)
        before = engine.owned[1].state.next_offset
        assert "never jump" in engine.health()["reasons"]["1"]
        await log.emit(0, 32)
        await until(lambda: shown.offsets.get(0) == other + 1)
        assert (engine.owned[1].state.next_offset, engine.owned[1].final) == (before, True)


async def test_a_topic_made_anew_while_it_is_read_stops_the_worker(settings: Settings, log: Log) -> None:
    """The same name, another id, as many records and more: nothing of the new log is folded into the old one's state."""
    account = log.account(3)
    await log.emit(3, 41)
    engine = log.engine(shown := Shown())
    end = await log.end(3)
    work = asyncio.create_task(engine.work())
    await until(lambda: shown.offsets.get(3) == end)
    counted = used(engine.owned[3].state, account)
    client = AdminClient({"bootstrap.servers": settings.kafka_bootstrap, "log_level": 0})
    client.delete_topics([USAGE.name])[USAGE.name].result(30)
    admin = Admin(settings.kafka_bootstrap)
    async with asyncio.timeout(DEADLINE_S):
        while USAGE.name in await admin.topics():
            await asyncio.sleep(0.05)
    await admin.create(PARTITIONS, 1)
    writer = await started_producer(settings.kafka_bootstrap, {})
    for sequence in range(100, 101 + end):
        event = usage(at_ms=time.time_ns() // 1_000_000, account=account, source=log.source, sequence=sequence)
        await writer.send_and_wait(USAGE.name, codec.encode("UsageEvent", event), key=account.encode(), partition=3)
    await writer.stop()
    with pytest.raises((Fatal, Refused), match="deleted and made anew"):
        await asyncio.wait_for(work, DEADLINE_S)
    assert shown.offsets[3] == end
    with pytest.raises(Refused, match="another log than the checkpoint's"):
        await log.engine(Shown(), epoch=epoch_of(await admin.topic_id(USAGE.name))).work()
    assert counted
