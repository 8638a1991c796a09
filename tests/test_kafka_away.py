"""Kafka away: emitters spool, groups wait red and go on by themselves, a sender whose transaction failed starts from the log."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.sinks_site import PARTITIONS, WINDOWS, Site, site_of, until, used
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import LOOPBACK, free_port
from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.connectors.emitter import Emitter
from tollway.connectors.kafka import started_producer
from tollway.connectors.stripe import StripePort
from tollway.schemas.topics import CHECKPOINTS
from tollway.streams import stripe_fold
from tollway.streams.bootstrap import create
from tollway.streams.engine import Engine
from tollway.streams.fold import Unseated
from tollway.streams.seat import Seat, answers, run_seats
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import StripeFold

AWAY_S = 20.0
"""Ten times max.poll.interval of these engines."""
RATE = 100
BOUND = "cus_"


@dataclass
class Part:
    """What this module kills, and what stands behind it."""

    broker: KafkaBroker
    rail: StripeServer
    settings: Settings


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, clickhouse: ClickHouseServer) -> Iterator[Part]:
    """A broker and a rail of this module's own, the shared ClickHouse with a database of its own."""
    data = tmp_path_factory.mktemp("kafka-away")
    broker = KafkaBroker(data / "kafka", settings={"group.min.session.timeout.ms": "500"})
    told: dict[str, Any] = {"clickhouse_host": clickhouse.host, "clickhouse_port": clickhouse.port}
    told |= {"clickhouse_user": clickhouse.user, "clickhouse_password": clickhouse.password}
    with broker, StripeServer(data) as rail:
        settings = Settings(
            data=data,
            kafka_bootstrap=broker.bootstrap,
            partitions=PARTITIONS,
            replication=1,
            clickhouse_database="kafka_away",
            **{**told, **WINDOWS},
        )
        asyncio.run(create(settings))
        store = store_of(settings)
        store.migrate()
        store.close()
        yield Part(broker, rail, settings)
        # a test may have left it dead
        if broker.pid is None:
            broker.start()


def store_of(settings: Settings) -> AuditStore:
    secret = settings.clickhouse_password.get_secret_value()
    at = settings.clickhouse_host, settings.clickhouse_port, settings.clickhouse_user
    return AuditStore(*at, secret, settings.clickhouse_database)


@pytest.fixture
async def site(parts: Part) -> AsyncIterator[Site]:
    async with site_of(parts.settings) as found:
        yield found


@pytest.fixture
async def port(parts: Part) -> AsyncIterator[StripePort]:
    port = StripePort(parts.rail.key, parts.rail.url)
    yield port
    await port.close()


async def opened(site: Site, port: StripePort, number: int) -> dict[str, str]:
    """One billed account in each partition, nobody else's: account → customer."""
    await port.ensure_meter("calls")
    await site.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
    names = [site.account(partition, number) for partition in range(PARTITIONS)]
    customers = {name: await port.ensure_customer(name) for name in names}
    await site.open(names, customers.__getitem__)
    return customers


@asynccontextmanager
async def seated(bootstrap: str, **makers: Callable[[], Engine]) -> AsyncIterator[dict[str, Seat]]:
    """Groups at work as a worker runs them; one that fails fails the test."""

    def making(maker: Callable[[], Engine]) -> Callable[[], Awaitable[Engine]]:
        async def make() -> Engine:
            await answers(bootstrap, {})
            return maker()

        return make

    seats = {group: Seat(group, making(maker)) for group, maker in makers.items()}
    running = asyncio.create_task(run_seats(list(seats.values())))
    try:
        await until(lambda: running.done() or all(ready(seat) for seat in seats.values()))
        yield seats
    finally:
        for seat in seats.values():
            await seat.stop()
        await running


def ready(seat: Seat) -> bool:
    return seat.engine is not None and len(seat.engine.owned) == PARTITIONS and bool(seat.health()["healthy"])


def billed(parts: Part) -> Counter[str]:
    """customer → units that the rail has taken."""
    with urllib.request.urlopen(f"{parts.rail.url}/_admin/events", timeout=30) as answer:
        events = json.load(answer)["data"]
    units: Counter[str] = Counter()
    for event in events:
        assert not event["error"]
        units[event["customer"]] += int(event["value"])
    return units


