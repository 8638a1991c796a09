"""Sealed snapshots in ClickHouse: copies of what stands in `tollway.checkpoints`, kept for as long as the audit log."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import pyarrow as pa

from tollway.connectors.clickhouse import AuditStore

_SCHEMA = pa.schema(
    [
        ("epoch", pa.string()),
        ("fold_group", pa.string()),
        ("kafka_partition", pa.uint16()),
        ("day", pa.uint64()),
        ("next_offset", pa.uint64()),
        ("log_time", pa.timestamp("ms", "UTC")),
        ("fold_version", pa.uint32()),
        ("hash", pa.binary(32)),
        ("state", pa.binary()),
    ]
)
_WHERE = "epoch = {epoch:String} AND fold_group = {fold_group:String} AND kafka_partition = {partition:UInt16}"
_HEAD = "day, next_offset, toUnixTimestamp64Milli(log_time) AS log_time_ms, fold_version, hash"


@dataclass(frozen=True)
class SnapshotRow:
    """A row of `snapshots`; `state` is zstd."""

    epoch: str
    group: str
    partition: int
    day: int
    next_offset: int
    log_time_ms: int
    fold_version: int
    hash: bytes
    state: bytes


class SnapshotStore:
    """Raises as the store does: Unavailable where trying again can help, else Fatal."""

    def __init__(self, store: AuditStore) -> None:
        self._store = store

    def put(self, row: SnapshotRow) -> None:
        """Store one; the same again changes nothing."""
        values = dict(zip(_SCHEMA.names, row.__dict__.values(), strict=True))
        name = f"{row.epoch}|{row.group}|{row.partition}|{row.day}|{row.hash.hex()}"
        self._store.put("snapshots", pa.Table.from_pylist([values], schema=_SCHEMA), sha256(name.encode()).hexdigest())

    def heads(self, epoch: str, group: str, partition: int) -> Sequence[SnapshotRow]:
        """All of a partition, oldest first, without their states."""
        sql = f"SELECT {_HEAD} FROM snapshots FINAL WHERE {_WHERE} ORDER BY day"
        return self._rows(sql, epoch, group, partition)

    def whole(self, epoch: str, group: str, partition: int, day: int) -> SnapshotRow | None:
        """One with its state."""
        sql = f"SELECT {_HEAD}, state FROM snapshots FINAL WHERE {_WHERE} AND day = {{day:UInt64}}"
        rows = self._rows(sql, epoch, group, partition, day=day)
        return rows[0] if rows else None

    def _rows(self, sql: str, epoch: str, group: str, partition: int, **more: int) -> list[SnapshotRow]:
        found = self._store.arrow(sql, epoch=epoch, fold_group=group, partition=partition, **more).to_pylist()
        return [SnapshotRow(epoch, group, partition, **{"state": b"", **row}) for row in found]
