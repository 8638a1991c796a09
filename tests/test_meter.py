"""The meter records every call once, however it ends, and never makes one fail."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from tollway.connectors.call import current_call
from tollway.connectors.context import run
from tollway.connectors.denied import Denied, status_of_http
from tollway.connectors.emitter import Emitter
from tollway.connectors.errors import Refused
from tollway.connectors.meter import Meter
from tollway.connectors.metered import metered
from tollway.connectors.principal import Principal
from tollway.connectors.sinks import MemorySink, read_jsonl

ANN = Principal("user", "u-ann", "acme")


def metering(**arguments: Any) -> tuple[Meter, MemorySink]:
    sink = MemorySink()
    return Meter(sink, principal=ANN, **arguments), sink


async def test_a_call_is_timed_counted_and_attributed() -> None:
    """One event a call: who, what, when it began, how long it took by the given clock, what it used."""
    ticks = iter((1_000_000, 3_500_000))
    meter, sink = metering(clock_us=lambda: 1_700_000_000_000_000, clock_ns=lambda: next(ticks))
    async with meter.observe("summarise", surface="agent", model="large-2") as call:
        call.add(tokens_in=10)
        call.add(tokens_in=5, tokens_out=1)
        call.set(tokens_out=7)
    (event,) = sink.events()
    assert {name: event[name] for name in ("account", "principal_kind", "principal", "operation", "surface")} == {
        "account": "acme", "principal_kind": "user", "principal": "u-ann", "operation": "summarise", "surface": "agent",
    }  # fmt: skip
    assert (event["latency_us"], event["occurred_at"], event["status"]) == (2_500, 1_700_000_000_000_000, "ok")
    assert event["quantities"] == {"calls": 1, "tokens_in": 15, "tokens_out": 7}
    assert event["model"] == "large-2"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad"), "error"),
        (Denied(429, {"title": "slow down"}), "rate_limited"),
        (Denied(402, {"title": "pay"}), "payment_required"),
        (Denied(503, {"title": "later"}), "denied"),
        (KeyError("quota"), "rate_limited"),
        (KeyboardInterrupt(), "error"),
    ],
)
def test_what_the_call_raises_is_raised_again_with_its_status(error: BaseException, status: str) -> None:
    """The very exception leaves the block, and the event says what it means; a service can name its own."""
    meter, sink = metering(statuses={LookupError: "rate_limited"})

    def fail() -> None:
        with meter.observe("search") as call:
            call.add(rows=1)
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert [event["status"] for event in sink.events()] == [status]


def test_a_status_of_http_is_one_of_ours() -> None:
    """401 and 403 are denied, 402 is payment_required, 429 rate_limited, other refusals and failures errors."""
    codes = (200, 304, 400, 401, 402, 403, 404, 429, 500, 503)
    assert [status_of_http(code) for code in codes] == [
        "ok", "ok", "error", "denied", "payment_required", "denied", "error", "rate_limited", "error", "error",
    ]  # fmt: skip


def test_someone_else_s_status_code_is_no_refusal_of_ours() -> None:
    """A provider's 429 that reaches the caller as an exception is an error of ours, with what it had used."""

    class ProviderError(Exception):
        status_code = 429

    meter, sink = metering()
    with suppress(ProviderError), meter.observe("search"):
        raise ProviderError
    assert sink.events()[0]["status"] == "error"


async def test_a_cancelled_call_is_recorded_and_stays_cancelled() -> None:
    """Cancelling a call neither loses what it had used nor is it swallowed."""
    meter, sink = metering()
    started = asyncio.Event()

    async def work() -> None:
        async with meter.observe("search") as call:
            call.add(tokens_out=3)
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (event,) = sink.events()
    assert (event["status"], event["attributes"]) == ("error", {"ended": "cancelled"})
    assert event["quantities"] == {"calls": 1, "tokens_out": 3}


class Broken:
    """A sink whose network is away."""

    def record(self, **fields: Any) -> bool:
        raise ConnectionError("away")

    async def flush(self, deadline_s: float) -> int:
        return 1


