"""The Redis view: shows what the fold counts, and heals whatever happens to Redis."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import msgpack
import pytest
import redis

from tests.batches import NOW_S, usage
from tests.quota_world import ACCOUNT, EPOCH, HOME, LANES, PREFIX, Client, Log, Views, meta, shown, until, written
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Refused
from tollway.connectors.redis import connect, fly
from tollway.schemas.lane import lane, tag
from tollway.streams.dedupe import Seen
from tollway.streams.quota_jobs import Sweep, View, due
from tollway.streams.quota_lane import Phase
from tollway.streams.quota_view import OTHER_LOG, QuotaView

HOUR = 3_600


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[Client]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as found:
        found.flushdb()
        yield found


@pytest.fixture
async def views(valkey: ValkeyServer) -> AsyncIterator[Views]:
    made = Views(valkey.url)
    yield made
    await made.close()


async def test_an_empty_redis_is_filled_and_ready(client: Client, views: Views) -> None:
    """Lanes without meta are rewritten: totals, ends, policy, and READY for every lane of the partition, used or not."""
    view, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    assert shown(client) == log.totals()
    assert (meta(client)["state"], meta(client)["off"]) == ("READY", str(log.state.next_offset))
    assert meta(client)["log"] == str(NOW_S * 1000)
    assert {client.hget(f"{tag(number)}m", "state") for number in LANES} == {b"READY"}
    policy = client.hgetall(f"{PREFIX}p:{ACCOUNT}")
    assert (policy[b"acct|calls|h"], policy[b"frozen"]) == (b"9", b"0")
    ends = dict(client.zrange(f"{PREFIX}fx", 0, -1, withscores=True))
    assert ends[f"{ACCOUNT}~acct calls h:{NOW_S}".encode()] == NOW_S + HOUR
    assert len(ends) == 6
    assert view.stats()["rewrites"] == len(LANES)


async def test_only_what_was_touched_is_written(client: Client, views: Views) -> None:
    """After the first writing a batch costs its own totals: a field changed behind the fold's back stays changed."""
    view, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    client.hset(f"{PREFIX}s:{ACCOUNT}~user:u2", "calls L:0 u", "77")
    log.fold(usage())
    await written(view, log)
    assert shown(client) == {**log.totals(), ("user:u2", "calls L:0 u"): "77"}
    assert meta(client)["off"] == str(log.state.next_offset)


async def test_an_assignment_refreshes_without_cold(client: Client, views: Views) -> None:
    """A READY lane stays READY under its generation while its new owner writes all that it holds."""
    first, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await first.assigned({HOME: log.state})
    assert await first.drained(20)
    before = meta(client)
    client.delete(f"{PREFIX}s:{ACCOUNT}~user:u2")
    second = await views()
    await second.assigned({HOME: Log.load(log.dump(), log.state.directory).state})
    assert await second.drained(20)
    assert shown(client) == log.totals()
    assert (meta(client)["gen"], meta(client)["state"]) == (before["gen"], "READY")
    assert second.stats().get("rewrites", 0) == 0


async def test_totals_beyond_the_noted_offset_do_not_show(client: Client, views: Views) -> None:
    """What was folded but not noted is not in Redis, however long; the note then brings it, at its own offset."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    log.fold(usage())
    assert not await view.drained(0.3)
    assert shown(client) == {}
    await written(view, log)
    assert shown(client) == log.totals()
    assert meta(client)["off"] == str(log.state.next_offset)


async def test_a_fold_that_never_rests_still_shows(client: Client, views: Views) -> None:
    """Under load the totals are always beyond the noted offset when a turn looks: they are taken at the note itself."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    start = log.state.next_offset
    log.fold(usage())
    deadline = time.monotonic() + 20
    while int(meta(client)["off"]) < start + 50:
        assert time.monotonic() < deadline, meta(client)
        view.note(HOME, log.state)
        log.fold(usage(principal=f"u{log.state.next_offset}"))
        await asyncio.sleep(0.001)
    await written(view, log)
    assert shown(client) == log.totals()


