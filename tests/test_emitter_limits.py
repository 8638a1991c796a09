"""What an emitter refuses, gives up or does not send: always counted, never an exception in the caller's request."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.usage_log import CALL, NOWHERE, Log, call, emitter_to, eventually, gapless
from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.emitter_options import default_spool_dir
from tollway.connectors.errors import Refused
from tollway.connectors.spool import Spool
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES
from tollway.schemas.usage import FieldError

DAY_US = 86_400_000_000


@pytest.fixture
def log(kafka: str) -> Log:
    return Log(kafka)


async def test_sequences_have_no_gaps(tmp_path: Path) -> None:
    """Per lane the sequence is 1, 2, 3 …: neither refused content nor a refused append uses one up."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path, spool_events_max=60)
    sequences = defaultdict(list)
    for n in range(100):
        with pytest.raises(FieldError, match="latency_us is -5"):
            emitter.emit(**call(n) | {"latency_us": -5})
        emitted = emitter.emit(**call(n))
        if emitted is not None:
            sequences[emitted.lane].append(emitted.sequence)
    assert sum(map(len, sequences.values())) == 60
    assert all(map(gapless, sequences.values()))
    assert emitter.counters["refused"] == {"full": 40}
    await emitter.close(0)


class Interrupted(Exception):
    """What a service's own time limit raises, in the middle of anything."""


def test_a_time_limit_that_strikes_inside_emit(tmp_path: Path) -> None:
    """Exceptions out of a signal handler, at any point of emit(): all that returned is spooled, no identity twice, nothing broken."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path, spool_events_max=4000)  # segments of 500: rolling is struck, too
    returned, struck = [], 0

    def strike(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for n in range(3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + n % 40))
                returned.append(emitter.emit(**call(n)))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck > 100
    assert len(returned) > 100
    assert None not in returned
    spool = emitter._spools[0]
    found = []
    while frames := spool.take()[0]:
        found += [Emitted(spool.source, in_lane, sequence) for _, sequence, in_lane, _, _ in frames]
    assert len(found) == len(set(found))
    assert set(returned) <= set(found)
    assert emitter.counters["corrupt"] == 0
    assert emitter.counters["refused"] == {}
    spool.settle(spool.position)
    assert emitter.flush_sync(0) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "0" * 32}, "source is '0+': the emitter sets it"),
        ({"sequence": 1}, "sequence is 1: the emitter sets it"),
        ({"colour": "red"}, "colour is 'red': fields are event_id, "),
        ({"account": None}, "account is None: it is required"),
        ({"account": "ä"}, "account is 'ä': ids match"),
        ({"account": 7}, "account is 7: ids match"),
        ({"quantities": {"calls": 10**13}}, "quantities.calls is 10000000000000: give a whole number from 0 to"),
        ({"quantities": 5}, "quantities is 5: give a map"),
    ],
)
async def test_invalid_content_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    """What no one could bill is refused at once, naming field, value and bound, and nothing is spooled."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path)
    with pytest.raises(FieldError, match=message):
        emitter.emit(**CALL | fields)
    assert emitter.counters["spooled_bytes"] == 0
    await emitter.close(0)


async def test_full_refuses(tmp_path: Path) -> None:
    """At either limit, bytes or events, with `refuse` new events are refused and counted, old ones kept, no exception."""
    by_bytes = Emitter(NOWHERE, spool_dir=tmp_path / "a", spool_bytes_max=100_000)
    emitted = [by_bytes.emit(**call(n)) for n in range(1000)]
    kept = [one for one in emitted if one is not None]
    assert kept == emitted[: len(kept)]
    assert 0 < len(kept) < 1000
    assert by_bytes.counters["refused"] == {"full": 1000 - len(kept)}
    assert by_bytes.counters["spooled_bytes"] <= 100_000
    await by_bytes.close(0)


