"""A process that emits, sends and tidies its spool, cut at its k-th change to the disk, for every k; or refused that change.

`python -m tests.spool_crash ROOT SEED KIND WHEN_FULL STEPS` prints what was found as JSON; KIND is killed, halfway or full. The broker is a list in a file: what is taken
from the spool is written there before it is settled, as the sender does with an answer.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.usage_log import NOWHERE, call
from tollway.connectors.adoption import adopt_dead
from tollway.connectors.emitter import SOURCE_S, Emitted, Emitter
from tollway.connectors.errors import Refused
from tollway.connectors.spool import Spool
from tollway.connectors.tally import Tally

CHANGES = ("open", "write", "pwrite", "ftruncate", "truncate", "unlink", "rename", "rmdir", "mkdir", "fsync", "fdatasync",
           "link", "flock")  # fmt: skip
SPELL = 4
"""Changes in a row that a full disk refuses."""
EVENTS_MAX, SEGMENT_EVENTS = 96, 12

really = {name: getattr(fcntl if name == "flock" else os, name) for name in CHANGES}


class Cut:
    """Counts changes to the disk; the k-th does not happen: the process is killed, in the middle of it, or refused it."""

    def __init__(self, kind: str, at: int, journal: "Journal") -> None:
        self.kind, self.at, self.journal, self.count = kind, at, journal, 0
        self.names: Counter[str] = Counter()
        for name in CHANGES:
            setattr(fcntl if name == "flock" else os, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return really[name](*arguments, **options)
            self.count += 1
            self.names[name] += 1
            if self.kind == "full" and self.at <= self.count < self.at + SPELL:
                return self._refused(name, arguments)
            if self.kind in ("killed", "halfway") and self.count == self.at:
                if self.kind == "halfway" and name in ("write", "pwrite"):
                    really[name](arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return really[name](*arguments, **options)

        return changed

    def _refused(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "ftruncate":
            self.journal.line("uncut")
        if name == "write" and self.count % 2:
            return int(really[name](arguments[0], arguments[1][: len(arguments[1]) // 2]))
        raise OSError(
            errno.ENOSPC if name in ("open", "write", "pwrite", "mkdir", "rename", "link") else errno.EIO, name
        )


class Journal:
    """What was about to be emitted, what emit() returned, what the log has: a line each, there before the next step."""

    def __init__(self, path: Path) -> None:
        self._fd = really["open"](path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def line(self, kind: str, *values: Any) -> None:
        really["write"](self._fd, json.dumps([kind, *values]).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


def deliver(spool: Spool, journal: Journal, slices: int = 1 << 30) -> None:
    """As the sender does, with a broker that answers at once."""
    for _ in range(slices):
        frames, _ = spool.take()
        for _, sequence, lane, _, value in frames:
            journal.line("log", spool.source, lane, sequence, value.hex())
        spool.progress.settle({lane: sequence for _, sequence, lane, _, _ in frames})
        settle(spool)
        if not frames:
            return


def settle(spool: Spool) -> None:
    with suppress(OSError):
        spool.settle(spool.position)


def emitting(root: Path, journal: Journal, seed: int, when_full: Any, steps: int) -> None:
    """One life, the same for the same seed: emit, deliver, note the place, sync, a day passes, close."""
    random, now_us, n = Random(seed), 1_790_000_000_000_000, 0
    options: dict[str, Any] = {"spool_dir": root, "spool_events_max": EVENTS_MAX, "when_full": when_full}
    emitter = None
    while emitter is None:
        with suppress(Refused):  # the folder cannot be made yet: a service that starts again finds that it can
            emitter = Emitter(NOWHERE, clock_us=lambda: now_us, elapsed_s=lambda: now_us / 1e6, **options)
    for _ in range(steps):
        step = random.choices(("emit", "deliver", "note", "sync", "day"), (12, 3, 3, 1, 1))[0]
        if step == "emit":
            for _ in range(random.randrange(1, 9)):
                n, now_us = n + 1, now_us + 2_000_000
                emitted = emitter.emit(**call(n))
                journal.line("returned", emitter.counters["dropped"], *(emitted or ()))
        elif step == "day":
            now_us += SOURCE_S * 1_000_000
        for spool in list(emitter._spools):
            tidy(emitter, spool, step, journal)
    emitter.close_sync(0)
    journal.line("counters", emitter.counters)


def tidy(emitter: Emitter, spool: Spool, step: str, journal: Journal) -> None:
    try:
        if step == "deliver":
            deliver(spool, journal, 1)
        elif step == "note":
            spool.save_position()
        elif step == "sync":
            spool.sync()
        if spool.retired and spool.all_settled:
            emitter._spools.remove(spool)
            spool.remove()
    except OSError:
        journal.line("complained")


def succeeding(root: Path, journal: Journal) -> None:
    """A successor: all that dead processes left, delivered and removed."""
    found: list[Spool] = []
    tally = Tally()
    adopt_dead(root, tally, set(), set(), found.append)
    for spool in found:
        deliver(spool, journal)
        try:
            spool.remove()
        except OSError:
            journal.line("complained")
    journal.line("successor", tally.counts())


def lived(work: Callable[[], None], journal: Journal, kind: str, at: int) -> tuple[int, int]:
    """Do the work in a process of its own, cut there; its exit status and how many changes it came to."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        cut = Cut(kind, at, journal)
        try:
            work()
            journal.line("changes", cut.names)
            really["write"](write_end, b"%d" % cut.count)
            os._exit(0)
        finally:  # what it raised is printed by nobody else
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write_end)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read_end) as pipe:
        return status, int(pipe.read() or 0)


