"""Sinks keep what they are given, refuse what no one could bill, and fail each for itself."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tollway.connectors.emitter import Emitter
from tollway.connectors.errors import Invalid, Refused
from tollway.connectors.sinks import CompositeSink, JsonlSink, KafkaSink, MemorySink, read_jsonl
from tollway.schemas.usage import FieldError

CALL: dict[str, Any] = {
    "surface": "rest", "operation": "GET /v1/search", "account": "acme", "principal_kind": "user", "principal": "u-1",
    "status": "ok", "latency_us": 1200,
}  # fmt: skip


class Failing:
    """A sink that raises, as a network client of someone else's would."""

    def record(self, **fields: Any) -> bool:
        raise ConnectionError("away")

    async def flush(self, deadline_s: float) -> int:
        raise ConnectionError("away")


def test_memory_completes_and_filters() -> None:
    """MemorySink fills in id, time and the one call, and finds events by their fields."""
    sink = MemorySink(clock_us=lambda: 1_700_000_000_000_000)
    sink.record(**CALL)
    sink.record(**CALL | {"principal": "u-2", "quantities": {"tokens": 7}})
    (event,) = sink.events(principal="u-2")
    assert event["quantities"] == {"calls": 1, "tokens": 7}
    assert event["occurred_at"] == 1_700_000_000_000_000
    assert len({event["event_id"] for event in sink.events()}) == 2


def test_memory_is_bounded() -> None:
    """Beyond its maximum MemorySink forgets the oldest event and counts it."""
    sink = MemorySink(events_max=3)
    for n in range(5):
        sink.record(**CALL | {"latency_us": n})
    assert [event["latency_us"] for event in sink.events()] == [2, 3, 4]
    assert sink.forgotten == 2


def test_memory_keeps_its_own_copy() -> None:
    """What the caller does with its dictionaries afterwards does not change a recorded event."""
    sink, quantities = MemorySink(), {"calls": 1}
    sink.record(**CALL | {"quantities": quantities})
    quantities["calls"] = 99
    assert sink.events()[0]["quantities"] == {"calls": 1}


@pytest.mark.parametrize(
    "make", [lambda path: MemorySink(), lambda path: JsonlSink(path), lambda path: CompositeSink({})]
)
def test_invalid_content_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    """Every sink raises FieldError naming field, value and bound, as the emitter does."""
    sink = make(tmp_path / "usage.jsonl")
    with pytest.raises(FieldError, match="latency_us is -1: give a whole number from 0"):
        sink.record(**CALL | {"latency_us": -1})
    with pytest.raises(FieldError, match="sequence is 1: the emitter sets it"):
        sink.record(**CALL | {"sequence": 1})


async def test_jsonl_reads_back(tmp_path: Path) -> None:
    """What JsonlSink wrote, from several threads and by two openings, read_jsonl gives back whole."""
    path = tmp_path / "usage.jsonl"

    def hundred(sink: JsonlSink, first: int) -> None:
        for n in range(first, first + 100):
            sink.record(**CALL | {"latency_us": n})

    for _ in range(2):
        sink = JsonlSink(path)
        threads = [threading.Thread(target=hundred, args=(sink, first)) for first in (0, 100, 200, 300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert await sink.flush(5) == 0
        sink.close()
    assert sorted(event["latency_us"] for event in read_jsonl(path)) == sorted([*range(400)] * 2)


def test_jsonl_survives_a_line_cut_short(tmp_path: Path) -> None:
    """A line that a crash cut short is left out, and the next event does not run into it."""
    path = tmp_path / "usage.jsonl"
    sink = JsonlSink(path)
    sink.record(**CALL)
    sink.close()
    with path.open("ab") as file:
        file.write(path.read_bytes()[:40])
    assert len(list(read_jsonl(path))) == 1
    sink = JsonlSink(path)
    sink.record(**CALL | {"latency_us": 7})
    sink.close()
    assert [event["latency_us"] for event in read_jsonl(path)] == [1200, 7]


def test_jsonl_names_the_line_that_is_no_event(tmp_path: Path) -> None:
    """A whole line that is no event is an error with its number, never skipped."""
    path = tmp_path / "usage.jsonl"
    sink = JsonlSink(path)
    sink.record(**CALL)
    sink.close()
    for bad in (b"{}\n", b"[1]\n", b"rubbish\n"):
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + bad)
        with pytest.raises(Invalid, match=r"usage\.jsonl, line 2"):
            list(read_jsonl(path))


def test_jsonl_is_bounded(tmp_path: Path) -> None:
    """Beyond bytes_max events are refused and counted, and the file stays readable."""
    sink = JsonlSink(tmp_path / "usage.jsonl", bytes_max=1_000)
    taken = [sink.record(**CALL) for _ in range(10)]
    assert 0 < sum(taken) < 10
    assert sink.refused == {"full": 10 - sum(taken)}
    assert len(list(read_jsonl(sink.path))) == sum(taken)


DISK_FULL = """
import resource, sys, json
from tollway.connectors.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
call = json.loads(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
taken = [sink.record(**call) for _ in range(10)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
taken.append(sink.record(**call))
print(json.dumps([taken, sink.refused]))
"""


def test_jsonl_on_a_full_disk(tmp_path: Path) -> None:
    """A write that the disk cuts short is refused and counted; when there is room again, the next event is whole."""
    path = tmp_path / "usage.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(path), json.dumps(CALL)], capture_output=True, text=True, check=True
    )
    taken, refused = json.loads(run.stdout)
    assert taken[-1]
    assert refused == {"disk": taken.count(False)}
    assert refused["disk"] > 1
    assert len(list(read_jsonl(path))) == sum(taken)


def test_jsonl_refuses_a_place_it_cannot_write(tmp_path: Path) -> None:
    """A path that cannot be written is one clear sentence at construction."""
    with pytest.raises(Refused, match=r"path is '.*nowhere/usage.jsonl': No such file or directory; give a file"):
        JsonlSink(tmp_path / "nowhere" / "usage.jsonl")


async def test_composite_isolates_its_sinks(tmp_path: Path) -> None:
    """A sink that raises and one that refuses lose only their own events, counted by name; the others have all, as one event."""
    memory, full = MemorySink(), JsonlSink(tmp_path / "usage.jsonl", bytes_max=10)
    sink = CompositeSink({"failing": Failing(), "memory": memory, "full": full})
    assert not sink.record(**CALL)
    assert not sink.record(**CALL)
    assert len(memory.events()) == 2
    assert sink.lost == {"failing": 2, "full": 2}
    assert sink.failures == {"failing": "ConnectionError: away"}
    assert await sink.flush(5) == 1


def test_composite_gives_every_sink_the_same_event(tmp_path: Path) -> None:
    """Id and time are made once: the copies in several sinks are one event."""
    first, second = MemorySink(), JsonlSink(tmp_path / "usage.jsonl")
    assert CompositeSink({"first": first, "second": second}).record(**CALL)
    assert first.events() == list(read_jsonl(second.path))


async def test_kafka_sink_is_the_emitter(tmp_path: Path) -> None:
    """KafkaSink emits, says what the emitter refused, and flush counts what the broker does not have."""
    emitter = Emitter("127.0.0.1:1", spool_dir=tmp_path, spool_events_max=8)
    sink = KafkaSink(emitter)
    assert [sink.record(**CALL) for _ in range(9)] == [True] * 8 + [False]
    assert await sink.flush(0.1) == 8
    await emitter.close(0)
