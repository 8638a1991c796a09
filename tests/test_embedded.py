"""The local stack: children, supervisor, and the real parts through restarts and kill -9."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import clickhouse_connect
import confluent_kafka
import pytest
import redis
from confluent_kafka.admin import AdminClient, NewTopic
from redis.backoff import NoBackoff
from redis.retry import Retry

from tollway.connectors.embedded import die_with_parent
from tollway.connectors.embedded.process import (
    LOG_MAX_BYTES,
    LOOPBACK,
    Child,
    Process,
    command_line,
    free_port,
    is_free,
    poll,
    require_free,
    stop_orphan,
)
from tollway.connectors.embedded.stack import Endpoints, Stack
from tollway.connectors.embedded.supervisor import State, Supervisor, stop_order
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Fatal, Refused, Unavailable

DEADLINE_S = 60.0
PARTS = ("valkey", "kafka", "clickhouse")


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in poll(DEADLINE_S):
        if condition():
            return
    pytest.fail(f"not within {DEADLINE_S:.0f} s: {what}")


def gone(pid: int | None) -> bool:
    return pid is None or not command_line(pid)


# Children


def python(name: str, code: str, *arguments: str, ready: Callable[[], bool] = lambda: True, **options: object) -> Child:
    argv = (sys.executable, "-c", "import os, signal, sys, subprocess, time\n" + code, *arguments)
    return Child(name, argv, ready, **options)  # type: ignore[arg-type]


WAITS = "signal.pause()"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(sys.argv[1], 'w').close()\nwhile True: signal.pause()"


def test_a_child_that_ignores_the_stop_signal_is_killed_with_its_group(tmp_path: Path) -> None:
    """After its deadline a child is killed, and so is what it started."""
    family = "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    flag = tmp_path / "ready"
    tell = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    process = Process(python("deaf", family + tell + DEAF, str(flag), ready=flag.exists), tmp_path)
    process.start()
    process.wait_ready()
    grandchild = int((tmp_path / "pid").read_text())
    process.stop(deadline_s=0.2)
    assert process.returncode == -signal.SIGKILL
    until(lambda: gone(grandchild), "the child's own child is gone")


def test_an_orphan_is_killed_and_a_stranger_is_not(tmp_path: Path) -> None:
    """A pid file ends its process only if that pid still runs the command written there."""
    pid_file = tmp_path / "x.pid"
    argv = [sys.executable, "-c", "import signal; signal.pause()"]
    running = subprocess.Popen(argv, start_new_session=True)
    try:
        until(lambda: " ".join(argv) in command_line(running.pid), "the process runs its command")
        pid_file.write_text(json.dumps({"pid": running.pid, "argv": ["something", "else"]}))
        assert not stop_orphan(pid_file)
        assert running.poll() is None
        pid_file.write_text('{"pid": 1')
        assert not stop_orphan(pid_file)
        pid_file.write_text(json.dumps({"pid": running.pid, "argv": argv}))
        reaper = threading.Thread(target=running.wait)
        reaper.start()
        assert stop_orphan(pid_file)
        reaper.join()
        assert running.returncode == -signal.SIGKILL
        assert not pid_file.exists()
    finally:
        running.kill()


def test_a_log_is_bounded(tmp_path: Path) -> None:
    """A log over its limit starts again, and what the child writes next is in it."""
    flag = tmp_path / "flag"
    writes = f"while not os.path.exists({str(flag)!r}): time.sleep(0.01)\nprint('after', flush=True)\n"
    process = Process(python("talks", writes + WAITS), tmp_path)
    process.log.parent.mkdir()
    process.log.write_bytes(b"x" * (LOG_MAX_BYTES + 1))
    process.start()
    try:
        process.bound_log()
        flag.touch()
        until(lambda: process.log.read_bytes() == b"after\n", "the log holds only the new line")
        assert process.log.with_suffix(".log.1").stat().st_size == LOG_MAX_BYTES + 1
    finally:
        process.kill()


def test_ports() -> None:
    """A port that something listens on is passed over, and refused with its number where it was asked for."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert free_port(port) != port
        with pytest.raises(Refused, match=rf"port {port} for kafka is in use"):
            require_free(port, "kafka")
    assert free_port(port) == port


# Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path, failures_max=3)
    yield supervisor
    supervisor.hurry()
    supervisor.stop()


