"""The Redis view: shows what the fold counts, and heals whatever happens to Redis."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis

from tests.batches import METERS, NOW_S, batch, counts, directory, usage
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.redis import REWRITE_BEGIN, Answer, connect, fly
from tollway.schemas.command import LogConfig
from tollway.schemas.lane import lane, tag
from tollway.streams.dedupe import Dedupe, Seen
from tollway.streams.directory import Directory
from tollway.streams.quota import Quota
from tollway.streams.quota_jobs import Sweep, View, due
from tollway.streams.quota_lane import LaneView, Phase, settlement
from tollway.streams.quota_view import OTHER_LOG, QuotaView
from tollway.streams.state import PartitionState

PARTITIONS = 64
ACCOUNT = "acme"
HOME = lane(ACCOUNT) % PARTITIONS
META = f"{tag(lane(ACCOUNT))}m"
EPOCH = "0-log"
HOUR, DAY = 3_600, 86_400

Client = Any


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[Client]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password, decode_responses=False) as found:
        found.flushdb()
        yield found


@pytest.fixture
async def views(valkey: ValkeyServer) -> AsyncIterator[Callable[..., Any]]:
    """Makes started views; closes them."""
    made: list[QuotaView] = []

    async def make(url: str = valkey.url, epoch: str = EPOCH) -> QuotaView:
        view = QuotaView(connect(url, timeout_s=2), epoch, pace_s=0.0)
        await view.start()
        made.append(view)
        return view

    yield make
    for view in made:
        await view.close()


class Log:
    """One partition's log of one account's usage, folded; `dump` and `load` are its checkpoint."""

    def __init__(self, found: Directory | None = None) -> None:
        found = found or directory(
            {ACCOUNT: counts(("calls", "mhL", ["acct", "user"]), limits=[("acct", "calls", "h", 9)])}
        )
        self.state = PartitionState(HOME, PARTITIONS, EPOCH, directory=found, parts={"quota": Quota()})
        self.state.directory.config = LogConfig(EPOCH, "test", "kid", "00" * 32)
        self.at(NOW_S)

    @property
    def quota(self) -> Quota:
        found: Quota = self.state.parts["quota"]
        return found

    def at(self, log_s: int) -> None:
        """Log time moves on, by a tick."""
        self.state.log_time_ms = log_s * 1000
        self.state.next_offset += 1
        if self.state.step_of(log_s * 1000) != self.state.step:
            self.state.step = self.state.step_of(log_s * 1000)
            self.quota.on_step(self.state.step * self.state.step_s)

    def fold(self, *events: dict[str, Any]) -> None:
        self.quota.fold(self.state.directory, batch(events, append_s=self.state.log_time_ms // 1000))
        self.state.next_offset += len(events)

    def dump(self) -> tuple[Any, int, int]:
        return msgpack.packb(self.quota.dump()), self.state.next_offset, self.state.log_time_ms

    @classmethod
    def load(cls, dumped: tuple[Any, int, int], found: Directory) -> "Log":
        log = cls(found)
        log.state.parts["quota"] = Quota.load(msgpack.unpackb(dumped[0]))
        log.state.next_offset, log.state.log_time_ms = dumped[1:]
        log.state.step = log.state.step_of(dumped[2])
        return log

    def totals(self) -> dict[tuple[str, str], str]:
        return {
            (scope, f"{meter} {window}:{start} u"): str(units)
            for (scope, meter, window, start), units in self.quota.totals(ACCOUNT).items()
        }


def shown(client: Client) -> dict[tuple[str, str], str]:
    """Every ` u` field that Redis has."""
    return {
        (key.decode().split("~", 1)[1], name.decode()): value.decode()
        for key in client.scan_iter("tw:{*}:s:*")
        for name, value in client.hgetall(key).items()
        if name.endswith(b" u")
    }


def meta(client: Client) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in client.hgetall(META).items()}


async def until(holds: Callable[[], Any], what: str, deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, f"not in {deadline_s} s: {what}"
        await asyncio.sleep(0.005)


async def written(view: QuotaView, log: Log) -> None:
    """Note the log's offset and wait until Redis has all of it."""
    view.note(HOME, log.state)
    assert await view.drained(20), view.stats()


