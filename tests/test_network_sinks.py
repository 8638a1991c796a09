"""Sinks that talk to Redis and Stripe: once by identity, bounded, never waiting in `record`, and honest about what is lost."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stripe_standin import T0, Billed, Standin, customer_of
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Unavailable
from tollway.connectors.redis import connect
from tollway.connectors.redis_sink import RedisSink, read_redis
from tollway.connectors.sinks import CompositeSink, MemorySink
from tollway.connectors.stripe_sink import REPEATED_S, StripeSink, identifier_of

CALL: dict[str, Any] = {
    "surface": "rest", "operation": "GET /v1/search", "account": "acme", "principal_kind": "user", "principal": "u-1",
    "status": "ok", "latency_us": 1200,
}  # fmt: skip
TOKENS = {**CALL, "quantities": {"tokens": 7, "other": 3}}


@pytest.fixture
async def redis(valkey: ValkeyServer) -> AsyncIterator[Any]:
    client = connect(valkey.url)
    await client.flushdb()
    yield client
    await client.aclose()


async def events_of(redis: Any) -> list[dict[str, Any]]:
    return [event async for _, event in read_redis(redis)]


async def test_two_processes_sinks_record_an_event_once(redis: Any) -> None:
    """The same event_id from two sinks, or sent again after a lost answer, is in the stream once, whole."""
    one, two = RedisSink(redis), RedisSink(redis)
    for sink in (one, two, one):
        assert sink.record(**CALL, event_id="0" * 32, quantities={"tokens": 10**12})
    assert one.record(**CALL)
    assert [await sink.flush(10) for sink in (one, two, one)] == [0, 0, 0]
    events = await events_of(redis)
    assert [event["event_id"] == "0" * 32 for event in events] == [True, False]
    assert events[0]["quantities"] == {"tokens": 10**12, "calls": 1}


async def test_a_full_stream_waits_for_its_reader(redis: Any) -> None:
    """A stream at its bound takes nothing more and loses nothing: the queue waits, and goes on once it is trimmed."""
    sink = RedisSink(redis, stream_max=2)
    for _ in range(3):
        sink.record(**CALL)
    assert await sink.flush(0.5) == 3
    assert "holds 2 events" in sink.failure
    places = [place async for place, _ in read_redis(redis)]
    assert len(places) == 2
    assert [place async for place, _ in read_redis(redis, after=places[0])] == places[1:]
    await redis.xtrim("{tollway:usage}:events", minid=places[1], approximate=False)
    assert await sink.flush(10) == 0
    assert len(await events_of(redis)) == 2


async def test_a_full_queue_refuses_and_counts(tmp_path: Path) -> None:
    """While Redis is away events queue up to the bound, then are refused; all that were taken arrive when it is back."""
    server = ValkeyServer(tmp_path, free_port())
    client = connect(server.url)
    sink = RedisSink(client, events_max=3)
    await sink.start()
    assert [sink.record(**CALL) for _ in range(5)] == [True, True, True, False, False]
    assert sink.lost == {"full": 2}
    assert await sink.flush(0.2) == 3
    with server:
        assert await sink.flush(20) == 0
        assert len(await events_of(client)) == 3
        await sink.close()
        await client.aclose()


async def test_the_task_sends_without_a_flush(redis: Any) -> None:
    """A started sink sends by itself, also what other threads record."""
    sink = RedisSink(redis)
    await sink.start()
    await asyncio.to_thread(sink.record, **CALL)
    async with asyncio.timeout(20):
        while not await events_of(redis):
            await asyncio.sleep(0.01)
    await sink.close()


class Rail:
    """The stand-in with one customer and one meter, and a sink on it whose clock the test moves."""

    def __init__(self, standin: Standin, billed: Billed) -> None:
        self.standin, self.billed = standin, billed
        self.now_us = T0 * 1_000_000
        known = {"acme": billed.customer}
        self.sink = StripeSink(billed.port, {"tokens": billed.event_name}, known.get, clock_us=lambda: self.now_us)

    def units(self) -> list[int]:
        return sorted(int(event["value"]) for event in self.standin.events(self.billed.customer))


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("stripe")) as found:
        found.set_clock(T0)
        yield found


@pytest.fixture
async def rail(standin: Standin) -> AsyncIterator[Rail]:
    async with customer_of(standin) as billed:
        yield Rail(standin, billed)
        standin.heal()


async def test_billable_quantities_arrive_once(rail: Rail) -> None:
    """Each quantity with an event name is one meter event under its own identifier; refusals and rails send none."""
    event_id = uuid.uuid4().hex
    rail.sink.record(**TOKENS, event_id=event_id, occurred_at=T0 * 1_000_000)
    rail.sink.record(**TOKENS, event_id=event_id, occurred_at=T0 * 1_000_000)
    rail.sink.record(**CALL)
    rail.sink.record(**{**TOKENS, "status": "denied"})
    rail.sink.record(**TOKENS, rail="x402")
    rail.sink.record(**{**TOKENS, "quantities": {"tokens": 0}})
    assert await rail.sink.flush(20) == 0
    assert (rail.units(), rail.sink.delivered, dict(rail.sink.lost)) == ([7], 1, {})
    (event,) = rail.standin.events(rail.billed.customer)
    assert event["identifier"] == identifier_of(event_id, rail.billed.event_name)


@pytest.mark.parametrize("fault", ["accept_drop", "drop", "accept_500", "500", "429"])
async def test_an_uncertain_answer_is_repeated_under_the_same_identifier(rail: Rail, fault: str) -> None:
    """Whether or not Stripe had taken it, the units are there once after the repeat."""
    rail.standin.fault(fault)
    rail.sink.record(**TOKENS, occurred_at=T0 * 1_000_000)
    assert await rail.sink.flush(30) == 0
    assert rail.units() == [7]


async def test_an_uncertain_answer_of_20_hours_ago_is_given_up_and_counted(rail: Rail) -> None:
    """Once Stripe may have forgotten the identifier a repeat could bill twice: it is lost, by name."""
    rail.standin.fault("500", count=1000)
    rail.sink.record(**TOKENS, occurred_at=T0 * 1_000_000)
    assert await rail.sink.flush(0.5) == 1
    rail.standin.heal()
    rail.now_us += (REPEATED_S + 1) * 1_000_000
    assert await rail.sink.flush(20) == 0
    assert (rail.units(), dict(rail.sink.lost)) == ([], {"rejected": 1})
    assert "20 hours" in rail.sink.rejected


async def test_an_account_without_a_customer_and_a_refusal_are_lost_by_name(rail: Rail) -> None:
    """What Stripe will never take is counted with its reason, and stops nothing behind it."""
    rail.sink.record(**{**TOKENS, "account": "stranger"})
    rail.sink.record(**TOKENS, occurred_at=(T0 - 36 * 86_400) * 1_000_000)
    rail.sink.record(**TOKENS, occurred_at=T0 * 1_000_000)
    assert await rail.sink.flush(20) == 0
    assert (rail.units(), dict(rail.sink.lost)) == ([7], {"no_customer": 1, "rejected": 1})
    assert rail.sink.rejected


async def test_a_sink_that_is_away_takes_nothing_from_the_others() -> None:
    """In a composite each sink is alone: memory has the event, and the Redis sink's queue still waits."""
    client, memory = connect("redis://127.0.0.1:1"), MemorySink()
    composite = CompositeSink({"redis": RedisSink(client), "memory": memory})
    assert composite.record(**CALL)
    assert await composite.flush(0.2) == 1
    assert len(memory.events()) == 1
    with pytest.raises(Unavailable):
        await events_of(client)
    await client.aclose()