def test_a_killed_child_is_started_again(supervisor: Supervisor) -> None:
    """After kill -9, from us or from outside, a child runs again under a new pid."""
    supervisor.add([python("one", WAITS)])
    supervisor.wait_ready("one")
    first = supervisor.pid("one")
    supervisor.kill("one")
    supervisor.wait_ready("one")
    second = supervisor.pid("one")
    assert second is not None
    os.kill(second, signal.SIGKILL)
    until(lambda: supervisor.restarts("one") == 2, "it was started twice again")
    supervisor.wait_ready("one")
    assert len({first, second, supervisor.pid("one")}) == 3


def test_a_child_killed_for_good_stays_dead_until_revived(supervisor: Supervisor) -> None:
    """`restart=False` leaves it dead, and waiting for it says so at once."""
    supervisor.add([python("one", WAITS)])
    supervisor.wait_ready("one")
    supervisor.kill("one", restart=False)
    with pytest.raises(Unavailable, match="killed"):
        supervisor.wait_ready("one")
    assert supervisor.pid("one") is None
    supervisor.revive("one")
    supervisor.wait_ready("one")


def test_a_child_that_keeps_failing_is_given_up_loudly(tmp_path: Path) -> None:
    """After the most failures in a row the child is FAILED, said with its last words; the others go on."""
    lines: list[str] = []
    supervisor = Supervisor(tmp_path, lines.append, failures_max=3)
    try:
        supervisor.add([python("good", WAITS), python("bad", "sys.exit('no such thing')", ready=lambda: False)])
        with pytest.raises(Unavailable, match="no such thing"):
            supervisor.wait_ready("bad")
        assert supervisor.state("bad") is State.FAILED
        assert supervisor.restarts("bad") == 2
        assert list(supervisor.failed()) == ["bad"]
        assert any("FAILED 3 times" in line and "no such thing" in line for line in lines)
        supervisor.wait_ready("good")
    finally:
        supervisor.stop()


def test_a_health_check_that_raises_ends_nothing(supervisor: Supervisor) -> None:
    """A probe's exception counts as not ready: the supervisor and its other children go on."""

    def broken() -> bool:
        raise ValueError("bug")

    supervisor.add([python("bad", WAITS, ready=broken, ready_deadline_s=0.1), python("good", WAITS)])
    supervisor.wait_ready("good")
    until(lambda: supervisor.state("bad") is State.FAILED, "the broken one is given up")
    assert supervisor.alive


def test_order_of_start_and_stop(tmp_path: Path) -> None:
    """A child starts when what it comes after is ready, and ends before that is asked to stop."""
    log = tmp_path / "order"
    says = (
        f"def say(what): open({str(log)!r}, 'a').write(sys.argv[1] + ' ' + what + '\\n')\n"
        "def end(*_): say('ends'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); say('starts')\nwhile True: signal.pause()"
    )

    def child(name: str, *after: str) -> Child:
        return python(name, says, name, ready=lambda: log.exists() and f"{name} starts" in log.read_text(), after=after)

    supervisor = Supervisor(tmp_path)
    children = [child("store"), child("broker", "store"), child("worker", "store", "broker")]
    supervisor.add(children)
    supervisor.wait_ready("worker")
    supervisor.stop()
    expected = ["store starts", "broker starts", "worker starts", "worker ends", "broker ends", "store ends"]
    assert log.read_text().splitlines() == expected
    assert [*stop_order(children)] == [["worker"], ["broker"], ["store"]]


def test_what_cannot_be_kept_is_refused(supervisor: Supervisor) -> None:
    """A name used twice, or an unknown predecessor, is an error that names it."""
    supervisor.add([python("one", WAITS)])
    with pytest.raises(Fatal, match="one already"):
        supervisor.add([python("one", WAITS)])
    with pytest.raises(Fatal, match="missing"):
        supervisor.add([python("two", WAITS, after=("missing",))])


# Stack


def login(at: Endpoints) -> clickhouse_connect.driver.client.Client:
    return clickhouse_connect.get_client(
        host=at.clickhouse_host,
        port=at.clickhouse_port,
        username=at.clickhouse_user,
        password=at.clickhouse_password,
        database=at.clickhouse_database,
        autogenerate_session_id=False,
    )


