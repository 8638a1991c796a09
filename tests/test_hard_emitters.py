"""Emitters under what a service does to them, on real Kafka: prefork, fork under load, rival successors, a disk that fills.

What the fold accepts is what counts: the log's records go through its de-duplication.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.spool_crash import read
from tests.usage_log import CALL, NOWHERE, Log, call, emitter_to, eventually, gapless, identity
from tollway.connectors.adoption import ADOPTED_MAX, adopt_dead
from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.spool import Spool, unforked
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES
from tollway.streams.batch import ACCEPTED
from tollway.streams.dedupe import Seen

CHILDREN, THREADS, EVENTS = 4, 4, 150
RACES = 20


@pytest.fixture
def log(kafka: str) -> Log:
    return Log(kafka)


def accepted(log: Log) -> list[Emitted]:
    """What the fold counts, in the order of the log."""
    seen: dict[tuple[str, int], Seen] = {}
    events = [identity(event) for _, _, event in log.read()]
    return [one for one in events if seen.setdefault(one[:2], Seen()).see(one.sequence) == ACCEPTED]


def emit_in_threads(emitter: Emitter, threads: int = THREADS) -> list[Emitted | None]:
    """Several threads at once."""
    found: list[Emitted | None] = []

    def work(first: int) -> None:
        found.extend([emitter.emit(**call(n)) for n in range(first, first + EVENTS)])

    each = [threading.Thread(target=work, args=(1_000 * number,)) for number in range(threads)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return found


def in_child(work: Callable[[], Any]) -> Callable[[], Any]:
    """Fork; the child does the work and ends. Returns how to wait for what it found."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            with os.fdopen(write_end, "w") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(write_end)

    def result() -> Any:
        with os.fdopen(read_end) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    return result


def emitted_in_child(emitter: Emitter, start: bool) -> Any:
    if start:
        emitter.start()
    emitted = emit_in_threads(emitter)
    return [emitter.close_sync(60), emitted]


@pytest.mark.parametrize("durability", ["disk", "memory"])
def test_prefork(log: Log, tmp_path: Path, durability: str) -> None:
    """An emitter built before the fork serves four workers and their parent, four threads each: no (source, sequence) is
    shared, all that emit() returned is in the log once, none of it twice.
    """
    emitter = emitter_to(log, tmp_path, durability=durability)
    workers = [in_child(partial(emitted_in_child, emitter, True)) for _ in range(CHILDREN)]
    emitter.start()
    own = emit_in_threads(emitter)
    found = [worker() for worker in workers]
    assert emitter.close_sync(60) == {}
    assert [left for left, _ in found] == [{}] * CHILDREN
    processes = [own]
    for _, emitted in found:
        processes.append([Emitted(*one) for one in emitted])
    sources = [{one.source for one in of if one is not None} for of in processes]
    assert [len(of) for of in sources] == [1] * (CHILDREN + 1)
    assert len(set.union(*sources)) == CHILDREN + 1
    assert sorted(log.identities()) == sorted(one for of in processes for one in of if one is not None)
    assert len(log.identities()) == (CHILDREN + 1) * THREADS * EVENTS
    assert list(tmp_path.iterdir()) == []


def test_fork_under_load(log: Log, tmp_path: Path) -> None:
    """Forked again and again while its threads emit and its sender sends: children and parent share nothing, lose nothing."""
    emitter = emitter_to(log, tmp_path)
    emitter.start()
    parents: list[Emitted | None] = []
    emitting = threading.Thread(target=lambda: parents.extend(emit_in_threads(emitter)))
    emitting.start()
    children = [in_child(partial(emitted_in_child, emitter, False)) for _ in range(CHILDREN)]
    emitting.join()
    found = [child() for child in children]
    assert emitter.close_sync(60) == {}
    assert [left for left, _ in found] == [{}] * CHILDREN
    emitted: list[Emitted | None] = [*parents, *(Emitted(*one) for _, of in found for one in of)]
    assert None not in emitted
    assert sorted(log.identities()) == sorted(filter(None, emitted))
    assert len(set(emitted)) == len(emitted) == (CHILDREN + 1) * THREADS * EVENTS
    assert list(tmp_path.iterdir()) == []


