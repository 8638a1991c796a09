"""The whole local stack in one data folder: Valkey, Kafka, ClickHouse, the Stripe stand-in, and workers on top."""

import dataclasses
import fcntl
import json
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from tollway.connectors.embedded import jars
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker, cluster
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port, require_free, write_atomically
from tollway.connectors.embedded.supervisor import State, Supervisor
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Fatal, Refused

PORTS = ("valkey", "kafka", "kafka_controller", "clickhouse", "stripe")
PARTS = ("valkey", "kafka", "clickhouse", "stripe")
SIGNAL_LOOK_S = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLICKHOUSE_USER, CLICKHOUSE_DATABASE = "tollway", "tollway"


@dataclass(frozen=True)
class Endpoints:
    """Where the parts of a stack are, with the passwords."""

    kafka_bootstrap: str
    redis_url: str
    clickhouse_host: str
    clickhouse_port: int
    clickhouse_user: str
    clickhouse_password: str
    clickhouse_database: str
    stripe_url: str
    replication: int = 1
    """Copies of each record."""

    @classmethod
    def load(cls, data: Path) -> Self:
        """Of the stack that runs, or last ran, in this folder. Raises Refused when there was none."""
        try:
            return cls(**json.loads((data / "stack.json").read_text())["endpoints"])
        except FileNotFoundError:
            raise Refused(f"there is no stack in {data}: start one with `tollway up` or name another folder") from None
        except (ValueError, KeyError, TypeError) as e:
            raise Refused(f"{data / 'stack.json'} is not readable ({e}): stop the stack and delete that file") from e