class Full(Broken):
    def record(self, **fields: Any) -> bool:
        return False


def test_a_sink_s_failure_never_reaches_the_call() -> None:
    """What a sink raises or refuses, and content that is no event, is counted and named; the call goes on."""
    for sink, name in ((Broken(), "failed"), (Full(), "refused"), (MemorySink(), "invalid")):
        meter = Meter(sink, principal=ANN)
        with meter.observe("search") as call:
            if name == "invalid":
                call.add(rows=-1)
        assert meter.counters[name] == 1
        assert "recorded" not in meter.counters
    assert (meter.failure or "").startswith("FieldError: quantities.rows is -1: give a whole number")


def test_a_sink_that_fails_for_a_fold_is_counted() -> None:
    """Folded refusals that a sink does not take are counted too, and reach no timer and no exit as an exception."""
    meter = Meter(Broken(), principal=ANN)
    with suppress(Denied), meter.observe("search"):
        raise Denied(403, {"title": "no"})
    meter.close_refusals()
    assert meter.counters["failed"] == 1


def test_a_clock_that_fails_never_reaches_the_call() -> None:
    """Even a fault in the meter's own reading of the clock leaves the call alone."""
    times = iter((1,))
    meter, _ = metering(clock_ns=lambda: next(times))
    with meter.observe("search"):
        pass
    assert meter.counters["failed"] == 1


def test_refusals_of_one_second_are_one_event() -> None:
    """A thousand refused calls of a principal in one second are one event that counts a thousand."""
    now = [1_700_000_000_400_000]
    meter, sink = metering(clock_us=lambda: now[0])
    other = Principal("client", "c-1", "acme")
    for number in range(1_000):
        with suppress(Denied), meter.observe("search", principal=other if number == 500 else None):
            raise Denied(429, {"title": "slow down", "reason": "limit"})
    now[0] += 1_000_000
    with suppress(Denied), meter.observe("search"):
        raise Denied(429, {"title": "slow down"})
    assert [(e["principal"], e["quantities"], e["status"], e["attributes"]) for e in sink.events()] == [
        ("u-ann", {"calls": 999}, "rate_limited", {"refused": "limit"}),
        ("c-1", {"calls": 1}, "rate_limited", {"refused": "limit"}),
    ]
    assert (meter.counters["joined"], meter.counters["open_refusals"]) == (998, 1)
    meter.close_refusals()
    assert len(sink.events()) == 3


def test_a_refused_call_that_used_something_is_not_folded() -> None:
    """Usage of a call that was refused half-way stands for itself, at once."""
    meter, sink = metering()
    for _ in range(2):
        with suppress(Denied), meter.observe("search") as call:
            call.add(tokens_out=4)
            raise Denied(402, {"title": "pay"})
    assert [event["quantities"]["tokens_out"] for event in sink.events()] == [4, 4]


def test_open_folds_are_bounded_and_nothing_is_lost() -> None:
    """Beyond open_refusals_max the oldest fold is recorded early, and counted."""
    meter, sink = metering(open_refusals_max=3, clock_us=lambda: 1_700_000_000_000_000)
    for number in range(8):
        with suppress(Denied), meter.observe(f"op-{number}"):
            raise Denied(403, {"title": "no"})
    assert (len(sink.events()), meter.counters["open_refusals"], meter.counters["closed_early"]) == (5, 3, 5)
    meter.close_refusals()
    assert {event["operation"] for event in sink.events()} == {f"op-{number}" for number in range(8)}


@pytest.mark.parametrize("in_loop", [True, False])
async def test_a_fold_is_recorded_though_no_call_follows(in_loop: bool) -> None:
    """When its second is over a fold is recorded, with and without a running loop."""
    meter, sink = metering()

    def refused() -> None:
        with suppress(Denied), meter.observe("search"):
            raise Denied(403, {"title": "no"})

    if in_loop:
        refused()
    else:
        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
    deadline = time.monotonic() + 20
    while not sink.events():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert sink.events()[0]["status"] == "denied"


