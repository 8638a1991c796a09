"""Where sealed snapshots are found: in `tollway.checkpoints`, and in ClickHouse's copies."""

import asyncio
from dataclasses import replace
from typing import Any

from tollway.connectors.errors import Fatal, Refused, TollwayError
from tollway.connectors.kafka import read_newest
from tollway.connectors.snapshots import SnapshotRow, SnapshotStore
from tollway.schemas.topics import CHECKPOINTS
from tollway.streams.seal import GROUPS, Seal, is_sealed, seals
from tollway.streams.state import FOLD_VERSION


async def kafka_seals(
    bootstrap: str, security: dict[str, Any], epoch: str, partition: int, start: int = 0
) -> list[Seal]:
    """Those of one partition, from an offset of `tollway.checkpoints` on. Raises Unavailable."""
    found = await read_newest(
        bootstrap,
        security,
        CHECKPOINTS.name,
        [partition],
        None,
        starts={partition: start},
        keep=lambda record: is_sealed(record.key),
    )
    return seals(((record.key, record.value) for record in found[partition]), epoch)


def row_of(seal: Seal) -> SnapshotRow:
    """As ClickHouse keeps it."""
    return SnapshotRow(
        seal.epoch,
        seal.group,
        seal.partition,
        seal.day,
        seal.next_offset,
        seal.log_time_ms,
        seal.fold_version,
        seal.hash,
        seal.packed,
    )


def seal_of(row: SnapshotRow) -> Seal:
    """The inverse."""
    return Seal(
        row.group,
        row.epoch,
        row.partition,
        row.day,
        row.next_offset,
        row.log_time_ms,
        row.fold_version,
        row.hash,
        row.state,
    )


class SealSources:
    """Both places as one. ClickHouse may be away: Kafka's are found without it, and `missing` says so."""

    def __init__(self, bootstrap: str, security: dict[str, Any], store: SnapshotStore, epoch: str) -> None:
        self._bootstrap, self._security, self._store, self._epoch = bootstrap, security, store, epoch
        self.missing: str | None = None

    async def of(self, partition: int) -> dict[str, list[Seal]]:
        """group → its snapshots, oldest first; those found only in ClickHouse come without their bytes (see `whole`).

        Raises Refused where the two places disagree about one.
        """
        found: dict[tuple[str, int], Seal] = {}
        for seal in await kafka_seals(self._bootstrap, self._security, self._epoch, partition):
            found[seal.group, seal.day] = seal
        for seal in await self._copies(partition):
            known = found.setdefault((seal.group, seal.day), seal)
            if known.hash != seal.hash:
                raise Refused(
                    f"{seal}: Kafka has hash {known.hash.hex()}, ClickHouse {seal.hash.hex()}: "
                    "find out which is right with `tollway rebuild checkpoints --dry-run --from log`"
                )
        groups: dict[str, list[Seal]] = {}
        for _, seal in sorted(found.items()):
            if seal.fold_version <= FOLD_VERSION:  # a newer version's states are not ours to load
                groups.setdefault(seal.group, []).append(seal)
        return groups

    async def whole(self, seal: Seal) -> Seal:
        """With its bytes. Raises Fatal where they are damaged."""
        if seal.packed:
            return seal
        row = await asyncio.to_thread(self._store.whole, seal.epoch, seal.group, seal.partition, seal.day)
        if row is None:
            raise Fatal(f"{seal}: ClickHouse has lost it meanwhile")
        return replace(seal, packed=row.state)

    async def _copies(self, partition: int) -> list[Seal]:
        try:
            rows = [
                row
                for group in GROUPS
                for row in await asyncio.to_thread(self._store.heads, self._epoch, group, partition)
            ]
        except TollwayError as error:
            self.missing = str(error)
            return []
        return [seal_of(row) for row in rows]