@pytest.mark.parametrize("limit", [{"spool_bytes_max": 100_000}, {"spool_events_max": 300}])
async def test_full_drops_the_oldest(log: Log, tmp_path: Path, limit: dict[str, int]) -> None:
    """With `drop_oldest` every new event is taken, the oldest are given up and counted, and the rest is sent."""
    emitter = emitter_to(log, tmp_path, when_full="drop_oldest", **limit)
    emitted = [emitter.emit(**call(n)) for n in range(1000)]
    assert None not in emitted
    counters = emitter.counters
    assert counters["dropped"] > 0
    assert counters["spooled_bytes"] <= 100_000
    assert counters["waiting"] == 1000 - counters["dropped"] <= 300 or "spool_bytes_max" in limit
    await emitter.start()
    assert await emitter.flush(30) == {}
    await emitter.close(10)
    assert sorted(log.identities()) == sorted(filter(None, emitted[counters["dropped"] :]))


async def test_another_life_in_the_folder_counts_against_its_limit(tmp_path: Path) -> None:
    """spool_bytes_max is the folder's: what a dead process left in it takes room."""
    first = Emitter(NOWHERE, spool_dir=tmp_path)
    for n in range(400):
        first.emit(**call(n))
    await first.close(0)
    second = Emitter(NOWHERE, spool_dir=tmp_path, spool_bytes_max=80_000)
    await second.start()
    await eventually(lambda: second.emit(**CALL) is None)
    assert second.counters["refused"] == {"full": 1}
    assert second.counters["spooled_bytes"] < 40_000
    await second.close(0)


FULL_DISK = """
import asyncio, json, resource, sys
from tollway.connectors.emitter import Emitter
call = json.loads(sys.argv[2])
emitter = Emitter("127.0.0.1:1", spool_dir=sys.argv[1])
def emit(count):
    return [emitter.emit(**call | {"account": f"acct-{n % 40}"}) for n in range(count)]
soft = lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
soft(10_000)
emitted = emit(200)
soft(resource.RLIM_INFINITY)
emitted += emit(50)
print(json.dumps([emitted, emitter.counters]))
sys.stdout.flush()
"""