LEAVING = """
import os, sys
from tollway.connectors.denied import Denied
from tollway.connectors.meter import Meter
from tollway.connectors.sinks import JsonlSink
meter = Meter(JsonlSink(sys.argv[1]), clock_us=lambda: 1_700_000_000_000_000)
try:
    with meter.observe("search"):
        raise Denied(403, {"title": "no"})
except Denied:
    pass
child = os.fork()
if child:
    os.waitpid(child, 0)
"""


def test_open_folds_are_recorded_at_the_end_of_a_process_once(tmp_path: Path) -> None:
    """A process that ends records what it has folded; a child of its fork does not record it again."""
    path = tmp_path / "usage.jsonl"
    subprocess.run([sys.executable, "-c", LEAVING, path], check=True, timeout=60)
    assert len(list(read_jsonl(path))) == 1


async def test_the_emitter_is_a_sink(tmp_path: Path) -> None:
    """A meter takes an emitter as it is; what it recorded is waiting in the spool."""
    emitter = Emitter("127.0.0.1:9", spool_dir=tmp_path)
    meter = Meter(emitter, principal=ANN)
    with meter.observe("search"):
        pass
    assert meter.counters["recorded"] == emitter.counters["waiting"] == 1
    assert await meter.flush(0.01) == 1
    await emitter.close(0.0)


def test_metered_functions_stay_what_they_are() -> None:
    """A function returns and raises what it did; its result is counted, and `current_call` is there inside only."""
    meter, sink = metering()

    @metered(meter, count=lambda text: {"letters": len(text)})
    def shout(text: str) -> str:
        """Loud."""
        call = current_call()
        assert call is not None
        call.add(words=2)
        return text.upper()

    assert shout("ab") == "AB"
    assert (shout.__name__, shout.__doc__, current_call()) == ("shout", "Loud.", None)
    with pytest.raises(AttributeError):
        shout(7)  # type: ignore[arg-type]
    first, second = sink.events()
    assert first["quantities"] == {"calls": 1, "letters": 2, "words": 2}
    assert first["operation"].endswith("shout")
    assert second["status"] == "error"


async def test_metered_coroutines_and_a_count_that_fails() -> None:
    """A coroutine is metered as a function is; a fault in `count` is the meter's own."""
    meter, sink = metering()

    @metered(meter, "answer", surface="llm", count=lambda result: {"letters": len(result)})
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    assert await answer() == 42
    assert sink.events()[0]["quantities"] == {"calls": 1}
    assert meter.counters["uncounted"] == 1


def test_metered_generators() -> None:
    """Items, what is sent and thrown in and what is returned pass unchanged; items are counted; between them no call is current."""
    meter, sink = metering()
    seen: list[object] = []

    @metered(meter, "stream", count=lambda item: {"items": 1})
    def stream() -> Generator[Any, Any, str]:
        assert current_call() is not None
        sent = yield 1
        try:
            yield sent
        except KeyError as error:
            yield error
        return "done"

    def consume() -> Iterator[Any]:
        seen.append((yield from stream()))

    items: Any = consume()
    assert next(items) == 1
    assert current_call() is None
    assert items.send("hello") == "hello"
    error = KeyError("x")
    assert items.throw(error) is error
    assert list(items) == []
    assert seen == ["done"]
    assert sink.events()[0]["quantities"] == {"calls": 1, "items": 3}


def test_a_generator_left_early_is_recorded() -> None:
    """What a consumer took before it stopped is counted, and what the generator uses while it closes."""
    meter, sink = metering()

    @metered(meter, "stream", count=lambda item: {"items": 1})
    def stream() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            call = current_call()
            assert call is not None
            call.add(closing=1)

    items = stream()
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    (event,) = sink.events()
    assert (event["status"], event["attributes"]) == ("ok", {"ended": "closed"})
    assert event["quantities"] == {"calls": 1, "items": 2, "closing": 1}


