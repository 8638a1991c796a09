"""Where usage goes: Kafka (the real one), memory (tests), a JSONL file (an audit copy), and several at once.

Each has `record(**fields) -> bool` (False: refused, and counted) and `flush(deadline_s) -> int` (events not yet safe).
"""

import asyncio
import copy
import json
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tollway.connectors.emitter import Emitter
from tollway.connectors.errors import Invalid, Refused
from tollway.connectors.event import complete
from tollway.schemas import encoder
from tollway.schemas.usage import FieldError

EVENTS_MAX = 100_000
FILE_BYTES_MAX = 1 << 30
_CUT_SHORT = b"\x00\n"
"""Ends a line whose write was cut short: no JSON holds a NUL."""
_UNSENT = {"source": "0" * 32, "sequence": 1}

log = logging.getLogger("tollway.sinks")


class Sink(Protocol):
    """Takes the fields of UsageEvent without `source` and `sequence`, which only the emitter gives."""

    def record(self, **fields: Any) -> bool:
        """False where it was refused. Raises FieldError for content that no one could bill."""
        ...

    async def flush(self, deadline_s: float) -> int:
        """Events that are not yet safe."""
        ...


class KafkaSink:
    """An emitter as a sink."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter

    def record(self, **fields: Any) -> bool:
        return self.emitter.emit(**fields) is not None

    async def flush(self, deadline_s: float) -> int:
        return sum((await self.emitter.flush(deadline_s)).values())


class Local:
    """Completes and checks an event as the emitter does, then keeps it here."""

    def __init__(self, clock_us: Callable[[], int]) -> None:
        self._clock_us = clock_us
        self._random_bits = random.Random(os.urandom(32)).getrandbits
        self._lock = threading.Lock()

    def _completed(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            complete(fields, self._clock_us(), self._random_bits)
        check(fields)
        return fields


class MemorySink(Local):
    """The newest events, for tests. Thread-safe."""

    def __init__(
        self, events_max: int = EVENTS_MAX, clock_us: Callable[[], int] = lambda: time.time_ns() // 1000
    ) -> None:
        super().__init__(clock_us)
        self._events: deque[dict[str, Any]] = deque(maxlen=events_max)
        self.forgotten = 0
        """Older events that made room."""

    def record(self, **fields: Any) -> bool:
        event = copy.deepcopy(self._completed(fields))
        with self._lock:
            self.forgotten += len(self._events) == self._events.maxlen
            self._events.append(event)
        return True

    async def flush(self, deadline_s: float) -> int:
        return 0

    def events(self, **wanted: Any) -> list[dict[str, Any]]:
        """In their order; with `wanted` only those whose fields are equal: `events(principal="u-1", status="ok")`."""
        return [
            event for event in list(self._events) if all(event.get(name) == value for name, value in wanted.items())
        ]


class JsonlSink(Local):
    """One event a line, appended with one write(2): lines of several processes never mix. Thread-safe."""

    def __init__(
        self,
        path: str | Path,
        bytes_max: int = FILE_BYTES_MAX,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Beyond bytes_max, and on a full disk, events are refused and counted in `refused`. Raises Refused where it cannot write."""
        super().__init__(clock_us)
        self.path, self._bytes_max = Path(path), bytes_max
        self.refused: Counter[str] = Counter()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refused(f"path is {str(path)!r}: {error.strerror}; give a file that can be written") from error
        size = os.fstat(self._fd).st_size
        self._cut_short = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def record(self, **fields: Any) -> bool:
        line = json.dumps(self._completed(fields), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self._cut_short:
                line = _CUT_SHORT + line
            if os.fstat(self._fd).st_size + len(line) > self._bytes_max:
                self.refused["full"] += 1
                return False
            try:
                written = os.write(self._fd, line)
            except OSError:
                written = 0
            self._cut_short = 0 < written < len(line) or (self._cut_short and not written)
            if written < len(line):
                self.refused["disk"] += 1
        return written == len(line)

    async def flush(self, deadline_s: float) -> int:
        """To the disk. Raises OSError."""
        await asyncio.to_thread(os.fsync, self._fd)
        return 0

    def close(self) -> None:
        os.close(self._fd)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a JsonlSink's file, in their order, without lines that a crash cut short.

    Raises Invalid naming the line that is no event.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or line.endswith(_CUT_SHORT):
                continue
            try:
                event = json.loads(line)
                check(event)
            except (ValueError, TypeError) as error:
                raise Invalid("bad_line", f"{path}, line {number}: {error}") from error
            yield event


class CompositeSink(Local):
    """Every event to every sink, as one event (same id and time). What one sink fails to take is its own loss."""

    def __init__(self, sinks: Mapping[str, Sink], clock_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        super().__init__(clock_us)
        self.sinks = dict(sinks)
        self.lost: Counter[str] = Counter()
        """Sink → events that it refused or failed to take."""
        self.failures: dict[str, str] = {}
        """Sink → its last exception."""

    def record(self, **fields: Any) -> bool:
        """True where every sink took it. Raises FieldError before any sink has it."""
        event = self._completed(fields)
        taken = [self._to(name, sink, event) for name, sink in self.sinks.items()]
        return all(taken)

    def _to(self, name: str, sink: Sink, event: dict[str, Any]) -> bool:
        try:
            taken = sink.record(**event)
        except Exception as error:  # noqa: BLE001 - whatever a sink raises is its own loss, and kept in `failures`
            self._failed(name, error)
            taken = False
        if not taken:
            with self._lock:
                self.lost[name] += 1
        return taken

    def _failed(self, name: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        if self.failures.get(name) != text:  # a sink that is down would fill the log
            log.error("sink %s: %s", name, text, exc_info=error)
        self.failures[name] = text

    async def flush(self, deadline_s: float) -> int:
        """All at once, each for itself; the sum of what is not yet safe, a sink that fails counting as one."""

        async def one(name: str, sink: Sink) -> int:
            try:
                async with asyncio.timeout(deadline_s):
                    return await sink.flush(deadline_s)
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(name, error)
                return 1

        return sum(await asyncio.gather(*(one(name, sink) for name, sink in self.sinks.items())))


def check(fields: Mapping[str, Any]) -> None:
    """Refuse what the emitter would refuse. Raises FieldError."""
    for name in ("source", "sequence"):
        if name in fields:
            raise FieldError(name, fields[name], "unknown_field", "the emitter sets it")
    encoder.encode({**fields, **_UNSENT})
