"""The stand-in's journal: a line of JSON for what one request changed, on disk before the request is answered."""

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tollway.connectors.errors import Fatal

Entry = dict[str, Any]


class Journal:
    """Append-only; many requests share one fsync. Raises Fatal where another process has it open or it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fatal(f"{path} is in use by another server: stop it or give another --data folder") from None
        except OSError as error:
            raise Fatal(f"{path} cannot be written: {error.strerror}: give another --data folder") from error
        self._lines: list[str] = []
        self._wake = asyncio.Event()
        self._flushed: asyncio.Future[None] | None = None

    def read(self) -> Iterator[Entry]:
        """Every entry so far. What a crash cut off at the end was answered to nobody: it is removed."""
        whole = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entries = json.loads(line)
                except ValueError as error:
                    raise Fatal(f"{self._path}, line {number} is damaged: restore it or remove the folder") from error
                whole += len(line)
                yield from entries
        os.ftruncate(self._fd, whole)

    def append(self, entries: list[Entry]) -> None:
        """Put down what belongs together: all of it is kept, or nothing. Durable after the next `durable()`."""
        self._lines.append(json.dumps(entries, separators=(",", ":")) + "\n")

    async def durable(self) -> None:
        """Return when all that was appended before is on disk."""
        if self._flushed is None:
            self._flushed = asyncio.get_running_loop().create_future()
        self._wake.set()
        await asyncio.shield(self._flushed)

    async def run(self) -> None:
        """Write and fsync for whoever waits, until cancelled. A disk that fails ends the process: memory must not run ahead."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            text, self._lines = "".join(self._lines), []
            flushed, self._flushed = self._flushed, None
            if text:
                try:
                    await asyncio.to_thread(self._write, text.encode())
                except OSError as error:
                    os.write(2, f"{self._path} cannot be written: {error.strerror}\n".encode())
                    os._exit(1)
            if flushed:
                flushed.set_result(None)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fdatasync(self._fd)
