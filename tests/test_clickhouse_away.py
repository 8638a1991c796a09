"""ClickHouse away, hanging, or answering halfway: the audit group waits with what it has, the others go on, nothing is missing."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from tests.relay import relay_to
from tests.sinks_site import (
    DEADLINE_S,
    MAX_POLL_S,
    PARTITIONS,
    Site,
    Watch,
    caught_up,
    folded,
    log_of,
    running,
    site_of,
    until,
    used,
)
from tollway.connectors.clickhouse import ANSWER_TIMEOUT_S, AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.schemas.topics import USAGE
from tollway.streams import engine as engine_module
from tollway.streams import owned
from tollway.streams.audit_looks import verify_audit
from tollway.streams.engine import Engine
from tollway.streams.owned import STASH_BYTES_MAX
from tollway.streams.settings import Settings
from tollway.streams.status import status

DAY_S = 12
"""A day of this log: `snapshot_s`, 7,200 times shorter than a real one."""
LOST_ANSWERS = 6
STASH_MAX, FETCH_MAX = 18_000, 2_000
"""The bounds of this module's engines; a block of 16,384 records still fits."""
BURST = 25_000
"""More than a partition may hold while it waits."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    """A ClickHouse of this module's own: it is stopped and killed."""
    with ClickHouseServer(tmp_path_factory.mktemp("clickhouse")) as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, server: ClickHouseServer) -> Iterator[Settings]:
    """A log whose audit log is `server`."""
    told: dict[str, Any] = {"clickhouse_host": server.host, "clickhouse_port": server.port}
    told |= {"clickhouse_user": server.user, "clickhouse_password": server.password}
    with log_of(tmp_path_factory.mktemp("log"), snapshot_s=DAY_S, **told) as found:
        store = store_of(found)
        store.migrate()
        store.close()
        yield found


@pytest.fixture
async def site(settings: Settings) -> AsyncIterator[Site]:
    async with site_of(settings) as found:
        if (await found.ends())[0] == 1:
            await found.control.broadcast("meter.add", {"meter": "calls"})
            await found.open(found.account(number) for number in range(PARTITIONS))
        yield found


def store_of(settings: Settings, timeout_s: float = 3.0) -> AuditStore:
    """The audit log's database; gives up a silent server sooner than a worker would."""
    return AuditStore(
        settings.clickhouse_host,
        settings.clickhouse_port,
        settings.clickhouse_user,
        settings.clickhouse_password.get_secret_value(),
        settings.clickhouse_database,
        timeout_s=timeout_s,
    )


@asynccontextmanager
async def auditing(site: Site, through: Settings | None = None) -> AsyncIterator[tuple[Engine, AuditStore]]:
    """Group audit at work and level with the log."""
    store = store_of(through or site.settings)
    engine = site.audit(store)
    async with running(engine):
        level = await site.mark()
        await until(lambda: folded(engine, level))
        yield engine, store
    await asyncio.to_thread(store.close)


async def proven(site: Site, engine: Engine) -> dict[str, Any]:
    """Let the group catch up and checkpoint, then prove the audit log; its report, green."""
    level = await site.mark()
    await until(lambda: folded(engine, level) and all(o.checkpointed >= level[n] for n, o in engine.owned.items()))
    report = await verify_audit(site.settings, lambda _: None)
    assert report["ok"], report
    assert report["records"] >= sum(level.values())
    return report


