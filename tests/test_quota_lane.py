"""A lane through its phases, without Redis; and seeded worlds in which everything happens to one."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from tests.batches import METERS, NOW_S, counts, directory, usage
from tests.quota_world import ACCOUNT, EPOCH, HOME, Client, Log, Views, meta, shown, until
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Unavailable
from tollway.connectors.redis import REWRITE_BEGIN, Answer, connect, fly
from tollway.schemas.lane import lane
from tollway.streams.dedupe import Dedupe, Seen
from tollway.streams.quota_lane import LaneView, Phase, settlement
from tollway.streams.quota_view import QuotaView

DAY = 86_400


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
    assert (found.phase, found.expect) == (Phase.REFRESH, None)
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


class World:
    """A fold, its view, a Redis that misbehaves, and predecessors that do not know that they are gone."""

    def __init__(self, seed: int, client: Client, views: Views) -> None:
        self.dice, self.client, self.views = random.Random(seed), client, views
        self.found = directory({ACCOUNT: counts((METERS[:2], "mhL", ["acct", "user"]))})
        self.log = Log(self.found)
        self.history: list[tuple[int, list[dict[str, Any]]]] = []
        self.saved = self.log.dump(), 0
        self.copies: list[dict[bytes, bytes]] = [{}]
        self.zombies: list[tuple[QuotaView, Log]] = []

    async def start(self) -> None:
        """The first fold takes the partition."""
        self.view = await self.views()
        await self.view.assigned({HOME: self.log.state})

    async def usual(self) -> None:
        """Usage is folded, and mostly noted."""
        at = self.log.state.log_time_ms // 1000 + self.dice.choice([0, 0, 1, 7, 40])
        events = [usage(principal=f"u{self.dice.randrange(9)}", at_s=at) for _ in range(self.dice.randrange(1, 30))]
        self.history.append((at, events))
        self.replay(len(self.history) - 1)
        if self.dice.random() < 0.7:
            self.view.note(HOME, self.log.state)

    def replay(self, start: int) -> None:
        """Fold the history from one point on."""
        for at, events in self.history[start:]:
            self.log.at(at)
            self.log.fold(*events)

    async def rest(self) -> None:
        """Redis gets a moment to catch up."""
        self.view.note(HOME, self.log.state)
        await self.view.drained(0.05)

    async def checkpoint(self) -> None:
        """What a crash goes back to."""
        self.saved = self.log.dump(), len(self.history)

    async def copy(self) -> None:
        """What a failover goes back to."""
        self.copies.append({key: self.client.dump(key) for key in self.client.keys("*")})

    async def flush(self) -> None:
        """Redis forgets everything."""
        self.client.flushdb()

    async def failover(self) -> None:
        """Redis forgets what came after one of the copies."""
        self.client.flushdb()
        for key, value in self.dice.choice(self.copies).items():
            if value is not None:
                self.client.restore(key, 0, value)

    async def cut(self) -> None:
        """Every connection breaks, perhaps in the middle of a flight."""
        for other in self.client.client_list():
            if other["id"] != str(self.client.client_id()):
                self.client.client_kill_filter(_id=other["id"])

    async def crash(self) -> None:
        """The fold ends; another goes on from the checkpoint."""
        await self.view.close()
        await self.takeover()

    async def twin(self) -> None:
        """The fold loses its partition without noticing."""
        self.zombies.append((self.view, self.log))
        await self.takeover()

    async def takeover(self) -> None:
        self.log, self.view = Log.load(self.saved[0], self.found), await self.views()
        await self.view.assigned({HOME: self.log.state})
        self.replay(self.saved[1])

    async def haunt(self) -> None:
        """A predecessor writes what it still has."""
        for view, log in self.zombies:
            view.note(HOME, log.state)

    async def foreign_begin(self) -> None:
        """Another fold begins a rewrite and is never heard of again."""
        far = connect_to(self.client)
        with contextlib.suppress(Unavailable):
            await fly(far, [REWRITE_BEGIN.call(lane(ACCOUNT), EPOCH, self.log.state.next_offset)])
        await far.aclose()


def connect_to(client: Client) -> Any:
    """An asynchronous client of the same server."""
    at = client.connection_pool.connection_kwargs
    return connect(f"redis://:{at['password']}@{at['host']}:{at['port']}/0")


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_redis_ends_as_the_fold(client: Client, views: Views, seed: int) -> None:
    """Seeded worlds of flushes, failovers, cut connections, crashes to a checkpoint, twins and foreign rewrites: at rest Redis
    shows the fold's totals, READY."""
    world = World(seed, client, views)
    await world.start()
    faults = [world.rest, world.checkpoint, world.copy, world.flush, world.failover, world.cut, world.crash]
    faults += [world.twin, world.haunt, world.foreign_begin]
    for _ in range(60):
        await world.dice.choice([world.usual] * 10 + faults)()
        await asyncio.sleep(0)
    for zombie, _ in world.zombies:
        await zombie.close()
    world.log.at(world.log.state.log_time_ms // 1000 + 5)
    world.view.note(HOME, world.log.state)
    await until(lambda: meta(client).get("state") == "READY" and shown(client) == world.log.totals(), "equal and READY")
    assert await world.view.drained(20)
