"""Keeps named children running: started in order, restarted with back-off, given up loudly, stopped in reverse order."""

import enum
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tollway.connectors.embedded import outage
from tollway.connectors.embedded.process import Child, Process, poll, stop_orphan, write_atomically
from tollway.connectors.errors import Fatal, Unavailable

__all__ = ["Child", "State", "Supervisor", "children"]

BACK_OFF_S = 0.25  # doubled at each failure in a row
BACK_OFF_MAX_S = 10.0
FAILURES_MAX = 6
AWAY_EXIT = 75  # EX_TEMPFAIL: a child ends so where what it needs is away, and is started again for as long as it takes
STABLE_S = 10.0  # a child that served this long has not failed to start: the count begins again
TICK_S = 0.2
STARTING_TICK_S = 0.05
LOG_CHECK_S = 10.0


class State(enum.Enum):
    WAITING = "waiting for others"
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing off"
    FAILED = "failed"
    KILLED = "killed"  # on purpose, not to be restarted
    STOPPED = "stopped"


class _Kept:
    """One child with what the supervisor remembers of it."""

    def __init__(self, child: Child, data: Path) -> None:
        self.child = child
        self.process = Process(child, data)
        self.state = State.WAITING
        self.failures = 0
        self.tries = 0  # starts in a row that did not serve for long
        self.restarts = -1  # the first start is none
        self.since = time.monotonic()
        self.due = 0.0
        self.reason = ""

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    @property
    def serves(self) -> bool:
        return self.is_ready and self.process.pid is not None

    def turn(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()

    def shown(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "pid": self.process.pid,
            "restarts": max(0, self.restarts),
            "reason": "" if self.is_ready else self.reason,
        }


def children(data: Path) -> dict[str, dict[str, Any]]:
    """name → {state, pid, restarts, reason} of the stack that runs, or last ran, in `data`; empty where none did."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((data / "run" / "children.json").read_text())
    except FileNotFoundError:
        return {}
    return found


class Supervisor:
    """One thread starts, watches and stops all children: on Linux they end with it, however this process ends.

    `progress` gets one sentence at a time, from that thread.
    """

    def __init__(
        self, data: Path, progress: Callable[[str], None] = lambda line: None, *, failures_max: int = FAILURES_MAX
    ) -> None:
        self._data, self._progress, self._failures_max = data, progress, failures_max
        self._kept: dict[str, _Kept] = {}
        self._changed = threading.Condition()
        self._stopping = self._hurry = False
        self._thread: threading.Thread | None = None
        self._logs_checked = time.monotonic()
        self._away: dict[str, float] = {}  # name → when it was killed to be held away
        self._shown: dict[str, Any] = {}

    def add(self, children: Iterable[Child]) -> None:
        """Start them as soon as what they come after is ready. The first call stops what an earlier run left behind."""
        with self._changed:
            for child in children:
                if child.name in self._kept:
                    raise Fatal(f"there is a child called {child.name} already: give this one another name")
                if missing := [name for name in child.after if name not in self._kept]:
                    raise Fatal(f"{child.name} comes after {missing[0]}, which is not added before it")
                self._kept[child.name] = _Kept(child, self._data)
            if self._thread is None:
                outage.release_all(self._data)
                for pid_file in sorted((self._data / "run").glob("*.pid")):
                    if stop_orphan(pid_file):
                        self._say(f"{pid_file.stem}: stopped the process that an earlier run left behind")
                self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_ready(self, name: str, deadline_s: float | None = None) -> None:
        """Raises Unavailable when it has failed, was killed for good or is not ready in time."""
        kept = self._kept[name]
        limit_s = kept.child.ready_deadline_s * 2 if deadline_s is None else deadline_s
        over = (State.READY, State.FAILED, State.KILLED, State.STOPPED)
        with self._changed:
            # its process too: one that was killed from outside a moment ago still counts as ready
            self._changed.wait_for(lambda: kept.state in over and (kept.serves or not kept.is_ready), limit_s)
            if not kept.serves:
                reason = kept.reason or kept.process.last_words()
                raise Unavailable(f"{name} is not ready but {kept.state.value}: {reason}")

    @property
    def alive(self) -> bool:
        """Whether its thread runs: without it there are no children."""
        return self._thread is not None and self._thread.is_alive()

    def state(self, name: str) -> State:
        return self._kept[name].state

    def restarts(self, name: str) -> int:
        """How often it was started again."""
        return max(0, self._kept[name].restarts)

    def failed(self) -> dict[str, str]:
        """The children that were given up, with the reason."""
        with self._changed:
            return {name: kept.reason for name, kept in self._kept.items() if kept.state is State.FAILED}

    def child(self, name: str) -> Child:
        """What is run under a name."""
        return self._kept[name].child

    def pid(self, name: str) -> int | None:
        return self._kept[name].process.pid

    def kill(self, name: str, *, restart: bool = True) -> None:
        """kill -9. It is started again like after any crash, without counting as a failure, unless `restart` is False."""
        with self._changed:
            kept = self._kept[name]
            kept.process.kill()
            kept.failures = kept.tries = 0
            if restart:
                kept.turn(State.BACKING_OFF)
                kept.due = 0.0
            else:
                kept.turn(State.KILLED)
            self._changed.notify_all()

    def revive(self, name: str) -> None:
        """Start again what was killed for good or given up."""
        with self._changed:
            kept = self._kept[name]
            if kept.state in (State.KILLED, State.FAILED):
                kept.failures = kept.tries = 0
                kept.turn(State.WAITING)
                self._changed.notify_all()

    def remove(self, name: str) -> None:
        """Ask one child to end, wait (killed after its deadline), and forget it: its name is free for another `add`.

        Raises Fatal where others come after it.
        """
        with self._changed:
            if needing := [kept.child.name for kept in self._kept.values() if name in kept.child.after]:
                raise Fatal(f"{needing[0]} comes after {name}: remove it first")
            kept = self._kept[name]
            kept.turn(State.STOPPED)
        kept.process.stop()
        with self._changed:
            del self._kept[name]
            self._changed.notify_all()

    def stop(self) -> None:
        """Every child, those that come after others first; returns when no process is left. Safe to call again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def hurry(self) -> None:
        """A stop under way (or to come) does not wait any longer: what still runs is killed."""
        self._hurry = True

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    break
                busy = False
                for kept in self._kept.values():
                    busy |= kept.state in (State.WAITING, State.STARTING, State.BACKING_OFF)
                    self._advance(kept)
                self._changed.notify_all()
                self._changed.wait(STARTING_TICK_S if busy else TICK_S)
            self._probe()
            self._follow_outages()
            self._bound_logs()
            self._show()
        self._stop_all()
        self._show()

    def _follow_outages(self) -> None:
        """Kill what is to be away, start again what no longer is."""
        now, held = time.monotonic(), outage.held(self._data)
        for name, seconds in held.items():
            if name not in self._away:
                if name in self._kept:
                    self._away[name] = now
                    self.kill(name, restart=False)
                    self._say(f"{name}: killed and held away")
            elif now >= self._away[name] + seconds:
                outage.release(self._data, name)
        for name in [name for name in self._away if name not in held]:
            del self._away[name]
            self.revive(name)

    def _show(self) -> None:
        """What `children` reads, when it changed."""
        with self._changed:
            shown = {name: kept.shown() for name, kept in self._kept.items()}
        if shown != self._shown:
            self._shown = shown
            try:
                write_atomically(self._data / "run" / "children.json", json.dumps(shown, indent=1) + "\n")
            except OSError as e:
                self._say(f"children.json cannot be written: {e}")

    def _advance(self, kept: _Kept) -> None:
        """The next state, from what the process does. Under the lock, so nothing here waits."""
        now = time.monotonic()
        match kept.state:
            case State.WAITING:
                if not self._lacks(kept):
                    kept.turn(State.STARTING)
                    kept.restarts += 1
                    kept.due = 0.0
            case State.BACKING_OFF if now >= kept.due:
                kept.turn(State.STARTING)
                kept.restarts += 1
                kept.due = 0.0
            case State.STARTING if kept.due and kept.process.pid is None:
                self._failed(kept, f"ended with code {kept.process.returncode}: {kept.process.last_words()}")
            case State.STARTING if kept.due and now >= kept.due and self._lacks(kept):
                kept.due = (
                    now + kept.child.ready_deadline_s
                )  # it waits for another: its own deadline begins behind that
            case State.STARTING if kept.due and now >= kept.due:
                kept.process.kill()
                limit_s = kept.child.ready_deadline_s
                self._failed(kept, f"was not ready within {limit_s:.0f} s: {kept.process.last_words()}")
            case State.READY if kept.process.pid is None:
                if now - kept.since >= STABLE_S:
                    kept.failures = kept.tries = 0
                self._failed(kept, f"ended with code {kept.process.returncode}: {kept.process.last_words()}")

    def _lacks(self, kept: _Kept) -> str | None:
        """One that this child comes after and that does not serve."""
        needed = [name for name in kept.child.after if name not in kept.child.spare]
        return next((name for name in needed if not self._kept[name].serves), None)

    def _failed(self, kept: _Kept, reason: str) -> None:
        """Start it again: at once where its failure is not its own, with back-off otherwise, and not for ever."""
        kept.process.kill()  # the rest of its group
        kept.reason = reason
        kept.tries += 1
        name, away = kept.child.name, kept.process.returncode == AWAY_EXIT
        if lacking := self._lacks(kept):
            kept.turn(State.WAITING)
            self._say(f"{name}: {reason}; started again when {lacking} is back")
            return
        kept.failures += not away
        if kept.failures >= self._failures_max:
            kept.turn(State.FAILED)
            self._say(f"{name}: FAILED {kept.failures} times in a row, given up; see {kept.process.log}; {reason}")
            return
        delay_s = min(BACK_OFF_S * 2 ** min(kept.tries - 1, 10), BACK_OFF_MAX_S)
        kept.turn(State.BACKING_OFF)
        kept.due = time.monotonic() + delay_s
        self._say(f"{name}: {reason}; starting it again in {delay_s:.2f} s")

    def _probe(self) -> None:
        """Start what is due and ask what is starting: both may take a moment, so outside the lock."""
        for kept in list(self._kept.values()):
            if kept.state is not State.STARTING or self._stopping:
                continue
            if not kept.due:
                self._spawn(kept)
            elif kept.process.pid is not None and self._answers(kept.child):
                with self._changed:
                    if kept.state is State.STARTING:
                        seconds = time.monotonic() - kept.since
                        kept.turn(State.READY)
                        again = f", restart {kept.restarts}" if kept.restarts else ""
                        self._say(f"{kept.child.name}: ready after {seconds:.1f} s{again}")
                        self._changed.notify_all()

    def _answers(self, child: Child) -> bool:
        try:
            return child.ready()
        except Exception as e:  # noqa: BLE001 - all children end with this thread, so no probe may end it
            self._say(f"{child.name}: its health check raised {type(e).__name__}: {e}")
            return False

    def _say(self, line: str) -> None:
        try:
            self._progress(line)
        except OSError:  # the terminal is gone: the stack shall still be stopped in order
            self._progress = lambda line: None

    def _spawn(self, kept: _Kept) -> None:
        try:
            kept.process.start()
        except (Fatal, Unavailable, OSError) as e:
            with self._changed:
                self._failed(kept, f"cannot be started: {e}")
            return
        with self._changed:
            kept.due = time.monotonic() + kept.child.ready_deadline_s
            if kept.state is not State.STARTING:  # killed meanwhile
                kept.process.kill()

    def _bound_logs(self) -> None:
        if time.monotonic() - self._logs_checked >= LOG_CHECK_S:
            self._logs_checked = time.monotonic()
            for kept in list(self._kept.values()):
                kept.process.bound_log()

    def _stop_all(self) -> None:
        for names in stop_order([kept.child for kept in self._kept.values()]):
            group = [self._kept[name] for name in names]
            for kept in group:
                kept.process.ask_to_stop()
            deadline_s = max(kept.child.stop_deadline_s for kept in group)
            for _ in poll(deadline_s):
                if self._hurry or all(kept.process.pid is None for kept in group):
                    break
            with self._changed:
                for kept in group:
                    if kept.process.pid is not None and not self._hurry:
                        self._say(f"{kept.child.name}: did not end within {deadline_s:.0f} s, killed")
                    kept.process.kill()
                    kept.turn(State.STOPPED)
                self._changed.notify_all()


def stop_order(children: Iterable[Child]) -> Iterator[list[str]]:
    """Names in groups: a child is in an earlier group than every one that it comes after."""
    left = {child.name: child for child in children}
    while left:
        needed = {name for child in left.values() for name in child.after}
        group = [name for name in left if name not in needed]
        yield group
        for name in group:
            del left[name]
