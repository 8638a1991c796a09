"""Sealed snapshots → ClickHouse, beside the audit fold: no fold waits for it, and ClickHouse may be away for days.

Both groups' snapshots are copied by whoever owns the partition in group audit. They are looked for at an assignment and when a
boundary is crossed, from where the last look ended, until both groups' are found.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

from tollway.connectors.errors import TollwayError
from tollway.connectors.kafka import ends
from tollway.connectors.snapshots import SnapshotStore
from tollway.schemas.topics import CHECKPOINTS
from tollway.streams.seal import GROUPS
from tollway.streams.seal_sources import kafka_seals, row_of

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Time between two looks for what is not there yet."""
LOOKS_MAX = 60
"""Then the next boundary's look finds it: an accounts group that stands still seals nothing."""


class SnapshotCopies:
    """A task of its own; `start()` it, `close()` it."""

    def __init__(
        self, bootstrap: str, security: dict[str, Any], store: SnapshotStore, epoch: str, look_s: float = LOOK_S
    ) -> None:
        self._bootstrap, self._security, self._store, self._epoch = bootstrap, security, store, epoch
        self._look_s = look_s
        self._read: dict[int, int] = {}
        """partition → offset of `tollway.checkpoints` up to which it was looked through and copied."""
        self._newest: dict[tuple[str, int], int] = {}
        self._due: dict[int, int] = {}
        """partition → looks left."""
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: str | None = None
        self.copied = 0

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="snapshot copies")

    async def close(self) -> None:
        """Stop at once: the next owner looks again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def assigned(self, partitions: Iterable[int]) -> None:
        """These are ours: there may be some that nobody has copied."""
        self.sealed(partitions)

    def sealed(self, partitions: Iterable[int]) -> None:
        """A boundary of these was crossed."""
        self._due |= dict.fromkeys(partitions, LOOKS_MAX)
        self._news.set()

    def revoked(self, partitions: Iterable[int]) -> None:
        """No longer ours."""
        for number in partitions:
            self._due.pop(number, None)
            self._read.pop(number, None)

    def stats(self) -> dict[str, Any]:
        """For health."""
        return {"copied": self.copied, "looking": sorted(self._due), "error": self._error}

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            began = time.monotonic()
            for number in list(self._due):
                await self._look(number)
            if not self._due:
                self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(max(0.0, self._look_s - (time.monotonic() - began)))

    async def _look(self, number: int) -> None:
        """Copy what one partition has; a failure is told once and tried again."""
        try:
            await self._copy(number)
            self._error = None
        except TollwayError as error:
            if str(error) != self._error:
                log.warning("sealed snapshots wait: %s", error)
            self._error = str(error)
            return
        days = {self._newest.get((group, number)) for group in GROUPS}
        left = self._due.get(number, 0) - 1
        if number in self._due and (len(days) == 1 or left <= 0):
            del self._due[number]
        elif number in self._due:
            self._due[number] = left

    async def _copy(self, number: int) -> None:
        end = (await ends(self._bootstrap, self._security, CHECKPOINTS.name, [number]))[number]
        found = await kafka_seals(self._bootstrap, self._security, self._epoch, number, self._read.get(number, 0))
        for group in GROUPS:
            mine = [seal for seal in found if seal.group == group]
            known = {row.day for row in await asyncio.to_thread(self._store.heads, self._epoch, group, number)}
            for seal in mine:
                if seal.day not in known:
                    await asyncio.to_thread(self._store.put, row_of(seal))
                    self.copied += 1
            if days := known | {seal.day for seal in mine}:
                self._newest[group, number] = max(days)
        self._read[number] = end
