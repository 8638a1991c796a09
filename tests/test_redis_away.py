"""Redis away, flushed, older, empty, slow, full, read-only or locked: COLD until rewritten, then the same totals to the unit."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.sinks_site import DEADLINE_S, MAX_POLL_S, PARTITIONS, Site, Watch, caught_up, log_of, running, site_of, until
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Unavailable
from tollway.connectors.redis import connect, read_quota
from tollway.schemas.lane import LANES, lane, tag
from tollway.schemas.topics import METER_EVENTS
from tollway.streams.engine import Engine
from tollway.streams.quota_view import QuotaView
from tollway.streams.settings import Settings

CUSTOMER = "cus_"
SCOPES = 40
"""Principals of an account."""
TIMEOUT_S = 1.0

Totals = dict[tuple[str, str, str, int], int]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with log_of(tmp_path_factory.mktemp("log")) as found:
        yield found


@pytest.fixture
async def site(settings: Settings) -> AsyncIterator[Site]:
    async with site_of(settings) as found:
        if (await found.ends())[0] == 1:
            await found.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
            await found.open((found.account(number) for number in range(PARTITIONS)), lambda name: f"cus_{name}")
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey of the test's own, on a port that it keeps."""
    with ValkeyServer(tmp_path / "redis", free_port()) as found:
        yield found