def test_no_fork_while_a_lock_is_taken(tmp_path: Path) -> None:
    """A fork waits until a spool that is being made or adopted is listed: no child holds its lock without knowing."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path)
    with unforked:
        forked: list[Any] = []
        forking = threading.Thread(target=lambda: forked.append(in_child(lambda: len(emitter._spools))()))
        forking.start()
        forking.join(0.3)
        assert forked == []
    forking.join()
    assert forked == [0]
    emitter.close_sync(0)


SUCCEED = """
import json, sys
from tollway.connectors.emitter import Emitter
bootstrap, topic, spool = sys.argv[1:]
while race := sys.stdin.readline().strip():
    emitter = Emitter(bootstrap, topic=topic, spool_dir=f"{spool}/{race}")
    print("there", flush=True)
    sys.stdin.readline()
    emitter.start()
    print("started", flush=True)
    sys.stdin.readline()
    emitter.close_sync(30)
    print(json.dumps(emitter.counters), flush=True)
"""


def left_by_a_dead_process(folder: Path, count: int) -> list[Emitted]:
    """A spool as kill -9 leaves it: its child does not close it."""

    def work() -> list[Emitted | None]:
        emitter = Emitter(NOWHERE, spool_dir=folder, spool_events_max=160)  # several segments
        return [emitter.emit(**call(n)) for n in range(count)]

    return [Emitted(*one) for one in in_child(work)()]


def has_entries(folder: Path, count: int) -> bool:
    return len(list(folder.iterdir())) == count


def test_rival_successors(log: Log, tmp_path: Path) -> None:
    """Twenty times two processes start on one dead process's spool: one of them sends it; each record is in the log under its
    sequence, accepted once, and the folder is left empty.
    """
    command = [sys.executable, "-c", SUCCEED, log.bootstrap, log.name, str(tmp_path)]
    rivals = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]

    def both(line: str) -> list[str]:
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write(line + "\n")
        return [rival.stdout.readline() for rival in rivals if rival.stdout is not None]

    emitted: list[Emitted] = []
    try:
        for race in range(RACES):
            folder = tmp_path / str(race)
            emitted += left_by_a_dead_process(folder, 100)
            both(str(race))
            both("go")
            asyncio.run(eventually(partial(has_entries, folder, 2)))  # the rivals' own
            counters = [json.loads(line) for line in both("close")]
            assert sorted(each["resumed"] for each in counters) == [0, 100]
            assert [each["corrupt"] for each in counters] == [0, 0]
            assert list(folder.iterdir()) == []
    finally:
        for rival in rivals:
            rival.kill()
            rival.communicate()
    assert sorted(log.identities()) == sorted(accepted(log)) == sorted(emitted)
    assert len(emitted) == RACES * 100


CUT_WHILE_SENDING = """
import sys
from itertools import count
from pathlib import Path
from tests.spool_crash import Cut, Journal
from tests.usage_log import call
from tollway.connectors.emitter import Emitter
bootstrap, topic, spool, journal, at = sys.argv[1:]
journal = Journal(Path(journal))
Cut("halfway", int(at), journal)
emitter = Emitter(bootstrap, topic=topic, spool_dir=spool, spool_events_max=400, fsync_interval_s=0.05)
emitter.start()
for n in count():
    emitted = emitter.emit(**call(n))
    if emitted is None:
        emitter.flush_sync(1)
    else:
        journal.line("returned", 0, *emitted)
