"""The folds run again over a stretch of the log: the same code as in the workers, its effects dropped."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import Refused
from tollway.streams.accounts import AccountsFold, think_billing, think_quota
from tollway.streams.audit_fold import AuditFold, think_audit
from tollway.streams.failpoint import Failpoints
from tollway.streams.owned import as_records
from tollway.streams.state import PartitionState


class Row(NamedTuple):
    """One record of the log, as Kafka's client and ClickHouse's copy both have it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class Folds(Protocol):
    """What refolding needs of a fold."""

    def load(self, partition: int, state: dict[str, Any]) -> Any: ...
    def ready(self, state: Any, stash: Any) -> int: ...
    async def take(self, state: Any, records: Any) -> Any: ...


class _Unseen:
    """A view that shows nothing."""

    async def assigned(self, states: dict[int, PartitionState]) -> None: ...
    async def revoked(self, partitions: list[int]) -> None: ...
    def note(self, partition: int, state: PartitionState) -> None: ...


def folds(epoch: str, partitions: int, public_key: str, store: AuditStore) -> dict[str, Folds]:
    """group → its fold, thinking at once instead of over a channel. Nothing is ever settled: `store` stays untouched."""
    return {
        "accounts": AccountsFold(
            epoch, partitions, public_key, _direct(think_quota), _direct(think_billing), _Unseen(), Failpoints()
        ),
        "audit": AuditFold(epoch, partitions, public_key, _direct(think_audit), store, Failpoints()),
    }


async def refold(
    fold: Folds, state: PartitionState, pages: AsyncIterator[Sequence[Row]], points: Sequence[int]
) -> AsyncIterator[int]:
    """Fold on from the state's next offset; yields each of the ascending `points` when the state stands there.

    `pages` are the records from that offset on, in order, one beyond the last point where there is one: it closes the
    block that ends there. Raises Refused where they end before a point.
    """
    stash: list[Row] = []
    for point in points:
        while state.next_offset < point:
            count = min(fold.ready(state, stash), point - state.next_offset)
            if count:
                await fold.take(state, as_records(stash[:count]))
                del stash[:count]
                continue
            page = await anext(pages, None)
            if page is None:
                raise Refused(
                    f"partition {state.partition}: the log ends before offset {point}, at {state.next_offset + len(stash)}: "
                    "rebuild from where it is whole, or restore it"
                )
            stash += page
        yield point


def _direct(think: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    async def at_once(subject: Any) -> Any:
        return think(subject)

    return at_once