async def test_log_time_beats_without_usage(client: Client, views: Views) -> None:
    """Each step every lane of the partition is told the log time, though nothing is dirty."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    log.at(NOW_S + 10)
    view.note(HOME, log.state)
    told = str((NOW_S + 10) * 1000).encode()
    await until(lambda: {client.hget(f"{tag(number)}m", "log") for number in LANES} == {told}, "log time in every lane")


async def test_a_flushed_redis_is_rewritten_in_passing(client: Client, views: Views) -> None:
    """A flush while the worker runs is found at the next heartbeat: the lane is COLD or missing until all is back."""
    view, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    client.flushdb()
    log.at(NOW_S + 5)
    await written(view, log)
    await until(lambda: meta(client).get("state") == "READY", "READY again")
    assert shown(client) == log.totals()
    ends = client.zcard(f"{PREFIX}fx")
    assert ends == 6


async def test_an_older_copy_of_redis_is_found_out(client: Client, views: Views) -> None:
    """A Redis that comes back with an older state is seen by `expect`, marked COLD, and rewritten under a new generation."""
    view, log = await views(), Log()
    log.fold(usage())
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    copy, gen = {key: client.dump(key) for key in client.keys("*")}, meta(client)["gen"]
    log.fold(usage(principal="u2"))
    await written(view, log)
    client.flushdb()
    for key, value in copy.items():
        client.restore(key, 0, value)
    log.fold(usage())
    await written(view, log)
    assert shown(client) == log.totals()
    assert int(meta(client)["gen"]) > int(gen)
    assert meta(client)["state"] == "READY"


async def test_a_redis_that_is_away_keeps_nobody_waiting(tmp_path: Path, views: Views) -> None:
    """With Redis killed, notes return at once and the error is told; when it is back everything shows."""
    port = free_port()
    with ValkeyServer(tmp_path, port) as server:
        view, log = await views(server.url), Log()
        log.fold(usage())
        await view.assigned({HOME: log.state})
        assert await view.drained(20)
        server.kill()
        for number in range(20):
            log.fold(usage(principal=f"u{number}"))
            view.note(HOME, log.state)
        await until(lambda: view.stats()["error"], "the error is told")
        assert view.stats()["dirty"] > 0
        server.start()
        await asyncio.to_thread(server.wait_ready)
        await written(view, log)
        with redis.Redis(host=server.host, port=server.port, password=server.password) as direct:
            assert shown(direct) == log.totals()
        assert view.stats()["error"] is None


async def test_a_worker_starts_while_redis_is_away(tmp_path: Path, views: Views) -> None:
    """No Redis at the start is no reason not to fold: the view waits for it."""
    server = ValkeyServer(tmp_path, free_port())
    view, log = await views(server.url), Log()
    log.fold(usage())
    await view.assigned({HOME: log.state})
    assert not await view.drained(0.2)
    with server:
        assert await view.drained(20)


async def test_a_redis_that_may_forget_stops_the_start(tmp_path: Path) -> None:
    """A view on a Redis that evicts refuses to start, and says why."""
    with ValkeyServer(tmp_path) as server:
        with redis.Redis(host=server.host, port=server.port, password=server.password) as direct:
            direct.config_set("maxmemory-policy", "allkeys-lru")
        client = connect(server.url)
        with pytest.raises(Refused, match="noeviction"):
            await QuotaView(client, EPOCH).start()
        await client.aclose()


async def test_what_is_older_than_redis_stays_dirty(client: Client, views: Views) -> None:
    """A fold that was set back writes nothing until it has read up to where its predecessor was, then everything."""
    first, log = await views(), Log()
    log.fold(usage())
    early = log.dump()
    log.fold(usage(), usage(principal="u2"))
    await first.assigned({HOME: log.state})
    assert await first.drained(20)
    await first.revoked([HOME])
    ahead = shown(client)
    second, again = await views(), Log.load(early, log.state.directory)
    await second.assigned({HOME: again.state})
    await until(lambda: second.stats().get("old", 0) > 0, "an apply was refused")
    assert not await second.drained(0.2)
    assert shown(client) == ahead
    again.fold(usage(), usage(principal="u2"))
    await written(second, again)
    assert shown(client) == ahead == again.totals()


async def test_lanes_of_another_log_are_left_alone_and_named(client: Client, views: Views) -> None:
    """A Redis full of another log's lanes is not touched: the stats say what to do, and a flush heals it."""
    other, log = await views(epoch="0-other"), Log()
    log.fold(usage())
    await other.assigned({HOME: log.state})
    assert await other.drained(20)
    await other.revoked([HOME])
    before, mine = shown(client), Log()
    view = await views()
    mine.fold(usage(principal="u9"))
    await view.assigned({HOME: mine.state})
    await until(lambda: view.stats()["lanes"] == {"halted": 4}, "all lanes halted")
    assert view.stats()["error"] == OTHER_LOG
    assert shown(client) == before
    client.flushdb()
    await until(lambda: shown(client) == mine.totals(), "the flushed lanes are ours", 30)