async def test_a_day_without_clickhouse_stops_nothing_else_and_leaves_no_gap(
    site: Site, server: ClickHouseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hanging, then killed, for a day of this log and three of max.poll.interval: partitions are paused and kept, memory
    stays at its bounds, quotas and bills go on, and afterwards the log is proven whole, each record once."""
    monkeypatch.setattr(owned, "STASH_RECORDS_MAX", STASH_MAX)
    monkeypatch.setattr(engine_module, "FETCH_RECORDS_MAX", FETCH_MAX)
    accounts = site.accounts()
    async with auditing(site) as (audit, _), running(accounts):
        watches = [Watch(audit), Watch(accounts)]
        await caught_up(site, accounts)
        before = {name: used(accounts, name) for name in map(site.account, range(PARTITIONS))}
        site.sent.clear()
        began = time.monotonic()
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        await site.emit(site.account(1), 10)
        await until(lambda: audit.health()["blocked"], watches=watches)
        for _ in range(BURST // 5_000):
            await site.emit(site.account(0), 5_000)
        await caught_up(site, accounts, watches)
        server.kill()
        while time.monotonic() < began + max(DAY_S, 3 * MAX_POLL_S):
            await site.emit(site.account(2), 3)
            await caught_up(site, accounts, watches)
        assert {name: used(accounts, name) - before[name] for name in site.sent} == site.sent
        assert all(watch.kept() for watch in watches)
        assert 0 in watches[0].paused
        assert STASH_MAX < watches[0].stash <= STASH_MAX + FETCH_MAX
        assert watches[0].stash_bytes <= STASH_BYTES_MAX + (1 << 20)
        blocked = audit.health()["blocked"]
        assert blocked["for_s"] >= DAY_S - 3
        assert "does not answer" in blocked["reason"]
        shown = await status(site.settings)
        assert shown["groups"]["audit"]["lag"] > BURST
        assert shown["groups"]["audit"]["standing_s"] >= DAY_S - 3
        server.start()
        await asyncio.to_thread(server.wait_ready)
        report = await proven(site, audit)
        assert report["records"] > BURST
        await until(lambda: audit.health()["blocked"] is None)
        assert all(watch.kept() for watch in watches)
    assert await first_offsets(site) == dict.fromkeys(range(PARTITIONS), 0)


async def first_offsets(site: Site) -> dict[int, int]:
    """Where the log begins: later than 0 once it has been trimmed."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    consumer = AIOKafkaConsumer(bootstrap_servers=site.settings.kafka_bootstrap)
    await consumer.start()
    try:
        found = await consumer.beginning_offsets([TopicPartition(USAGE.name, n) for n in range(PARTITIONS)])
        return {place.partition: offset for place, offset in found.items()}
    finally:
        await consumer.stop()


TABLES = ("usage_log", "usage_events", "audit_manifest")
TOO_MANY = "parts_to_throw_insert = 1, parts_to_delay_insert = 1"
ENOUGH = "parts_to_throw_insert, parts_to_delay_insert"
HALFWAY = {
    "code 252": (
        (f"ALTER TABLE usage_events MODIFY SETTING {TOO_MANY}",),
        (f"ALTER TABLE usage_events RESET SETTING {ENOUGH}",),
    ),
    "code 774": (
        ("ALTER TABLE usage_events MODIFY SETTING table_readonly = 1",),
        ("ALTER TABLE usage_events MODIFY SETTING table_readonly = 0",),
    ),
    "code 243": (
        ("ALTER TABLE usage_log MODIFY SETTING min_free_disk_ratio_to_perform_insert = 1.0",),
        ("ALTER TABLE usage_log RESET SETTING min_free_disk_ratio_to_perform_insert",),
    ),
    "code 60": (
        ("RENAME TABLE audit_manifest TO audit_manifest_gone",),
        ("RENAME TABLE audit_manifest_gone TO audit_manifest",),
    ),
}
"""What the refusal is told by → statements that break one of the three tables, and that put it right."""


async def test_an_insert_that_stops_halfway_is_made_whole_once(site: Site) -> None:
    """Too many parts, read-only, disk full, a table gone: the group says why and since when, keeps its partitions, and when
    it is put right sends the same blocks under the same tokens: no row lies there twice, not even unmerged."""
    async with auditing(site) as (engine, store):
        for words, (breaking, mending) in HALFWAY.items():
            watch = Watch(engine)
            for statement in breaking:
                store.command(statement)
            try:
                await site.mark()
                await blocked(engine, words)
            finally:
                for statement in mending:
                    store.command(statement)
            with unmerged(store_of(site.settings, 60.0)):
                await proven(site, engine)
            assert watch.kept()
            await until(lambda: engine.health()["blocked"] is None)


async def blocked(engine: Engine, words: str) -> None:
    """Wait until health says why effects wait."""
    await until(lambda: words in (engine.health()["blocked"] or {}).get("reason", ""))


async def test_an_insert_whose_answer_is_lost_is_known_by_its_token(site: Site) -> None:
    """ClickHouse takes every insert and each first answer is cut off on the way back: sent again, stored once."""
    async with relay_to(site.settings.clickhouse_port) as relay:
        through = site.settings.model_copy(update={"clickhouse_port": relay.port})
        async with auditing(site, through) as (engine, _):
            with unmerged(store_of(site.settings, 60.0)):
                relay.swallow = LOST_ANSWERS
                await proven(site, engine)
            assert relay.swallowed == LOST_ANSWERS


def copies(store: AuditStore) -> int:
    """Rows that lie there more than once, as long as nothing is merged."""
    counts = [f"(SELECT count() FROM {table}) - (SELECT count() FROM {table} FINAL)" for table in TABLES]
    return int(store.rows(f"SELECT {' + '.join(counts)} AS n")[0]["n"])


@contextmanager
def unmerged(store: AuditStore) -> Iterator[None]:
    """Copies stay as they lie, and at the end there are no more of them than before."""
    for table in TABLES:
        store.command(f"SYSTEM STOP MERGES {table}")
    before = copies(store)
    yield
    assert copies(store) == before
    for table in TABLES:
        store.command(f"SYSTEM START MERGES {table}")
    store.close()


HANGS = """
import asyncio, sys
from types import SimpleNamespace
import pyarrow as pa
from tollway.connectors.clickhouse import AuditStore

async def main():
    store, rows = AuditStore("127.0.0.1", int(sys.argv[1]), "u", "p"), pa.record_batch({"a": [1]})
    place = {"epoch": "0-log", "kafka_partition": 0, "first_offset": 0, "last_offset": 0, "block_hash": bytes(32)}
    block = SimpleNamespace(count=1, bytes=1, log=rows, events=rows, manifest=place)
    inserting = asyncio.create_task(store.insert([block]))
    await asyncio.to_thread(sys.stdin.readline)
    inserting.cancel()
    await asyncio.wait({inserting})
    store.close()

asyncio.run(main())
"""


async def test_a_worker_ends_although_clickhouse_hangs() -> None:
    """A server that takes the connection and never answers holds nobody's exit: the call is dropped with its thread."""
    taken = asyncio.Event()
    server = await asyncio.start_server(lambda *_: taken.set(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HANGS, str(port), stdin=asyncio.subprocess.PIPE
    )
    await asyncio.wait_for(taken.wait(), DEADLINE_S)
    await asyncio.wait_for(process.communicate(b"end\n"), ANSWER_TIMEOUT_S / 3)
    server.close()
    assert process.returncode == 0