def put(at: Endpoints, value: str) -> None:
    """The value into all three parts, acknowledged by each."""
    admin = AdminClient({"bootstrap.servers": at.kafka_bootstrap})
    with contextlib.suppress(confluent_kafka.KafkaException):  # it is there already
        admin.create_topics([NewTopic("kept", 1, 1)])["kept"].result(DEADLINE_S)
    producer = confluent_kafka.Producer({"bootstrap.servers": at.kafka_bootstrap, "acks": "all"})
    producer.produce("kept", value.encode())
    assert producer.flush(DEADLINE_S) == 0
    with redis.Redis.from_url(at.redis_url) as client:
        client.rpush("kept", value)
    with contextlib.closing(login(at)) as client:
        client.command("CREATE TABLE IF NOT EXISTS kept (v String) ENGINE = MergeTree ORDER BY v")
        client.insert("kept", [[value]], column_names=["v"])


def kept(at: Endpoints) -> tuple[list[str], list[str], list[str]]:
    """What Kafka, Valkey and ClickHouse hold."""
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": at.kafka_bootstrap, "group.id": "unused", "enable.partition.eof": True}
    )
    consumer.assign([confluent_kafka.TopicPartition("kept", 0, confluent_kafka.OFFSET_BEGINNING)])
    log: list[str] = []
    while (message := consumer.poll(DEADLINE_S)) is not None:
        if message.error() and message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF:
            break
        if not message.error():
            log.append(message.value().decode())
    consumer.close()
    with redis.Redis.from_url(at.redis_url, decode_responses=True) as client:
        listed = client.lrange("kept", 0, -1)
    with contextlib.closing(login(at)) as client:
        rows = client.query("SELECT v FROM kept ORDER BY v").result_rows
    return log, listed, [row[0] for row in rows]


def pids(stack: Stack, names: tuple[str, ...] = PARTS) -> list[int]:
    found = [stack.pid(name) for name in names]
    assert all(found)
    return [pid for pid in found if pid]


def test_second_start_uses_the_data_and_stop_leaves_no_process(tmp_path: Path) -> None:
    """What was written before a stop is there after the next start, under the same passwords, and ports if free."""
    with Stack(tmp_path, stripe=False) as stack:
        first = stack.endpoints
        assert Endpoints.load(tmp_path) == first
        assert (tmp_path / "stack.json").stat().st_mode & 0o777 == 0o600
        put(first, "a")
        running = pids(stack)
    assert all(gone(pid) for pid in running)
    with socket.create_server((LOOPBACK, first.clickhouse_port)), Stack(tmp_path, stripe=False) as stack:
        second = stack.endpoints
        assert second.clickhouse_port != first.clickhouse_port
        assert (second.kafka_bootstrap, second.redis_url) == (first.kafka_bootstrap, first.redis_url)
        assert second.clickhouse_password == first.clickhouse_password
        assert kept(second) == (["a"], ["a"], ["a"])


RUNS = """
import signal, sys, threading, time
from pathlib import Path
from tollway.connectors.embedded.stack import SIGNALS, Stack
stack = Stack(Path(sys.argv[1]), stripe=False, progress=lambda line: print(line, flush=True))
stack.start()
before = signal.getsignal(SIGNALS[-1])
def say_when_it_listens():
    while signal.getsignal(SIGNALS[-1]) is before: time.sleep(0.01)
    print("up", flush=True)
threading.Thread(target=say_when_it_listens, daemon=True).start()
stack.run_until_signal()
"""