async def test_a_revoked_partition_is_not_written_any_more(client: Client, views: Views) -> None:
    """Before it lets go the view writes what is dirty; afterwards notes of that partition do nothing."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    log.fold(usage())
    view.note(HOME, log.state)
    await view.revoked([HOME])
    told = log.totals()
    assert shown(client) == told
    log.fold(usage())
    view.note(HOME, log.state)
    assert await view.drained(5)
    assert shown(client) == told


async def test_a_hold_is_closed_with_its_usage(client: Client, views: Views) -> None:
    """Usage that names a hold gives back what the hold holds, in the same step that shows the usage."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    record = msgpack.packb([ACCOUNT, "call-1", f"{ACCOUNT}~acct", f"calls h:{NOW_S}", "3"])
    client.hset(f"{PREFIX}h:hold-1", mapping={"st": "C", "r": record})
    client.zadd(f"{PREFIX}hx", {"hold-1": NOW_S})
    client.hset(f"{PREFIX}s:{ACCOUNT}~acct", f"calls h:{NOW_S} h", "5")
    log.fold(usage(hold="hold-1"))
    await written(view, log)
    assert client.hget(f"{PREFIX}s:{ACCOUNT}~acct", f"calls h:{NOW_S} h") == b"2"
    assert not client.exists(f"{PREFIX}h:hold-1")


async def test_sweep_asks_the_fold_about_captured_holds(client: Client, views: Views, valkey: ValkeyServer) -> None:
    """A captured hold whose close was lost is closed once sweep asks and de-duplication knows its usage."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    source = f"{NOW_S * 1000:012x}" + "7" * 20
    for hold, sequence in (("folded", 3), ("waits", 9)):
        record = msgpack.packb([ACCOUNT, f"call-{hold}", f"{ACCOUNT}~acct", "calls L:0", "1"])
        client.hset(f"{PREFIX}h:{hold}", mapping={"st": "C", "r": record, "src": source, "seq": sequence})
        client.zadd(f"{PREFIX}hx", {hold: NOW_S * 1000})
    log.state.dedupe.sources[source] = {lane(ACCOUNT): Seen(high=5)}
    far, lanes = connect(valkey.url), View.of(log.state, 0.0)
    for found in lanes.lanes.values():
        found.phase, found.expect = Phase.LIVE, log.state.next_offset
    sweeps = [job for job in due(lanes, EPOCH, map(str, count()), 1e9, Counter()) if isinstance(job, Sweep)]
    assert len(sweeps) == len(LANES)
    for job, reply in zip(sweeps, await fly(far, [job.call for job in sweeps]), strict=True):
        job.answered(reply, 1e9)
    await far.aclose()
    assert log.quota.closes == {lane(ACCOUNT): ["folded"]}
    await written(view, log)
    assert client.exists(f"{PREFIX}h:waits", f"{PREFIX}h:folded") == 1


async def test_many_totals_travel_in_parts(client: Client, views: Views) -> None:
    """A lane with thousands of totals is written in chained calls, and another in between is not starved."""
    view, log = await views(), Log()
    log.fold(*[usage(principal=f"u{number}") for number in range(2_000)])
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    assert shown(client) == log.totals()
    assert len(log.totals()) == 6_003
    assert int(meta(client)["part"]) >= 6