async def test_an_empty_redis_is_filled_and_ready(client: Client, views: Any) -> None:
    """Lanes without meta are rewritten: totals, ends, policy, and READY for every lane of the partition, used or not."""
    view, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    assert shown(client) == log.totals()
    assert (meta(client)["state"], meta(client)["off"]) == ("READY", str(log.state.next_offset))
    assert meta(client)["log"] == str(NOW_S * 1000)
    lanes = [number for number in range(256) if number % PARTITIONS == HOME]
    assert {client.hget(f"{tag(number)}m", "state") for number in lanes} == {b"READY"}
    policy = client.hgetall(f"{tag(lane(ACCOUNT))}p:{ACCOUNT}")
    assert (policy[b"acct|calls|h"], policy[b"frozen"]) == (b"9", b"0")
    ends = dict(client.zrange(f"{tag(lane(ACCOUNT))}fx", 0, -1, withscores=True))
    assert ends[f"{ACCOUNT}~acct calls h:{NOW_S}".encode()] == NOW_S + HOUR
    assert len(ends) == 6
    assert view.stats()["rewrites"] == len(lanes)


async def test_only_what_was_touched_is_written(client: Client, views: Any) -> None:
    """After the first writing a batch costs its own totals: a field changed behind the fold's back stays changed."""
    view, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    client.hset(f"{tag(lane(ACCOUNT))}s:{ACCOUNT}~user:u2", "calls L:0 u", "77")
    log.fold(usage())
    await written(view, log)
    assert shown(client) == {**log.totals(), ("user:u2", "calls L:0 u"): "77"}
    assert meta(client)["off"] == str(log.state.next_offset)


async def test_an_assignment_refreshes_without_cold(client: Client, views: Any) -> None:
    """A READY lane stays READY under its generation while its new owner writes all that it holds."""
    first, log = await views(), Log()
    log.fold(usage(), usage(principal="u2"))
    await first.assigned({HOME: log.state})
    assert await first.drained(20)
    before = meta(client)
    client.delete(f"{tag(lane(ACCOUNT))}s:{ACCOUNT}~user:u2")
    second = await views()
    await second.assigned({HOME: Log.load(log.dump(), log.state.directory).state})
    assert await second.drained(20)
    assert shown(client) == log.totals()
    assert (meta(client)["gen"], meta(client)["state"]) == (before["gen"], "READY")
    assert second.stats().get("rewrites", 0) == 0


async def test_totals_beyond_the_noted_offset_do_not_show(client: Client, views: Any) -> None:
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


async def test_log_time_beats_without_usage(client: Client, views: Any) -> None:
    """Each step every lane of the partition is told the log time, though nothing is dirty."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    log.at(NOW_S + 10)
    view.note(HOME, log.state)
    lanes = [number for number in range(256) if number % PARTITIONS == HOME]
    told = str((NOW_S + 10) * 1000).encode()
    await until(lambda: {client.hget(f"{tag(number)}m", "log") for number in lanes} == {told}, "log time in every lane")


async def test_a_flushed_redis_is_rewritten_in_passing(client: Client, views: Any) -> None:
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
    ends = client.zcard(f"{tag(lane(ACCOUNT))}fx")
    assert ends == 6


async def test_an_older_copy_of_redis_is_found_out(client: Client, views: Any) -> None:
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


async def test_a_redis_that_is_away_keeps_nobody_waiting(tmp_path: Path, views: Any) -> None:
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


async def test_a_worker_starts_while_redis_is_away(tmp_path: Path, views: Any) -> None:
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


async def test_what_is_older_than_redis_stays_dirty(client: Client, views: Any) -> None:
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


async def test_lanes_of_another_log_are_left_alone_and_named(client: Client, views: Any) -> None:
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


async def test_a_revoked_partition_is_not_written_any_more(client: Client, views: Any) -> None:
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


async def test_a_hold_is_closed_with_its_usage(client: Client, views: Any) -> None:
    """Usage that names a hold gives back what the hold holds, in the same step that shows the usage."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    prefix = tag(lane(ACCOUNT))
    record = msgpack.packb([ACCOUNT, "call-1", f"{ACCOUNT}~acct", f"calls h:{NOW_S}", "3"])
    client.hset(f"{prefix}h:hold-1", mapping={"st": "C", "r": record})
    client.zadd(f"{prefix}hx", {"hold-1": NOW_S})
    client.hset(f"{prefix}s:{ACCOUNT}~acct", f"calls h:{NOW_S} h", "5")
    log.fold(usage(hold="hold-1"))
    await written(view, log)
    assert client.hget(f"{prefix}s:{ACCOUNT}~acct", f"calls h:{NOW_S} h") == b"2"
    assert not client.exists(f"{prefix}h:hold-1")