"""


async def test_killed_inside_a_change_while_sending(log: Log, tmp_path: Path) -> None:
    """A process that emits, syncs and sends is killed inside its k-th change to the disk, for several k: a successor brings
    all that emit() had returned, and the fold accepts each once.
    """
    spool, random = tmp_path / "spool", Random(11)
    killed = [random.randrange(4, 60), *(random.randrange(60, 2_500) for _ in range(4))]
    returned: set[Emitted] = set()
    processes = []
    for at in killed:
        arguments = (log.bootstrap, log.name, str(spool), str(tmp_path / f"journal-{at}"), str(at))
        processes.append(await asyncio.create_subprocess_exec(sys.executable, "-c", CUT_WHILE_SENDING, *arguments))
    assert [await process.wait() for process in processes] == [-9] * len(killed)
    for at in killed:
        returned |= read(tmp_path / f"journal-{at}").returned
    async with emitter_to(log, spool) as successor:
        await eventually(lambda: len(list(spool.iterdir())) == 1)
        assert (successor.counters["corrupt"], successor.counters["lost"]) == (0, 0)
    found = accepted(log)
    assert len(found) == len(set(found))
    assert returned <= set(found)
    assert len(set(found) - returned) <= len(killed)  # one a kill: appended, and killed before it was written down


@pytest.mark.parametrize("small_disk", [512], indirect=True)
@pytest.mark.parametrize("when_full", ["refuse", "drop_oldest"])
async def test_a_disk_that_others_fill(log: Log, small_disk: Path, when_full: str) -> None:
    """Others fill the disk while events are emitted and sent: refusals are counted, the rest is in the log once; with room
    again it goes on without a gap, and nothing is left behind.
    """
    emitter = emitter_to(log, small_disk / "spool", when_full=when_full, spool_bytes_max=300_000)
    emitted = [emitter.emit(**call(n)) for n in range(50)]
    with suppress(OSError), (small_disk / "rubbish").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    emitted += [emitter.emit(**call(n)) for n in range(300)]
    assert emitter.counters["refused"] == {"disk": emitted.count(None)}
    assert None in emitted
    await emitter.start()
    assert await emitter.flush(30) == {}
    (small_disk / "rubbish").unlink()
    emitted += [emitter.emit(**call(n)) for n in range(300)]
    assert None not in emitted[-300:]
    assert await emitter.close(30) == {}
    counters = emitter.counters
    assert counters["emitted"] == counters["acknowledged"] + counters["dropped"]
    assert counters["dropped"] == 0
    found = log.identities()
    assert sorted(found) == sorted(filter(None, emitted))
    assert all(gapless(sorted(one.sequence for one in found if one.lane == number)) for number in range(LANES))
    assert list((small_disk / "spool").iterdir()) == []


async def test_many_dead_spools_take_few_files(log: Log, tmp_path: Path) -> None:
    """A service that died 160 times while the broker was away: all its spools are sent, few of them open at a time, and none
    waits for the next look at the folder.
    """
    emitted, tally = [], Tally()
    for n in range(160):
        emitter = Emitter(NOWHERE, spool_dir=tmp_path)
        emitted.append(emitter.emit(**call(n)))
        emitter._spools[0].abandon()
    found: list[Spool] = []
    assert adopt_dead(tmp_path, tally, set(), set(), found.append).more
    assert len(found) == ADOPTED_MAX
    for spool in found:
        spool.abandon()
    async with emitter_to(log, tmp_path) as successor:
        await eventually(lambda: successor.counters["resumed"] == 160, deadline_s=25)  # the next look is after 30
    assert sorted(log.identities()) == sorted(filter(None, emitted))
    assert list(tmp_path.iterdir()) == []


async def test_memory_with_the_broker_away(tmp_path: Path) -> None:
    """In memory, too: beyond the limit the oldest go and are counted, flush names what waits, close() says what is lost."""
    emitter = Emitter(NOWHERE, durability="memory", spool_events_max=80, when_full="drop_oldest")
    await emitter.start()
    emitted = [emitter.emit(**CALL) for _ in range(200)]
    assert None not in emitted
    counters = emitter.counters
    assert (counters["emitted"], counters["waiting"]) == (200, 200 - counters["dropped"])
    assert 70 <= counters["waiting"] <= 80
    assert await emitter.flush(0) == {emitted[0].lane: counters["waiting"]} if emitted[0] else None
    assert sum((await emitter.close(0)).values()) == counters["waiting"]