class Quotas:
    """Group accounts with its view, and a reader beside it that never sleeps."""

    def __init__(self, site: Site, engine: Engine, view: QuotaView, url: str) -> None:
        self.site, self.engine, self.view, self.url = site, engine, view, url
        self.reader = connect(url, timeout_s=TIMEOUT_S)
        self.watch = Watch(engine)

    def counted(self, account: str) -> Totals:
        """What the fold says of an account."""
        state = self.engine.owned[lane(account) % PARTITIONS].state
        found: Totals = state.parts["quota"].totals(account)
        return found

    async def read(self, account: str) -> tuple[str, Totals]:
        """What a reader is told: the lane's state and the totals in use."""
        found = await read_quota(self.reader, account)
        rows = found["totals"]
        return found["state"], {(row["scope"], row["meter"], row["window"], row["start"]): row["used"] for row in rows}

    async def shown(self) -> bool:
        """Whether every account reads READY with exactly the live totals of the fold."""
        for account in map(self.site.account, range(PARTITIONS)):
            state, totals = await self.read(account)
            if state != "READY" or totals != self.counted(account):
                return False
        return True

    async def agree(self) -> None:
        """Wait until everything folded shows, to the unit, in lanes that are READY."""
        await caught_up(self.site, self.engine, [self.watch])
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    if await self.shown():
                        break
                except Unavailable:
                    self.watch.look()
                await asyncio.sleep(0.05)
        await until(lambda: self.view.stats()["error"] is None and self.view.stats()["dirty"] == 0)
        assert self.watch.kept()

    async def complains(self, words: str, failures: int) -> None:
        """Wait until the view tells its error by these words, and that it failed so often."""

        def told() -> bool:
            stats = self.view.stats()
            return words in (stats["error"] or "") and stats.get("failures", 0) >= failures

        await until(told, watches=[self.watch])

    async def emit(self, count: int = 20) -> None:
        """Usage of many principals in each partition."""
        for number in range(PARTITIONS):
            for who in range(0, SCOPES, 10):
                await self.site.emit(self.site.account(number), count // 10, principal=f"p{who}")


@asynccontextmanager
async def counting(site: Site, server: ValkeyServer) -> AsyncIterator[Quotas]:
    """Quotas counted and shown."""
    view = QuotaView(connect(server.url, timeout_s=TIMEOUT_S), site.epoch)
    await view.start()
    engine = site.accounts(view)
    try:
        async with running(engine):
            quotas = Quotas(site, engine, view, server.url)
            await quotas.emit()
            await quotas.agree()
            yield quotas
            await quotas.reader.aclose()
    finally:
        await view.close()


def admin(server: ValkeyServer) -> redis.Redis:
    """A client of the operator's."""
    return redis.Redis(host=server.host, port=server.port, password=server.password)


async def started(server: ValkeyServer) -> None:
    server.start()
    await asyncio.to_thread(server.wait_ready)


async def test_redis_away_keeps_nobody_waiting(site: Site, server: ValkeyServer) -> None:
    """Away for three of max.poll.interval: usage is folded and billed meanwhile, each total waits once however often it
    changes, since when is told; afterwards every total shows, and no partition was ever paused or given back."""
    async with counting(site, server) as quotas:
        server.kill()
        began, away_ms = time.monotonic(), time.time_ns() // 1_000_000
        billed = sum((await site.ends(METER_EVENTS.name)).values())
        while time.monotonic() < began + 3 * MAX_POLL_S:
            await quotas.emit()
            await caught_up(site, quotas.engine, [quotas.watch])
        told = quotas.view.stats()
        assert "Redis does not answer" in told["error"]
        assert 0 <= told["failing_since_ms"] - away_ms < 5_000
        kept = sum(len(quotas.counted(site.account(number))) for number in range(PARTITIONS))
        assert 0 < told["dirty"] <= kept
        assert sum((await site.ends(METER_EVENTS.name)).values()) > billed
        assert quotas.engine.health()["healthy"]
        assert not quotas.watch.paused
        await started(server)
        await quotas.agree()
        assert quotas.view.stats()["failing_since_ms"] is None


async def flushed(server: ValkeyServer, copy: Path) -> None:
    """FLUSHALL under a running worker."""
    with admin(server) as client:
        client.flushall()


async def emptied(server: ValkeyServer, copy: Path) -> None:
    """Another server at the same address, without data."""
    server.kill()
    shutil.rmtree(server.data / "valkey")
    await started(server)


async def set_back(server: ValkeyServer, copy: Path) -> None:
    """The same server, restarted from the older copy of its folder."""
    server.kill()
    shutil.rmtree(server.data / "valkey")
    shutil.copytree(copy, server.data / "valkey")
    await started(server)


@pytest.mark.parametrize("lose", [flushed, emptied, set_back])
async def test_a_redis_that_forgot_is_cold_until_rewritten(
    site: Site, server: ValkeyServer, tmp_path: Path, lose: Any
) -> None:
    """Flushed, replaced or set back to an older copy while the worker runs: READY never comes with fewer units than an
    older copy has, zero is never read, what was forgotten gets a new generation, and then all totals are as the fold has them."""
    async with counting(site, server) as quotas:
        server.stop()
        shutil.copytree(server.data / "valkey", tmp_path / "copy")
        await started(server)
        await quotas.agree()
        account = site.account(0)
        floor = dict(quotas.counted(account))
        await quotas.emit()
        await quotas.agree()
        with admin(server) as client:
            used = [lane(name) for name in map(site.account, range(PARTITIONS))]
            gens = {number: int(client.hget(f"{tag(number)}m", "gen") or 0) for number in used}
        states, over = set[str](), asyncio.Event()
        hammer = asyncio.create_task(watched(quotas, account, floor, states, over))
        await lose(server, tmp_path / "copy")
        await quotas.emit()
        await quotas.agree()
        over.set()
        await hammer
        assert states >= {"COLD", "READY"}
        with admin(server) as client:
            # Redis forgot something of these lanes for certain; others may be as they were, or be rewritten a little later.
            assert all(int(client.hget(f"{tag(number)}m", "gen") or 0) > gen for number, gen in gens.items())
            await until(lambda: {client.hget(f"{tag(number)}m", "state") for number in range(LANES)} == {b"READY"})


async def watched(quotas: Quotas, account: str, floor: Totals, states: set[str], over: asyncio.Event) -> None:
    """Read without a rest: READY always comes with at least the totals of `floor`."""
    while not over.is_set():
        try:
            state, totals = await quotas.read(account)
        except Unavailable:
            state, totals = "away", {}
        states.add(state)
        if state == "READY":
            assert all(totals.get(name, 0) >= units for name, units in floor.items()), (floor, totals)
        await asyncio.sleep(0)


@asynccontextmanager
async def hanging(server: ValkeyServer) -> AsyncIterator[str]:
    """Takes calls and answers none."""
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    yield "does not answer"
    os.kill(server.pid, signal.SIGCONT)


@asynccontextmanager
async def read_only(server: ValkeyServer) -> AsyncIterator[str]:
    """A replica of a master that is gone."""
    with admin(server) as client:
        client.replicaof("127.0.0.1", free_port())
        yield "read only replica"
        client.replicaof("NO", "ONE")


@asynccontextmanager
async def full(server: ValkeyServer) -> AsyncIterator[str]:
    """At maxmemory, evicting nothing."""
    with admin(server) as client:
        client.config_set("maxmemory", 1)
        yield "maxmemory"
        client.config_set("maxmemory", 0)


@asynccontextmanager
async def locked(server: ValkeyServer) -> AsyncIterator[str]:
    """Another password, and every connection cut."""
    with admin(server) as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)
        yield "TOLLWAY_REDIS_URL"
        client.config_set("requirepass", server.password)


@asynccontextmanager
async def forgetful(server: ValkeyServer) -> AsyncIterator[str]:
    """Set to evict, and every connection cut: what it is told now it may forget."""
    with admin(server) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.client_kill_filter(_type="normal", skipme=True)
        yield "set it to noeviction"
        client.config_set("maxmemory-policy", "noeviction")


async def test_a_redis_in_trouble_is_counted_told_and_tried_again(site: Site, server: ValkeyServer) -> None:
    """Hanging, a read-only replica, full, locked or set to evict: each is named in the view's error and counted, none is
    raised into the engine, which folds on and keeps its partitions; once put right, all totals are there."""
    async with counting(site, server) as quotas:
        for trouble in (hanging, read_only, full, locked, forgetful):
            before = quotas.view.stats().get("failures", 0)
            async with trouble(server) as words:
                await quotas.emit()
                await caught_up(site, quotas.engine, [quotas.watch])
                await quotas.complains(words, before + 2)
                assert quotas.engine.health()["healthy"], quotas.engine.health()
            await quotas.agree()