class Stack:
    """One stack in `data`; a second start there uses the same data, passwords and, where free, ports.

    `workers` come after the parts and after `prepare(endpoints)`; a function gets the endpoints. `ports` fixes some of
    PORTS: if one is taken the start is refused. `progress` gets one sentence at a time, from several threads. `brokers`: 1, or
    3 for failover, which are the children `kafka`, `kafka-2`, `kafka-3`; workers go on without one of them.
    """

    def __init__(
        self,
        data: Path,
        *,
        workers: list[Child] | Callable[[Endpoints], list[Child]] | None = None,
        prepare: Callable[[Endpoints], None] = lambda endpoints: None,
        progress: Callable[[str], None] = lambda line: None,
        ports: Mapping[str, int] | None = None,
        stripe: bool = True,
        kafka_settings: Mapping[str, str] | None = None,
        brokers: int = 1,
    ) -> None:
        self._brokers = brokers
        self.data = data.absolute()
        self._workers, self._prepare, self._progress = workers or [], prepare, progress
        self._fixed, self._stripe, self._kafka_settings = dict(ports or {}), stripe, kafka_settings
        self._lock: TextIO | None = None
        self._endpoints: Endpoints | None = None
        self.supervisor = Supervisor(self.data, progress)
        self.seconds: dict[str, float] = {}
        """How long the last start took: download, parts, prepare, workers."""

    @property
    def endpoints(self) -> Endpoints:
        if self._endpoints is None:
            raise Refused(f"the stack in {self.data} has not been started: start it first")
        return self._endpoints

    def start(self) -> None:
        """Returns when everything is ready; on failure, or Ctrl-C, everything is stopped again.

        Raises Refused (folder in use or not writable, port taken), Fatal or Unavailable (a part does not start).
        """
        with _signals(_interrupt):
            try:
                self._take_folder()
                self.supervisor = Supervisor(self.data, self._progress)
                self._start()
            except BaseException:
                self.stop()
                raise

    def _start(self) -> None:
        with self._timed("download"):
            jars.libs(self._progress)
        with self._timed("parts"):
            parts = self._parts()
            self.supervisor.add(parts)
            for part in parts:
                self.supervisor.wait_ready(part.name)
        with self._timed("prepare"):
            self._prepare(self.endpoints)
        with self._timed("workers"):
            workers = self._workers(self.endpoints) if callable(self._workers) else self._workers
            names = tuple(part.name for part in parts)
            spare = tuple(name for name in names if name.startswith("kafka")) if self._brokers > 1 else ()
            self.supervisor.add([dataclasses.replace(w, after=(*names, *w.after), spare=spare) for w in workers])
            for worker in workers:
                self.supervisor.wait_ready(worker.name)

    def stop(self) -> None:
        """Workers first, then the parts; no process is left. Safe to call again."""
        self.supervisor.stop()
        if self._lock:
            self._lock.close()
            self._lock = None

    def run_until_signal(self) -> dict[str, str]:
        """Wait for SIGINT, SIGTERM or SIGHUP, then stop; a second one kills what has not ended by then.

        Call it from the main thread, after `start`. Returns the children that had failed, with the reason.
        """
        asked: list[int] = []
        never = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            # No lock in here: a second signal may interrupt the first one's handler.
            if asked:
                self.supervisor.hurry()
            asked.append(number)

        with _signals(on_signal):
            while not asked:
                never.wait(SIGNAL_LOOK_S)
                if not self.supervisor.alive:
                    raise Fatal(f"the supervisor has ended, its children with it; see {self.data / 'log'}")
            failed = self.supervisor.failed()
            self._progress("stopping")
            self.stop()
            self._progress("stopped")
        return failed

    def kill(self, name: str, *, restart: bool = True) -> None:
        """kill -9 of one child; the supervisor starts it again unless `restart` is False.

        From another process: `outage.hold(data, name, seconds)`.
        """
        self.supervisor.kill(name, restart=restart)

    def revive(self, name: str) -> None:
        """Start again what was killed for good or given up."""
        self.supervisor.revive(name)

    def pid(self, name: str) -> int | None:
        return self.supervisor.pid(name)

    def state(self, name: str) -> State:
        return self.supervisor.state(name)

    def wait_ready(self, name: str, deadline_s: float = 60.0) -> None:
        self.supervisor.wait_ready(name, deadline_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _take_folder(self) -> None:
        path = self.data / "lock"
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            lock = path.open("a+")
        except OSError as e:
            raise Refused(f"data folder {self.data} is not writable ({e.strerror}): choose another one") from e
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise Refused(
                f"a stack runs in {self.data} already, as process {owner}: stop it or choose another data folder"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _parts(self) -> list[Child]:
        kept = self._remembered()
        ports = {name: self._port(name, kept) for name in PORTS}
        passwords = {
            name: kept.get(f"{name}_password") or secrets.token_urlsafe(24) for name in ("valkey", "clickhouse")
        }
        valkey = ValkeyServer(self.data, ports["valkey"], password=passwords["valkey"])
        kafka = self._kafka(ports, kept)
        who = {"user": CLICKHOUSE_USER, "database": CLICKHOUSE_DATABASE, "password": passwords["clickhouse"]}
        clickhouse = ClickHouseServer(self.data, ports["clickhouse"], **who)
        stripe_url = f"http://{LOOPBACK}:{ports['stripe']}"
        self._endpoints = Endpoints(
            kafka_bootstrap=",".join(broker.bootstrap for broker in kafka),
            replication=self._brokers,
            redis_url=valkey.url,
            clickhouse_host=clickhouse.host,
            clickhouse_port=clickhouse.port,
            clickhouse_user=clickhouse.user,
            clickhouse_password=clickhouse.password,
            clickhouse_database=clickhouse.database,
            stripe_url=stripe_url,
        )
        ports |= {broker.name: broker.port for broker in kafka[1:]}
        ports |= {f"{broker.name}_controller": broker.controller_port for broker in kafka[1:]}
        remembered = {
            **{f"{name}_port": port for name, port in ports.items()},
            **{f"{name}_password": password for name, password in passwords.items()},
            "endpoints": dataclasses.asdict(self._endpoints),
        }
        write_atomically(self.data / "stack.json", json.dumps(remembered, indent=1) + "\n")
        parts = [valkey.child(), *(broker.child() for broker in kafka), clickhouse.child()]
        return [*parts, stripe_stand_in(self.data, ports["stripe"])] if self._stripe else parts

    def _kafka(self, ports: Mapping[str, int], kept: Mapping[str, Any]) -> list[KafkaBroker]:
        first = ports["kafka"], ports["kafka_controller"]
        if self._brokers == 1:
            told = {"settings": self._kafka_settings, "progress": self._progress}
            return [KafkaBroker(self.data, first[0], controller_port=first[1], **told)]  # type: ignore[arg-type]
        names = [f"kafka-{number}" for number in range(2, self._brokers + 1)]
        others = [(self._port(name, kept), self._port(f"{name}_controller", kept)) for name in names]
        return cluster(self.data, [first, *others], self._kafka_settings, self._progress)

    def _remembered(self) -> dict[str, Any]:
        try:
            kept = json.loads((self.data / "stack.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as e:
            raise Refused(f"{self.data / 'stack.json'} is not JSON ({e}): delete it, new passwords are made") from e
        return kept if isinstance(kept, dict) else {}

    def _port(self, name: str, kept: Mapping[str, Any]) -> int:
        if name in self._fixed:
            return require_free(self._fixed[name], name)
        return free_port(kept.get(f"{name}_port"))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun


def stripe_stand_in(data: Path, port: int) -> Child:
    """The Stripe stand-in as a child."""
    return Child(
        "stripe",
        (
            *(sys.executable, "-m", "tollway.connectors.embedded.stripe_server"),
            *("--port", str(port), "--data", str(data / "stripe")),
        ),
        ready=lambda: answers_ok(f"http://{LOOPBACK}:{port}/health"),
        after=("valkey",),
    )


def answers_ok(url: str) -> bool:
    """Whether a GET is answered 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that ask to stop, where Python lets us: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