@dataclass
class Found:
    """What a journal says in the end."""

    returned: set[Emitted] = field(default_factory=set)
    log: list[Emitted] = field(default_factory=list)
    values: dict[Emitted, set[str]] = field(default_factory=dict)
    calls: int = 0
    dropped: int = 0
    counters: dict[str, Any] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    uncut: int = 0
    successors: Counter[str] = field(default_factory=Counter)


def read(path: Path) -> Found:
    found = Found()
    for line in path.read_bytes().splitlines():
        kind, *values = json.loads(line)
        if kind == "returned":
            found.calls, found.dropped = found.calls + 1, values[0]
            found.returned |= {Emitted(*values[1:])} if len(values) > 1 else set()
        elif kind == "log":
            one = Emitted(*values[:3])
            found.log.append(one)
            found.values.setdefault(one, set()).add(values[3])
        elif kind == "counters":
            found.counters = values[0]
        elif kind == "uncut":
            found.uncut += 1
        elif kind == "changes":
            found.changes.update(values[0])
        elif kind == "successor":
            found.successors.update({name: n for name, n in values[0].items() if isinstance(n, int)})
    return found


def faults(found: Found, kind: str, when_full: str, left: list[str]) -> Iterator[str]:
    """What must not be, whatever was cut."""
    lost = found.returned - set(found.log)
    if len(lost) > found.dropped + (SEGMENT_EVENTS if when_full == "drop_oldest" and kind != "full" else 0):
        yield f"lost: {sorted(lost)[:3]} and so on, {len(lost)} in all, {found.dropped} dropped"
    if (extra := len(set(found.log) - found.returned)) > (kind != "full"):
        yield f"{extra} in the log that emit() never returned"
    if any(len(values) > 1 for values in found.values.values()):
        yield "one identity, two events"
    last: Counter[tuple[str, int]] = Counter()
    for one in dict.fromkeys(found.log):
        if one.sequence < last[one[:2]]:
            yield f"out of order: {one}"
        last[one[:2]] = one.sequence
    damage = [found.successors["corrupt"], found.successors["lost"]] + [
        found.counters.get(n, 0) for n in ("corrupt", "lost")
    ]
    if not 0 <= sum(map(abs, damage)) <= 2 * found.uncut:  # two successors may find it
        yield f"damage where there is none: {found.successors} {found.counters}"
    if left and not found.uncut:
        yield f"left behind: {left}"
    if kind == "full":
        counters = found.counters
        if sum(counters["refused"].values()) != found.calls - len(found.returned):
            yield f"refusals are not counted: {counters} of {found.calls} calls"


def one(
    root: Path, seed: int, kind: str, at: int, when_full: str, successor: tuple[str, int], steps: int
) -> tuple[list[str], int]:
    """A life cut at `at`, a successor cut as it says, and one that is not; what is wrong, and how many changes there were."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    path, spools = root / "journal", root / "spool"
    journal = Journal(path)
    status, count = lived(lambda: emitting(spools, journal, seed, when_full, steps), journal, kind, at)
    wrong = [] if status == 0 or (kind != "full" and status == signal.SIGKILL) else [f"it ended with {status}"]
    spools.mkdir(exist_ok=True)
    lived(lambda: succeeding(spools, journal), journal, *successor)
    status, _ = lived(lambda: succeeding(spools, journal), journal, "whole", 0)
    wrong += [f"a successor ended with {status}"] if status else []
    left = [each.name for each in spools.iterdir() if not each.name.startswith(".")]  # half made: it goes after an hour
    journal.close()
    return wrong or list(faults(read(path), kind, when_full, left)), count


def sweep(root: Path, seed: int, kind: str, when_full: str, steps: int) -> dict[str, Any]:
    """Every k in turn; the successor is cut, too, at a place of its own each time."""
    wrong, count = one(root, seed, "whole", 0, when_full, ("whole", 0), steps)
    changes = read(root / "journal").changes
    found = [f"whole: {each}" for each in wrong]
    random = Random(seed)
    for at in range(1, count + 1):
        successor = (random.choice(("killed", "halfway", "full")), random.randrange(1, 30))
        wrong, _ = one(root, seed, kind, at, when_full, successor, steps)
        found += [f"{kind} at {at}, then {successor}: {each}" for each in wrong]
    return {"changes": count, "kinds": changes, "wrong": found}


if __name__ == "__main__":
    print(json.dumps(sweep(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))))
