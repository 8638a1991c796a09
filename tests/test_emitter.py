"""The emitter on a real broker: what emit() returned is in the log, once per (source, lane, sequence), in order."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.usage_log import CALL, NOWHERE, PARTITIONS, Log, call, emitter_to, eventually, identity, in_order
from tollway.connectors.acknowledged import Acknowledged
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.errors import Refused
from tollway.connectors.spool import Spool
from tollway.connectors.tally import Tally
from tollway.schemas.lane import LANES, lane

DAY_US = 86_400_000_000


@pytest.fixture
def log(kafka: str) -> Log:
    return Log(kafka)


async def test_what_is_emitted_is_in_the_log(log: Log, tmp_path: Path) -> None:
    """Every event arrives once, as it was given, on its lane's partition, in order, at the offset that `acknowledged` says."""
    async with emitter_to(log, tmp_path) as emitter:
        emitted = [emitter.emit(**call(n)) for n in range(3000)]
        assert await emitter.flush(30) == {}
        offsets = {one: emitter.acknowledged(*one) for one in emitted if one is not None}
        assert emitter.counters["acknowledged"] == emitter.counters["emitted"] == 3000
    assert asyncio.all_tasks() == {asyncio.current_task()}
    records = log.read()
    assert [identity(event) for _, _, event in records] == sorted(
        offsets, key=lambda one: (one.lane % PARTITIONS, offsets[one])
    )
    assert in_order(log.identities())
    for partition, offset, event in records:
        assert partition == lane(event["account"]) % PARTITIONS
        assert offsets[identity(event)] == offset
        assert {name: event[name] for name in CALL if name != "quantities"} == call(event["latency_us"]) | {
            "quantities": ...
        } or (event["quantities"] == {"calls": 1, "tokens_out": 311})
    assert list(tmp_path.iterdir()) == []


def test_threads(log: Log, tmp_path: Path) -> None:
    """Eight threads emit at once, the sender in a thread of its own: all arrive, no sequence twice, none left out."""
    returned: list[Emitted | None] = []

    def work(first: int) -> None:
        returned.extend([emitter.emit(**call(n)) for n in range(first, first + 400)])

    with emitter_to(log, tmp_path) as emitter:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 3200, 400)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert emitter.flush_sync(30) == {}
    assert len(set(returned)) == 3200
    assert sorted(log.identities()) == sorted(filter(None, returned))