async def test_sweep_asks_the_fold_about_captured_holds(client: Client, views: Any) -> None:
    """A captured hold whose close was lost is closed once sweep asks and de-duplication knows its usage."""
    view, log = await views(), Log()
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    prefix, source = tag(lane(ACCOUNT)), f"{NOW_S * 1000:012x}" + "7" * 20
    for hold, sequence in (("folded", 3), ("waits", 9)):
        record = msgpack.packb([ACCOUNT, f"call-{hold}", f"{ACCOUNT}~acct", "calls L:0", "1"])
        client.hset(f"{prefix}h:{hold}", mapping={"st": "C", "r": record, "src": source, "seq": sequence})
        client.zadd(f"{prefix}hx", {hold: NOW_S * 1000})
    log.state.dedupe.sources[source] = {lane(ACCOUNT): Seen(high=5)}
    far, lanes = connect_of(view), View.of(log.state, 0.0)
    for found in lanes.lanes.values():
        found.phase, found.expect = Phase.LIVE, log.state.next_offset
    figures: Any = __import__("collections").Counter()
    sweeps = [job for job in due(lanes, EPOCH, map(str, count()), 1e9, figures) if isinstance(job, Sweep)]
    assert len(sweeps) == 4
    for job, reply in zip(sweeps, await fly(far, [job.call for job in sweeps]), strict=True):
        job.answered(reply, 1e9)
    assert log.quota.closes == {lane(ACCOUNT): ["folded"]}
    await written(view, log)
    assert client.exists(f"{prefix}h:waits", f"{prefix}h:folded") == 1


def connect_of(view: QuotaView) -> Any:
    return view._client


async def test_many_totals_travel_in_parts(client: Client, views: Any) -> None:
    """A lane with thousands of totals is written in chained calls, and another in between is not starved."""
    view, log = await views(), Log()
    log.fold(*[usage(principal=f"u{number}") for number in range(2_000)])
    await view.assigned({HOME: log.state})
    assert await view.drained(20)
    assert shown(client) == log.totals()
    assert len(log.totals()) == 6_003
    assert int(meta(client)["part"]) >= 6


def test_a_rewrite_waits_for_gates_where_there_are_any() -> None:
    """Gates that have acknowledged writes get two seconds to re-assert their holds; without any the lane opens at once."""
    for gates, end_at in ((0, 100.0), (3, 102.0)):
        found = LaneView(1, Phase.BEGIN)
        found.rewrite_begun(Answer("OK", -1, "COLD", 7, 5, gates), 99.0)
        assert found.applied(Answer("OK", -1, "COLD", 7, 5), 5, 0, 100.0)
        assert (found.phase, found.end_at) == (Phase.GATES, end_at)


