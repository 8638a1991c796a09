"""One child process: started in its own group, logged, waited for, stopped; it never outlives us."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tollway.connectors.errors import Fatal, Refused, Unavailable

LOOPBACK = "127.0.0.1"
LOG_MAX_BYTES = 16 << 20  # then the log becomes <name>.log.1 and starts again
POLL_S = 0.05
# Below every system's range for outgoing connections, which could take a port between our check and its use.
PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class Child:
    """What to run. `prepare` runs before each start, `ready` answers at once whether it serves."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the process that starts it."""
    stop_signal: signal.Signals = signal.SIGTERM
    after: tuple[str, ...] = ()
    """Names of children that must be ready before this one starts."""
    spare: tuple[str, ...] = ()
    """Those of `after` that it also starts without: of several brokers one may be away."""
    prepare: Callable[[], None] = lambda: None
    ready_deadline_s: float = 60.0
    stop_deadline_s: float = 20.0
    """From the stop signal to the kill."""


class Process:
    """A running `Child`: pid in `<data>/run/<name>.pid`, output in `<data>/log/<name>.log`.

    Start it from a thread that lives as long as the child shall: on Linux the child ends with that thread.
    """

    def __init__(self, child: Child, data: Path) -> None:
        self.child = child
        self.log = data / "log" / f"{child.name}.log"
        self._pid_file = data / "run" / f"{child.name}.pid"
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen and self._popen.poll() is None else None

    @property
    def returncode(self) -> int | None:
        return self._popen.poll() if self._popen else None

    def start(self) -> None:
        """End what a former run left under this name, prepare, and start.

        Raises Fatal when the command cannot be run.
        """
        if self.pid is not None:
            raise Fatal(f"{self.child.name} is already running as process {self.pid}: stop it first")
        stop_orphan(self._pid_file)
        self.child.prepare()
        for folder in (self.log.parent, self._pid_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        argv = [*self.child.argv]
        shim = [sys.executable, "-I", "-S", str(Path(__file__).with_name("die_with_parent.py")), str(os.getpid())]
        with self.log.open("ab") as log:
            try:
                self._popen = subprocess.Popen(
                    [*shim, *argv] if sys.platform == "linux" else argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.child.env},
                    start_new_session=True,
                )
            except OSError as e:
                raise Fatal(f"{self.child.name} cannot be started: {argv[0]}: {e.strerror}") from e
        write_atomically(self._pid_file, json.dumps({"pid": self._popen.pid, "argv": argv}))

    def wait_ready(self, deadline_s: float | None = None) -> None:
        """Raises Unavailable with the end of the log when it ended, or was not ready in time."""
        deadline_s = self.child.ready_deadline_s if deadline_s is None else deadline_s
        for _ in poll(deadline_s):
            if self.pid is None:
                raise Unavailable(f"{self.child.name} ended with code {self.returncode}: {self.last_words()}")
            if self.child.ready():
                return
        raise Unavailable(f"{self.child.name} was not ready within {deadline_s:.0f} s: {self.last_words()}")

    def ask_to_stop(self) -> None:
        if self._popen and self.pid is not None:
            self._popen.send_signal(self.child.stop_signal)

    def stop(self, deadline_s: float | None = None) -> None:
        """Ask, wait until the deadline, then kill; the whole group is gone afterwards. Safe to call again."""
        self.ask_to_stop()
        if self._popen:
            try:
                self._popen.wait(self.child.stop_deadline_s if deadline_s is None else deadline_s)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self._reap()

    def kill(self) -> None:
        """kill -9, at once, of the whole group."""
        if self._popen and self.pid is not None:
            self._popen.kill()
        self._reap()

    def _reap(self) -> None:
        if self._popen is None:
            return
        self._popen.wait()
        kill_group(self._popen.pid)
        self._pid_file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last few lines of the log, for a message."""
        text = tail(self.log, 2_000).strip()
        return " | ".join(text.splitlines()[-5:]) or f"nothing in {self.log}"

    def bound_log(self) -> None:
        """Start the log again when it is larger than LOG_MAX_BYTES; one older file is kept."""
        if self.log.exists() and self.log.stat().st_size > LOG_MAX_BYTES:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)  # the child appends: its next line lands at the start


def poll(deadline_s: float, every_s: float = POLL_S) -> Iterator[None]:
    """Yield at once and then every so often until the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        yield
        if time.monotonic() >= end:
            return
        time.sleep(every_s)


def tail(path: Path, size: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - size))
        return f.read().decode(errors="replace")


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as f:
        f.write(text)
    new.replace(path)


def kill_group(pgid: int) -> None:
    try:
        os.killpg(pgid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says EPERM of a group that is all zombies
        return


def command_line(pid: int) -> str:
    """The command a process runs, words joined by spaces; empty when there is no such process (or a zombie)."""
    proc = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        try:
            return proc.read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "" if "<defunct>" in shown.stdout else shown.stdout.strip()


def stop_orphan(pid_file: Path, deadline_s: float = 20.0) -> bool:
    """Kill what an earlier run left under this pid file, if that pid still runs that very command.

    A pid that was given to another program since is left alone. Raises Fatal when it does not go away.
    """
    try:
        left = json.loads(pid_file.read_text())
        pid, command = int(left["pid"]), " ".join(left["argv"])
    except (OSError, ValueError, KeyError, TypeError):  # never written, or torn by a crash: nothing to go by
        pid_file.unlink(missing_ok=True)
        return False
    found = command in command_line(pid)
    if found:
        kill_group(pid)
        for _ in poll(deadline_s):
            if command not in command_line(pid):
                break
        else:
            raise Fatal(f"process {pid}, left by an earlier run ({command}), does not end: kill it")
    pid_file.unlink(missing_ok=True)
    return found


def is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: TIME_WAIT is no listener
        try:
            s.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_port(wanted: int | None = None) -> int:
    """`wanted` if it is free, else any free one."""
    if wanted is not None and is_free(wanted):
        return wanted
    for port in random.SystemRandom().sample(PORTS, 200):
        if is_free(port):
            return port
    raise Fatal(f"no free port between {PORTS.start} and {PORTS.stop - 1} on {LOOPBACK}: stop what holds them")


def require_free(port: int, what: str) -> int:
    """Raises Refused when a port that was asked for is taken."""
    if not is_free(port):
        raise Refused(f"port {port} for {what} is in use on {LOOPBACK}: stop what holds it or choose another port")
    return port