async def test_twenty_seconds_without_the_broker(
    parts: Part, site: Site, port: StripePort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """kill −9 of the broker under load: emitters spool and drain, all three groups say why they wait, and every unit counts once."""
    monkeypatch.setattr(stripe_fold, "TRANSACTION_S", 3.0)  # transactions fail in this outage, as in one of minutes
    customers, store = await opened(site, port, 1), store_of(parts.settings)
    emitter, sent = Emitter(parts.broker.bootstrap, spool_dir=tmp_path), Counter[str]()
    await emitter.start()
    stop = asyncio.Event()

    async def emit() -> None:
        accounts = list(customers)
        while not stop.is_set():
            for number in range(RATE // 20):
                account = accounts[number % PARTITIONS]
                given = {"surface": "rest", "operation": "GET /", "principal_kind": "user", "principal": "u"}
                assert emitter.emit(account=account, status="ok", latency_us=1, **given)
                sent[account] += 1
            await asyncio.sleep(0.05)

    makers = {
        "accounts": lambda: site.accounts(),
        "audit": lambda: site.audit(store),
        "stripe": lambda: site.stripe(port),
    }
    async with seated(parts.broker.bootstrap, **makers) as seats:
        emitting = asyncio.create_task(emit())
        await until(lambda: sum(billed(parts)[customer] for customer in customers.values()) > 0)
        before, gone_at = len(asyncio.all_tasks()), time.monotonic()
        parts.broker.kill()
        await until(lambda: all("kafka" in seat.health()["reasons"] for seat in seats.values()))
        await until(lambda: time.monotonic() > gone_at + AWAY_S)
        waiting = emitter.counters
        parts.broker.start()  # from the thread that outlives it
        await asyncio.to_thread(parts.broker.wait_ready)
        await until(lambda: all(ready(seat) for seat in seats.values()))
        stop.set()
        await emitting
        left = await emitter.close(60.0)
        assert sum(left.values()) == 0, left
        accounts = seats["accounts"]
        await until(lambda: {name: used(accounts.engine, name) for name in customers} == sent)  # type: ignore[arg-type]
        assert waiting["emitted"] > RATE * AWAY_S / 4
        await until(lambda: billed(parts) == {customers[name]: units for name, units in sent.items()})
        await until(lambda: rows(store) == sum(sent.values()))
        await until(lambda: len(asyncio.all_tasks()) <= before + 3)
    store.close()


def rows(store: AuditStore) -> int:
    """Accepted usage in the audit log, which has no gap."""
    sql = "SELECT count() AS rows, uniqExact(kafka_offset) AS offsets, max(kafka_offset) + 1 AS next FROM usage_log"
    for row in store.rows(f"{sql} GROUP BY kafka_partition"):
        assert row["rows"] == row["offsets"] == row["next"]
    return int(store.rows("SELECT count() AS rows FROM usage")[0]["rows"])


async def test_a_fenced_sender_leaves_and_comes_back_with_what_the_log_says(
    parts: Part, site: Site, port: StripePort
) -> None:
    """A sender that a successor has shut out does not shut that one out: it is seated anew, and bills each unit once."""
    customers = await opened(site, port, 2)
    # A session that outlasts a busy machine: a rebalance would fence in turn, as it may.
    makers = {"accounts": site.accounts, "stripe": lambda: site.stripe(port, session_timeout_ms=20_000)}
    async with seated(parts.broker.bootstrap, **makers) as seats:
        first = seats["stripe"].engine
        assert first is not None
        successors = [
            await started_producer(parts.broker.bootstrap, {}, transactional_id=f"stripe-{site.epoch}-{number}")
            for number in range(PARTITIONS)
        ]
        for account in customers:
            await site.emit(account, 5)
        await until(lambda: seats["stripe"].engine is not first)
        assert first.owned == {}
        await until(lambda: all(billed(parts)[customer] == 5 for customer in customers.values()))
        assert seats["stripe"].rejoined >= 1
        for successor in successors:
            await successor.stop()


async def test_a_failed_transaction_is_the_last_of_its_producer(
    parts: Part, site: Site, port: StripePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refused write nothing more is written, nobody is shut out, and only a new assignment makes a producer."""
    fold = StripeFold(site.epoch, None, port, parts.settings, None)  # type: ignore[arg-type]
    await fold.fence([0])
    await fold.write_checkpoint(0, [(b"key", b"one")])
    successor = await started_producer(parts.broker.bootstrap, {}, transactional_id=f"stripe-{site.epoch}-0")
    try:
        for _ in range(2):
            with pytest.raises(Unseated):
                await fold.write_checkpoint(0, [(b"key", b"two")])
        async with successor.transaction():
            await successor.send_and_wait(CHECKPOINTS.name, b"successor", key=b"key", partition=0)
        with pytest.raises(Unseated, match="not ours"):
            await fold.write_checkpoint(1, [(b"key", b"three")])
    finally:
        await fold.revoked([0])
        await successor.stop()


def health(at: int) -> dict[str, Any]:
    """A worker's answer, red or green; nothing where it does not listen."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{at}/health", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
    except OSError:
        return {}
    return found


async def test_a_worker_started_without_kafka_waits(parts: Part) -> None:
    """It does not end: it is red with the reason, joins when a broker answers, and ends cleanly when asked to."""
    parts.broker.kill()
    at = free_port()
    environment = {
        "TOLLWAY_KAFKA_BOOTSTRAP": parts.broker.bootstrap,
        "TOLLWAY_DATA": str(parts.settings.data),
        "TOLLWAY_REPLICATION": "1",
        "TOLLWAY_HEALTH_PORT": str(at),
        "TOLLWAY_STRIPE_URL": parts.rail.url,
        "TOLLWAY_STRIPE_KEY": parts.rail.key,
        "TOLLWAY_SESSION_TIMEOUT_MS": "2000",
    }
    argv = [sys.executable, "-m", "tollway.streams.cli", "worker", "--group", "stripe"]
    worker = await asyncio.to_thread(subprocess.Popen, argv, env=environment)
    try:
        await until(lambda: "away for" in str(health(at).get("groups")))
        assert worker.poll() is None
        parts.broker.start()
        await until(lambda: bool(health(at).get("healthy")))
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 60) == 0
    finally:
        worker.kill()
        worker.wait()
