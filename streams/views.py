"""Several views of one fold: each is told, none waits for another."""

import asyncio
from collections.abc import Sequence

from tollway.streams.accounts import View
from tollway.streams.state import PartitionState


class Views:
    """The views of the accounts group as one."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """These partitions are ours."""
        for view in self._views:
            await view.assigned(states)

    async def revoked(self, partitions: list[int]) -> None:
        """No longer ours."""
        await asyncio.gather(*(view.revoked(partitions) for view in self._views))

    def note(self, partition: int, state: PartitionState) -> None:
        """Effects up to the state's next offset are acknowledged."""
        for view in self._views:
            view.note(partition, state)
