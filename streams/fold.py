"""What the engine asks of a fold: its thinking, its effects, and how its checkpoints are guarded."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiokafka import ConsumerRecord

from tollway.connectors.errors import Fatal
from tollway.streams.batch import Records

Message = tuple[str, int | None, bytes | None, bytes | None, Any]
"""topic, partition, key, value, headers"""
Send = Callable[[list[Message]], Awaitable[None]]


class Unseated(Fatal):
    """This engine may not go on with its partitions: drop it, join the group again, load from the log."""


class NewerFold(Fatal):
    """The log is folded by a version that this build does not know: this worker leaves the partitions to others."""


class Fold(Protocol):
    """One group's thinking and its effects."""

    group: str
    topic: str
    ticks: bool
    fencing: "Fencing | None"
    """Set where the state is no function of the log: the checkpoint with the highest turn counts then."""

    def load(self, partition: int, state: dict[str, Any]) -> Any:
        """A partition's state from its dump. Raises Fatal where it is another log's."""

    async def assigned(self, states: dict[int, Any]) -> None:
        """These partitions are ours from now on."""

    async def revoked(self, partitions: list[int]) -> None:
        """No longer ours."""

    def ready(self, state: Any, stash: list[ConsumerRecord]) -> int:
        """How many of the fetched records can be folded now."""

    async def take(self, state: Any, records: Records) -> Any:
        """Fold records into the state; returns their effects, not yet sent."""

    async def settle(self, effects: list[Any], send: Send) -> None:
        """Send effects and wait for their acknowledgement. Raises Unavailable to be called again with the same."""

    def settled(self, partition: int, state: Any) -> None:
        """All effects of the state up to its offset are acknowledged."""

    async def tend(self, states: dict[int, Any]) -> None:
        """Work that time brings, once a turn."""

    def may_tick(self, state: Any) -> bool:
        """Whether an idle partition with nothing fetched gets a tick."""

    def problems(self) -> dict[int, str]:
        """Partition → why its effects stand still although it is folded; for health."""

    def stats(self, state: Any) -> dict[str, Any]:
        """Small figures for `tollway status`, carried in the checkpoint's header."""


class Fencing(Protocol):
    """Checkpoints that a former owner can no longer write."""

    def bind(self, save: Callable[[int], Awaitable[None]]) -> None:
        """Told once how to save a partition."""

    async def fence(self, partitions: list[int]) -> None:
        """Shut former owners out, before anything is read."""

    async def write_checkpoint(self, number: int, records: list[tuple[bytes, bytes]]) -> None:
        """Append one checkpoint's records. Raises Unseated where they were not taken: somebody else may own the partition."""