async def test_metered_async_generators() -> None:
    """As generators: counted, closed early, failing, and with what is sent in."""
    meter, sink = metering()

    @metered(meter, "stream", count=lambda item: {"items": 1})
    async def stream(fail: bool = False) -> AsyncIterator[Any]:
        call = current_call()
        assert call is not None
        sent = yield 1
        call.add(late=1)
        yield sent
        if fail:
            raise ValueError("no more")

    assert [item async for item in stream()] == [1, None]
    assert current_call() is None
    with pytest.raises(ValueError, match="no more"):
        [item async for item in stream(fail=True)]
    async with aclosing(stream()) as items:  # type: ignore[type-var]
        assert await anext(items) == 1
    assert [(e["status"], e["quantities"]) for e in sink.events()] == [
        ("ok", {"calls": 1, "items": 2, "late": 1}),
        ("error", {"calls": 1, "items": 2, "late": 1}),
        ("ok", {"calls": 1, "items": 1}),
    ]


async def test_an_abandoned_async_generator_is_recorded() -> None:
    """An async generator that its consumer forgets is closed by the loop, in another context, and recorded."""
    meter, sink = metering()

    @metered(meter, "stream")
    async def stream() -> AsyncIterator[int]:
        yield 1
        yield 2

    async def forget() -> None:
        items = stream()
        assert await anext(items) == 1

    await asyncio.create_task(forget())
    deadline = time.monotonic() + 10
    while not sink.events():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert sink.events()[0]["attributes"] == {"ended": "closed"}


async def test_counted_streams_count_while_they_run() -> None:
    """A stream that is broken off has counted what passed."""
    meter, sink = metering()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"de"
        yield b"f"

    with suppress(ValueError):
        async with meter.observe("stream") as call:
            taken = 0
            async for _ in call.counted_async(chunks(), lambda chunk: {"bytes_out": len(chunk)}):
                taken += 1
                if taken == 2:
                    raise ValueError
    with meter.observe("stream") as call:
        assert list(call.counted("xyz", lambda item: {"items": 1})) == ["x", "y", "z"]
    assert [e["quantities"] for e in sink.events()] == [{"calls": 1, "bytes_out": 5}, {"calls": 1, "items": 3}]


async def test_calls_of_concurrent_runs_do_not_mix() -> None:
    """Each task's calls are attributed to its own run and its own current call."""
    meter, sink = metering()

    async def one(number: int) -> None:
        with run(f"r-{number}", agent="planner", session="s-1"):
            async with meter.observe("step"):
                await asyncio.sleep(0)
                call = current_call()
                assert call is not None
                call.add(number=number)

    await asyncio.gather(*(one(number) for number in range(20)))
    assert {(e["run"], e["quantities"]["number"]) for e in sink.events()} == {(f"r-{n}", n) for n in range(20)}
    assert {(e["agent"], e["session"]) for e in sink.events()} == {("planner", "s-1")}


def test_an_unused_call_is_no_usage() -> None:
    """A call that its service calls unused is not recorded, but counted."""
    meter, sink = metering()
    with meter.observe("search") as call:
        call.unused = True
    assert sink.events() == []
    assert meter.counters["unused"] == 1


def test_operations_and_attributes_keep_their_bounds() -> None:
    """An operation is cut to 256 bytes at a letter; attributes of meter and call come together."""
    meter, sink = metering(attributes={"team": "blue"})
    with meter.observe("ü" * 200) as call:
        call.attributes["tier"] = "gold"
    (event,) = sink.events()
    assert event["operation"] == "ü" * 128
    assert event["attributes"] == {"team": "blue", "tier": "gold"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surface": "ftp"}, "surface has 'ftp': give one of rest, mcp, agent, llm"),
        ({"statuses": {KeyError: "late"}}, "statuses has 'late': give one of"),
        ({"open_refusals_max": 0}, "open_refusals_max is 0: give at least 1"),
    ],
)
def test_a_meter_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    """Arguments are refused by name, value and cure."""
    with pytest.raises(Refused, match=message):
        metering(**arguments)


def test_threads_share_a_meter() -> None:
    """Calls of several threads are each recorded once."""
    meter, sink = metering()

    def calls() -> None:
        for _ in range(200):
            with meter.observe(f"op-{os.getpid()}"):
                pass

    threads = [threading.Thread(target=calls) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sink.events()) == meter.counters["recorded"] == 1_000
