"""accounts → Redis: who the bearers of tokens are, from `principal.bind` commands (connectors/bindings.py).

A task of its own beside the fold, never awaited by it. What Redis has forgotten is noticed by the partition's mark and
written again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from tollway.connectors.bindings import BindingsWriter, Told
from tollway.connectors.errors import Unavailable
from tollway.streams.directory import Directory
from tollway.streams.state import PartitionState

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""How often the marks in Redis are compared: a flushed or older Redis is whole again within about this."""


@dataclass
class Shown:
    """One partition's bindings, and what Redis was told of them."""

    directory: Directory
    seen: int = 0
    """`Directory.bound` when it was last written."""
    whole: bool = True
    """All are to be written, not the changed ones alone."""


class BindingsView:
    """Writes what changed when it is noted, everything at an assignment and when Redis has forgotten."""

    def __init__(self, client: Redis, epoch: str, partitions: int, *, check_s: float = CHECK_S) -> None:
        self._client, self._check_s = client, check_s
        self._writer = BindingsWriter(client, epoch, partitions)
        self._shown: dict[int, Shown] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: str | None = None
        self.written = 0

    async def start(self) -> None:
        """Begin the task."""
        self._task = asyncio.create_task(self._run(), name="accounts.bindings")

    async def close(self) -> None:
        """Stop at once and disconnect; the next owner of a partition writes all it has."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._client.aclose()

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """These partitions are ours: all their bindings are written."""
        self._shown |= {number: Shown(state.directory) for number, state in states.items()}
        self._news.set()

    async def revoked(self, partitions: Iterable[int]) -> None:
        """No longer ours."""
        for number in partitions:
            self._shown.pop(number, None)

    def note(self, partition: int, state: PartitionState) -> None:
        """The partition's effects up to the state's next offset are acknowledged."""
        shown = self._shown.get(partition)
        if shown is not None and (shown.whole or shown.seen != state.directory.bound):
            self._news.set()

    def stats(self) -> dict[str, Any]:
        """For status and health."""
        waiting = sum(shown.whole or shown.seen != shown.directory.bound for shown in self._shown.values())
        return {"written": self.written, "partitions_waiting": waiting, "error": self._error}

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_s):
                    await self._news.wait()
            self._news.clear()
            try:
                for number, shown in list(self._shown.items()):
                    await self._turn(number, shown)
                self._error = None
            except Unavailable as error:
                if str(error) != self._error:
                    log.warning("bindings: %s; retrying", error)
                self._error = str(error)
                await asyncio.sleep(self._check_s)
                self._news.set()

    async def _turn(self, number: int, shown: Shown) -> None:
        directory = shown.directory
        if not shown.whole and shown.seen == directory.bound:
            shown.whole = await self._writer.mark(number) != str(directory.bound_offset)
        if not shown.whole and shown.seen == directory.bound:
            return
        bound, mark = directory.bound, str(directory.bound_offset)
        rows = told(directory, None if shown.whole else directory.bindings_since(shown.seen))
        await self._writer.write(number, rows, mark)
        self.written += len(rows)
        shown.seen, shown.whole = bound, False


def told(directory: Directory, changed: Iterable[tuple[str, tuple[str, str, str]]] | None) -> list[Told]:
    """Bindings as Redis is told them: those that changed, or all."""
    pairs = changed if changed is not None else directory.bindings()
    return [
        Told(*token, account, found.principal, found.scopes, found.operations, found.at_ms, found.offset)
        for account, token in pairs
        if (found := directory.accounts[account].bindings.get(token)) is not None
    ]