def test_a_rewrite_taken_over_by_another_fold_is_given_up() -> None:
    """EPOCH at the end: the lane is another's; only an apply that says COLD begins again, and not within a second."""
    found = LaneView(1, Phase.BEGIN)
    found.rewrite_begun(Answer("OK", -1, "COLD", 7, 5), 99.0)
    found.applied(Answer("OK", -1, "COLD", 7, 5), 5, 0, 99.1)
    assert not found.rewrite_ended(Answer("EPOCH", 5, "COLD", 8, 5))
    assert (found.phase, found.expect) == (Phase.LIVE, None)
    found.applied(Answer("OK", 5, "COLD", 8, 5), 6, 0, 99.2)
    assert found.phase is Phase.BEGIN
    assert found.waits(6, 99.9)
    assert not found.waits(6, 100.1)


def test_settlement_follows_deduplication() -> None:
    """A captured hold's usage is folded, lost with its expired source, or still to come."""
    dedupe, source = Dedupe(), f"{NOW_S * 1000:012x}" + "7" * 20
    dedupe.sources[source] = {5: Seen(high=9, holes=[[3, 4]])}
    now = NOW_S * 1000
    assert settlement(dedupe, 5, source, 9, now) == "folded"
    assert settlement(dedupe, 5, source, 4, now) == "open"
    assert settlement(dedupe, 5, source, 10, now) == "open"
    assert settlement(dedupe, 6, source, 9, now) == "open"
    assert settlement(dedupe, 5, source, 4, now + 5 * DAY * 1000 + 1) == "lost"


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_redis_ends_as_the_fold(client: Client, views: Any, seed: int) -> None:
    """Seeded worlds of usage, flushes, older copies, cut connections, crashes to an older checkpoint, zombies and rewrites
    by others: at rest Redis shows the fold's totals, READY."""
    dice = random.Random(seed)
    found = directory({ACCOUNT: counts((METERS[:2], "mhL", ["acct", "user"]))})
    log, view = Log(found), await views()
    history: list[Any] = []
    saved, done = (log.dump(), 0), []
    copies: list[dict[bytes, bytes]] = [{}]
    await view.assigned({HOME: log.state})

    def usual() -> None:
        at = log.state.log_time_ms // 1000 + dice.choice([0, 0, 1, 7, 40])
        events = [usage(principal=f"u{dice.randrange(9)}", at_s=at) for _ in range(dice.randrange(1, 30))]
        history.append((at, events))
        replay(log, history[-1:])
        if dice.random() < 0.7:
            view.note(HOME, log.state)

    for _ in range(60):
        match dice.choice(
            ["usual"] * 8 + ["rest", "save", "copy", "flush", "older", "cut", "crash", "zombie", "begin"]
        ):
            case "usual":
                usual()
            case "rest":
                view.note(HOME, log.state)
                await view.drained(0.05)
            case "save":
                saved = (log.dump(), len(history))
            case "copy":
                copies.append({key: client.dump(key) for key in client.keys("*")})
            case "flush":
                client.flushdb()
            case "older":
                client.flushdb()
                for key, value in dice.choice(copies).items():
                    if value is not None:
                        client.restore(key, 0, value)
            case "cut":
                for other in client.client_list():
                    if other["id"] != str(client.client_id()):
                        client.client_kill_filter(_id=other["id"])
            case "crash" | "zombie" as what:
                if what == "crash":
                    await view.close()
                done.append(view)
                log, view = Log.load(saved[0], found), await views()
                await view.assigned({HOME: log.state})
                replay(log, history[saved[1] :])
            case "begin":
                with contextlib.suppress(Unavailable):
                    await fly(connect_of(view), [REWRITE_BEGIN.call(lane(ACCOUNT), EPOCH, log.state.next_offset)])
        await asyncio.sleep(0)
    for old in done:
        await old.close()
    log.at(log.state.log_time_ms // 1000 + 5)
    view.note(HOME, log.state)
    await until(lambda: meta(client).get("state") == "READY" and shown(client) == log.totals(), "equal and READY")
    assert await view.drained(20)


def replay(log: Log, history: list[Any]) -> None:
    for at, events in history:
        log.at(at)
        log.fold(*events)