def test_fork(log: Log, tmp_path: Path) -> None:
    """A forked child gets its own source and spool, sends by itself, and neither loses nor repeats what the parent has."""
    with emitter_to(log, tmp_path) as emitter:
        before = [emitter.emit(**call(n)) for n in range(100)]
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                mine = [emitter.emit(**call(n)) for n in range(100)]
                left = emitter.close_sync(30)
                os.write(write_end, json.dumps([left, emitter.counters["emitted"], mine[0]]).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        after = [emitter.emit(**call(n)) for n in range(100)]
        assert os.waitpid(pid, 0)[1] == 0
        with os.fdopen(read_end) as pipe:
            left, emitted, child_first = json.load(pipe)
        assert (left, emitted) == ({}, 100)
        assert emitter.flush_sync(30) == {}
        own = {one for one in before + after if one is not None}
        assert child_first[0] not in {one.source for one in own}
    found = log.identities()
    assert len(found) == len(set(found)) == 300
    assert {one for one in found if one.source != child_first[0]} == own
    assert list(tmp_path.iterdir()) == []


FORK_AND_STAY = """
import json, os, sys
from tollway.connectors.emitter import Emitter
emitter = Emitter("127.0.0.1:1", spool_dir=sys.argv[1])
emitted = emitter.emit(**json.loads(sys.argv[2]))
if os.fork() == 0:
    print(json.dumps(emitted), flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


def test_a_living_child_does_not_hold_its_dead_parents_spool(tmp_path: Path) -> None:
    """The parent is killed with -9, its forked child lives on: a successor can take the parent's spool at once."""
    command = [sys.executable, "-c", FORK_AND_STAY, str(tmp_path), json.dumps(CALL)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        source = json.loads(parent.stdout.readline())[0]
        assert Spool.adopt(tmp_path / source, Tally()) is None
        parent.kill()
        parent.wait()
        spool = Spool.adopt(tmp_path / source, Tally())
        assert spool is not None
        assert len(spool.take()[0]) == 1
        spool.abandon()


EMIT_FOR_EVER = """
import asyncio, json, os, sys
from tollway.connectors.emitter import Emitter
bootstrap, topic, spool, journal, call = sys.argv[1:]
call = json.loads(call)
async def main():
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    emitter = Emitter(bootstrap, topic=topic, spool_dir=spool)
    await emitter.start()
    n = 0
    while True:
        for _ in range(50):
            n += 1
            one = emitter.emit(**call | {"account": f"acct-{n % 40}"})
            os.write(fd, json.dumps(one).encode() + b"\\n")
        await asyncio.sleep(0.001)
asyncio.run(main())
"""


def has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


async def test_kill_9_loses_nothing_that_was_returned(log: Log, tmp_path: Path) -> None:
    """Emitting processes are killed with -9 at different moments; a successor delivers every event whose emit() had returned."""
    spool = tmp_path / "spool"
    returned: set[Emitted] = set()
    for number, lines in enumerate((1, 700, 9000)):
        journal = tmp_path / f"journal-{number}"
        arguments = (log.bootstrap, log.name, str(spool), str(journal), json.dumps(CALL))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", EMIT_FOR_EVER, *arguments)
        try:
            await eventually(partial(has_lines, journal, lines))
        finally:
            process.kill()
            await process.wait()
        written = journal.read_bytes()
        returned |= {Emitted(*json.loads(line)) for line in written[: written.rfind(b"\n")].split(b"\n")}
    async with emitter_to(log, spool) as successor:
        own = next(path for path in spool.iterdir() if path.name == successor._source)
        await eventually(lambda: list(spool.iterdir()) == [own])
        assert successor.counters["resumed"] > 0
    found = log.identities()
    assert returned <= set(found)
    assert len(set(found) - returned) <= 3  # at most one a kill: emitted, and killed before it was written down
    assert in_order(found)


async def test_clean_close_leaves_the_rest_to_the_next(log: Log, tmp_path: Path) -> None:
    """close() says what is not acknowledged and leaves it on disk; the next emitter on the folder sends it, once."""
    emitter = Emitter(NOWHERE, topic=log.name, spool_dir=tmp_path)
    await emitter.start()
    emitted = [emitter.emit(**call(n)) for n in range(500)]
    left = await emitter.close(0.1)
    assert sum(left.values()) == 500
    assert emitter.emit(**CALL) is None
    assert emitter.counters["refused"] == {"closed": 1}
    async with emitter_to(log, tmp_path) as successor:
        await eventually(lambda: successor.counters["resumed"] == 500)
        assert all(successor.acknowledged(*one) is not None for one in emitted if one is not None)
    assert sorted(log.identities()) == sorted(filter(None, emitted))


def test_the_loop_may_end_and_another_begin(log: Log, tmp_path: Path) -> None:
    """A sender whose loop ended leaves emit() working; start() in another loop sends all that waits, in order."""
    emitter = emitter_to(log, tmp_path)
    emitted = []

    async def emit_some(flush: bool) -> None:
        await emitter.start()
        emitted.extend([emitter.emit(**call(n)) for n in range(300)])
        if flush:
            assert await emitter.flush(30) == {}

    asyncio.run(emit_some(flush=True))
    asyncio.run(emit_some(flush=False))
    emitted.extend([emitter.emit(**call(n)) for n in range(300)])
    asyncio.run(emit_some(flush=True))
    emitter.close_sync(30)
    found = log.identities()
    assert set(found) == set(emitted)
    assert in_order(found)


async def test_waiting_in_its_own_loop_is_refused(log: Log, tmp_path: Path) -> None:
    """flush_sync() in the loop that sends would wait for itself: it is refused, naming the cure."""
    async with emitter_to(log, tmp_path) as emitter:
        emitter.emit(**CALL)
        with pytest.raises(Refused, match="await flush"):
            emitter.flush_sync(5)
        with pytest.raises(Refused, match="await flush"):
            emitter.close_sync(5)


async def test_broker_away_and_back(tmp_path: Path) -> None:
    """While the broker is killed emit() goes on and close() comes back; when it is there again all arrives, in order."""
    broker = KafkaBroker(tmp_path / "broker")
    try:
        broker.start()
        broker.wait_ready()
        log = Log(broker.bootstrap)
        staying, leaving = emitter_to(log, tmp_path / "spool"), emitter_to(log, tmp_path / "spool")
        await asyncio.to_thread(staying.start)  # in a thread of its own
        await leaving.start()
        emitted = [one.emit(**call(n)) for n in range(1000) for one in (staying, leaving)]
        assert await staying.flush(30) == await leaving.flush(30) == {}
        emitted += [one.emit(**call(n)) for n in range(1000) for one in (staying, leaving)]
        broker.kill()
        for n in range(1000):
            emitted += [one.emit(**call(n)) for one in (staying, leaving)]
            await asyncio.sleep(0)
        assert sum((await staying.flush(0.2)).values()) > 0
        async with asyncio.timeout(60):
            assert sum((await leaving.close(0.2)).values()) > 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        broker.start()
        await asyncio.to_thread(broker.wait_ready)
        assert await staying.flush(60) == {}
        assert staying.counters["refused"] == leaving.counters["refused"] == {}
        await staying.close(10)
        async with emitter_to(log, tmp_path / "spool"):
            await eventually(lambda: len(list((tmp_path / "spool").iterdir())) == 1)
        found = log.identities()
        assert set(found) == set(emitted)
        assert in_order(found)
    finally:
        broker.kill()


async def test_broker_away_at_the_start(tmp_path: Path) -> None:
    """start() does not wait for a broker; flush returns at its deadline, by lane; `problem` says what is wrong."""
    emitter = Emitter(NOWHERE, spool_dir=tmp_path)
    await emitter.start()
    emitted = emitter.emit(**CALL)
    assert emitted is not None
    assert await emitter.flush(0.2) == {emitted.lane: 1}
    await eventually(lambda: emitter.problem is not None)
    assert str(emitter.problem).startswith("no Kafka at 127.0.0.1:1: ")
    assert emitter.acknowledged(*emitted) is None
    await emitter.close(0)


async def test_a_producer_that_fails_is_replaced(log: Log, tmp_path: Path) -> None:
    """After an answer that aiokafka's producer cannot recover from, a new one sends the same events; none is lost, order holds."""
    async with emitter_to(log, tmp_path) as emitter:
        emitted = [emitter.emit(**call(n)) for n in range(200)]
        assert await emitter.flush(30) == {}
        await asyncio.to_thread(log.configure, "max.message.bytes", "200")
        emitted += [emitter.emit(**call(n)) for n in range(200)]
        await eventually(lambda: "takes no usage" in str(emitter.problem))
        emitted += [emitter.emit(**call(n)) for n in range(200)]
        await asyncio.to_thread(log.configure, "max.message.bytes", "131072")
        assert await emitter.flush(60) == {}
        assert emitter.problem is None
        assert emitter.counters["acknowledged"] == 600
        offsets = {one: emitter.acknowledged(*one) for one in emitted if one is not None}
    found = log.identities()
    assert set(found) == set(emitted)
    assert in_order(found)
    stand_at = {(identity(event), offset) for _, offset, event in log.read()}
    assert all((one, offset) in stand_at for one, offset in offsets.items())


async def test_nothing_is_sent_before_the_log_is_open(kafka: str, tmp_path: Path) -> None:
    """Events wait until every partition has its first record, and are then sent behind it."""
    log = Log(kafka, opened=False)
    log.open(range(PARTITIONS - 1))
    async with emitter_to(log, tmp_path) as emitter:
        emitted = [emitter.emit(**call(n)) for n in range(100)]
        await eventually(lambda: "is not open" in str(emitter.problem))
        assert log.identities() == []
        log.open(range(PARTITIONS - 1, PARTITIONS))
        assert await emitter.flush(30) == {}
    assert sorted(log.identities()) == sorted(filter(None, emitted))


async def test_a_missing_topic_is_a_problem_not_an_end(kafka: str, tmp_path: Path) -> None:
    """With the topic not there events wait; made later, they are sent."""
    log = Log(kafka)
    log.admin.delete_topics([log.name])[log.name].result(30)
    async with emitter_to(log, tmp_path) as emitter:
        emitted = emitter.emit(**CALL)
        await eventually(lambda: emitter.problem == f"topic {log.name} is not there: run `tollway topics create`")
        log.create()
        log.open(range(PARTITIONS))
        assert await emitter.flush(60) == {}
    assert log.identities() == [emitted]


async def test_source_is_minted_anew_every_day(log: Log, tmp_path: Path) -> None:
    """After 24 h an emitter has another source whose sequences begin at 1; both lives are sent, the old folder removed."""
    clock_us = time.time_ns() // 1000
    emitter = emitter_to(log, tmp_path, clock_us=lambda: clock_us)
    first = emitter.emit(**CALL)
    clock_us += DAY_US - 1
    second = emitter.emit(**CALL)
    clock_us += 1
    third = emitter.emit(**CALL)
    assert first is not None
    assert third is not None
    assert second == Emitted(first.source, first.lane, 2)
    assert third == Emitted(third.source, first.lane, 1)
    assert int(third.source[:12], 16) - int(first.source[:12], 16) == DAY_US // 1000
    await emitter.start()
    assert await emitter.flush(30) == {}
    await eventually(lambda: [path.name for path in tmp_path.iterdir()] == [third.source])
    await emitter.close(10)
    assert set(log.identities()) == {first, second, third}


def test_acknowledged_is_bounded() -> None:
    """Only the newest acknowledged sequences are remembered, whole batches at a time; of others the offset is None."""
    known = Acknowledged(remembered_max=500)
    for batch in range(20):
        known.remember(
            "s",
            batch % 4,
            4,
            1000 * batch,
            [sequence * LANES + batch % 4 for sequence in range(batch * 50, batch * 50 + 50)],
        )
    found = {sequence: known.offset("s", sequence // 50 % 4, sequence) for sequence in range(1000)}
    assert found == {n: None if n < 500 else n // 50 * 1000 + n % 50 for n in range(1000)}
    assert known.offset("another", 3, 999) is None