def test_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    """Where the disk takes no more, even in the middle of a write, events are refused and counted; with room again it goes on, whole."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), json.dumps(CALL)], capture_output=True, text=True, check=True
    )
    emitted, counters = json.loads(run.stdout)
    kept = [Emitted(*one) for one in emitted if one is not None]
    assert counters["refused"] == {"disk": 250 - len(kept)}
    assert None not in emitted[200:]
    assert None in emitted[:200]
    assert all(gapless([one.sequence for one in kept if one.lane == number]) for number in range(LANES))
    spool = Spool.adopt(tmp_path / kept[0].source, tally := Tally())
    assert spool is not None
    frames, _ = spool.take()
    assert [(in_lane, sequence) for _, sequence, in_lane, _, _ in frames] == [one[1:] for one in kept]
    assert (tally.torn, tally.corrupt) == (0, 0)
    spool.abandon()


@pytest.mark.parametrize("small_disk", [256], indirect=True)
async def test_a_disk_that_we_filled_ourselves_is_freed(log: Log, small_disk: Path) -> None:
    """On a disk filled by the spool events are refused; once they are acknowledged there is room, and it goes on without a gap."""
    emitter = emitter_to(log, small_disk)
    emitted = [emitter.emit(**call(n)) for n in range(3000)]
    assert emitter.counters["refused"] == {"disk": emitted.count(None)}
    assert None in emitted
    await emitter.start()
    assert await emitter.flush(30) == {}

    def emit_one() -> bool:
        emitted.append(emitter.emit(**CALL))
        return emitted[-1] is not None

    await eventually(emit_one)
    emitted += [emitter.emit(**call(n)) for n in range(500)]
    assert None not in emitted[-500:]
    assert await emitter.close(30) == {}
    found = log.identities()
    assert sorted(found) == sorted(filter(None, emitted))
    assert all(gapless([one.sequence for one in found if one.lane == number]) for number in range(LANES))
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """File permissions bind: root gives up its rights for the while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_read_only_folder(tmp_path: Path, unprivileged: None) -> None:
    """A folder that cannot be written is refused at construction, in one sentence with the cure."""
    if os.getuid() == 0:
        os.seteuid(0)
    folder = tmp_path / "spool"
    folder.mkdir()
    for path in (*list(tmp_path.parents)[:2], tmp_path, folder):
        path.chmod(0o555 if path == folder else 0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(Refused, match=r"spool_dir is '.*spool': Permission denied; give a folder that can be written"):
        Emitter(NOWHERE, spool_dir=folder)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A spool_dir below a file is refused likewise."""
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"spool_dir is '.*file/spool': Not a directory; give a folder"):
        Emitter(NOWHERE, spool_dir=tmp_path / "file" / "spool")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"durability": "tape"}, "durability is 'tape': give one of disk, memory"),
        ({"when_full": "panic"}, "when_full is 'panic': give one of refuse, drop_oldest"),
        ({"spool_bytes_max": 10}, "spool_bytes_max is 10: give at least"),
        ({"spool_events_max": 0}, "spool_events_max is 0: give at least 8"),
        ({"fsync_interval_s": 0}, "fsync_interval_s is 0: give seconds above 0, or None"),
        ({"acks": 1}, "acks is no argument of Emitter"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Arguments out of range are refused in one sentence naming argument, value and cure."""
    with pytest.raises(Refused, match=message):
        Emitter(NOWHERE, spool_dir=tmp_path, **options)


async def test_too_old_is_not_sent(log: Log, tmp_path: Path) -> None:
    """What has waited in a spool for more than 3 days is counted, not sent; a late event that was just emitted is sent."""
    now_us = time.time_ns() // 1000
    old = Emitter(NOWHERE, spool_dir=tmp_path, clock_us=lambda: now_us - 3 * DAY_US - 1_000_000)
    for n in range(100):
        old.emit(**call(n))
    await old.close(0)
    young = Emitter(NOWHERE, spool_dir=tmp_path, clock_us=lambda: now_us - 2 * DAY_US)
    emitted = [young.emit(**call(n)) for n in range(100)]
    await young.close(0)
    async with emitter_to(log, tmp_path) as emitter:
        emitted.append(emitter.emit(**CALL | {"occurred_at": now_us - 20 * DAY_US}))
        await eventually(lambda: emitter.counters["too_old"] == 100 and emitter.counters["resumed"] == 100)
        assert await emitter.flush(30) == {}
    assert sorted(log.identities()) == sorted(filter(None, emitted))
    assert list(tmp_path.iterdir()) == []


async def test_memory(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability="memory" sends without a disk, has its limit, and writes nothing."""
    monkeypatch.setenv("TOLLWAY_SPOOL_DIR", str(tmp_path / "never"))
    emitter = Emitter(log.bootstrap, topic=log.name, durability="memory", spool_events_max=1000)
    emitted = [emitter.emit(**call(n)) for n in range(1200)]
    assert emitter.counters["refused"] == {"full": 200}
    await emitter.start()
    assert await emitter.flush(30) == {}
    assert emitter.counters["spooled_bytes"] == 0
    await emitter.close(1)
    assert sorted(log.identities()) == sorted(filter(None, emitted))
    assert list(tmp_path.iterdir()) == []


async def test_fsync_interval(log: Log, tmp_path: Path) -> None:
    """With fsync_interval_s what was appended reaches the disk without anyone asking."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path, fsync_interval_s=0.05)
    await emitter.start()
    emitter.emit(**CALL)
    segment: Any = emitter._spools[0]._segments[0]
    await eventually(lambda: segment._synced == segment.size > 0)
    await emitter.close(0)


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOLLWAY_SPOOL_DIR, else XDG_STATE_HOME, else ~/.local/state."""
    assert default_spool_dir({"TOLLWAY_SPOOL_DIR": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert default_spool_dir({"XDG_STATE_HOME": "/b"}) == Path("/b/tollway/spool")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_spool_dir({}) == tmp_path / ".local/state/tollway/spool"