@pytest.fixture
def up(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A stack that runs in a process of its own."""
    # It ends with the test run, however that ends: its parts end with it.
    with_us = (
        [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())] if sys.platform == "linux" else []
    )
    argv = [*with_us, sys.executable, "-c", RUNS, str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "up\n":
            break
    assert process.poll() is None, lines
    yield tmp_path, process
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)


def running(data: Path) -> dict[str, int]:
    return {path.stem: json.loads(path.read_text())["pid"] for path in (data / "run").glob("*.pid")}


def test_start_after_kill_9_of_everything(up: tuple[Path, subprocess.Popen[str]]) -> None:
    """After kill -9 of supervisor and parts the next start finds all that was acknowledged, and no orphan is left."""
    data, process = up
    at = Endpoints.load(data)
    put(at, "a")
    put(at, "b")
    before = running(data)
    assert set(before) == set(PARTS)
    until(lambda: redis.Redis.from_url(at.redis_url).info("persistence")["aof_pending_bio_fsync"] == 0, "fsync is done")
    process.kill()
    for pid in before.values():
        with contextlib.suppress(ProcessLookupError):  # on Linux they end with their supervisor
            os.kill(pid, signal.SIGKILL)
    process.wait()
    with Stack(data, stripe=False) as stack:
        assert kept(stack.endpoints) == (["a", "b"], ["a", "b"], ["a", "b"])
        assert all(gone(pid) for pid in before.values())


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_parts_end_with_their_supervisor(up: tuple[Path, subprocess.Popen[str]]) -> None:
    """kill -9 of the supervisor alone leaves no part behind."""
    data, process = up
    before = running(data)
    process.kill()
    until(lambda: all(gone(pid) for pid in before.values()), "the parts are gone")


def test_ctrl_c_stops_everything_and_a_second_up_is_refused(up: tuple[Path, subprocess.Popen[str]]) -> None:
    """A folder in use is refused with the owner's pid; SIGINT ends the owner with code 0 and leaves no process."""
    data, process = up
    with pytest.raises(Refused, match=rf"as process {process.pid}: stop it"):
        Stack(data, stripe=False).start()
    before = running(data)
    assert all(not gone(pid) for pid in before.values())
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 0
    assert all(gone(pid) for pid in before.values())
    assert running(data) == {}


def test_two_stacks_and_killed_parts(tmp_path: Path) -> None:
    """Two stacks side by side keep apart; each part that is killed comes back with its data, the other is untouched.

    Workers start after `prepare`, which gets the endpoints of parts that are ready.
    """
    seen: list[tuple[Endpoints, State]] = []

    def workers(at: Endpoints) -> list[Child]:
        assert [known[0] for known in seen] == [at]
        return [python("worker", WAITS)]

    one = Stack(
        tmp_path / "one",
        stripe=False,
        workers=workers,
        prepare=lambda at: seen.append((at, one.state("clickhouse"))),
    )
    with one, Stack(tmp_path / "two", stripe=False) as two:
        assert seen[0][1] is State.READY
        assert one.state("worker") is State.READY
        assert set(one.seconds) == {"download", "parts", "prepare", "workers"}
        put(one.endpoints, "one")
        put(two.endpoints, "two")
        untouched = pids(two)
        for name in PARTS:
            before = one.pid(name)
            one.kill(name)
            one.wait_ready(name, DEADLINE_S)
            assert one.pid(name) not in (None, before)
        assert kept(one.endpoints) == (["one"], ["one"], ["one"])
        assert kept(two.endpoints) == (["two"], ["two"], ["two"])
        assert pids(two) == untouched


def test_a_fixed_port_in_use_and_an_unusable_folder_are_refused(tmp_path: Path) -> None:
    """Both are one sentence naming the value, and nothing is left running or locked."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=rf"port {port} for kafka is in use"):
            Stack(tmp_path, ports={"kafka": port}, stripe=False).start()
    with pytest.raises(Refused, match="no stack in"):
        Endpoints.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="file/data is not writable"):
        Stack(tmp_path / "file" / "data").start()
    assert running(tmp_path) == {}


def test_a_record_of_16_mib_passes(kafka: str) -> None:
    """A checkpoint of 16 MiB is one record: produced, and read back."""
    value = os.urandom(16 << 20)
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic("large", 1, 1, config={"cleanup.policy": "compact"})])["large"].result(DEADLINE_S)
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka, "acks": "all", "message.max.bytes": 17 << 20})
    producer.produce("large", value, b"key")
    assert producer.flush(DEADLINE_S) == 0
    consumer = confluent_kafka.Consumer({"bootstrap.servers": kafka, "group.id": "large"})
    consumer.assign([confluent_kafka.TopicPartition("large", 0, confluent_kafka.OFFSET_BEGINNING)])
    message = consumer.poll(DEADLINE_S)
    consumer.close()
    assert message is not None
    assert message.value() == value


def test_topics_are_not_made_by_accident(kafka: str) -> None:
    """Producing to an unknown topic fails instead of creating it with the wrong settings."""
    errors: list[object] = []
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka, "message.timeout.ms": 2_000})
    producer.produce("never-made", b"x", on_delivery=lambda error, message: errors.append(error))
    assert producer.flush(DEADLINE_S) == 0
    assert errors[0] is not None


def test_valkey_wants_its_password(valkey: ValkeyServer) -> None:
    """Without the password nothing is answered; memory policy and persistence are those that quotas need."""
    once = Retry(NoBackoff(), 0)
    with (
        redis.Redis(host=valkey.host, port=valkey.port, retry=once) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly", "appendfsync") == {"appendonly": "yes", "appendfsync": "everysec"}
