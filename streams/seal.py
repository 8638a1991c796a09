"""Daily sealed snapshots: a partition's state where log time crosses k · `snapshot_s`, in bytes that only the log decides.

Sealed is the state before the first record of the first step at or past the boundary (group audit: before the block that
holds that record), so whoever folds the log again gets the same bytes. Where several boundaries are crossed at once, the last
one counts, as with flushes. Bytes: msgpack with sorted keys, the quota's buffers as they are before compression, which no
library's version changes; the hash is over them, their compression is not.
"""

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import zstandard

from tollway.connectors.errors import Fatal
from tollway.schemas.topics import CHECKPOINTS
from tollway.streams.checkpoint import SEALED, framed, unframed
from tollway.streams.fold import Message
from tollway.streams.state import PartitionState
from tollway.streams.totals import packed as pack_buffer
from tollway.streams.totals import unpacked as unpack_buffer

FORMAT = 1
GROUPS = ("accounts", "audit")
"""Groups whose state is a function of the log. Group stripe's is not: it has no sealed snapshots."""
KEPT = 14
"""Sealed snapshots of a group and partition that stay in Kafka: each new one deletes the one so many days before it. ClickHouse
keeps copies; one that was not copied in time is given up, and the log gives the same again."""
_BUFFERS = {"keys": 2, "totals": 4, "last": 5}
"""Places in a table's dump (`totals.Table.dump`): key segments, totals, last."""


@dataclass(frozen=True)
class Seal:
    """A sealed snapshot. `day` = floor(step time / snapshot_s); the state stands at `next_offset` and knows `log_time_ms`."""

    group: str
    epoch: str
    partition: int
    day: int
    next_offset: int
    log_time_ms: int
    fold_version: int
    hash: bytes
    packed: bytes

    @property
    def state(self) -> dict[str, Any]:
        """The dump that `PartitionState.load` takes. Raises Fatal where the bytes are not those of the hash."""
        plain = zstandard.ZstdDecompressor().decompress(self.packed)
        if hashlib.sha256(plain).digest() != self.hash:
            raise Fatal(f"{self}: its bytes do not have its hash: take another one (--from)")
        return dump_of(msgpack.unpackb(plain, raw=False, strict_map_key=False))

    @property
    def key(self) -> str:
        """Key of its record in `tollway.checkpoints`."""
        return f"{self.group}|{self.epoch}|{self.partition}|{SEALED}|{self.day}"

    def messages(self) -> list[Message]:
        """Its records, and the deletion of the one that is KEPT days older."""
        body = msgpack.packb([FORMAT, *self.__dict__.values()], use_bin_type=True)
        records = framed(self.key, body)
        old = len(self.key.encode()), replace(self, day=self.day - KEPT).key.encode()
        gone = [(old[1] + key[old[0] :], None) for key, _ in records]
        return [(CHECKPOINTS.name, self.partition, key, value, ()) for key, value in [*records, *gone]]

    def __str__(self) -> str:
        return f"sealed snapshot {self.day} of group {self.group}, partition {self.partition}"


def day_of(state: PartitionState, log_time_ms: int) -> int | None:
    """The last boundary at or before the step of a log time; None before `log.open`."""
    config = state.directory.config
    return None if config is None else state.step_of(log_time_ms) * config.step_s // config.snapshot_s


def crossed(state: PartitionState, log_time_ms: int) -> int | None:
    """The day to seal before log time moves to `log_time_ms`; None where no boundary lies between."""
    before, after = day_of(state, state.log_time_ms), day_of(state, log_time_ms)
    return after if before is not None and after is not None and after > before else None


def canonical(dump: dict[str, Any]) -> bytes:
    """A dump as the bytes that are hashed."""
    data: bytes = msgpack.packb(_sorted(_plain(dump)), use_bin_type=True)
    return data


def sealed(group: str, state: PartitionState, day: int) -> Seal:
    """The state as it stands."""
    plain = canonical(state.dump())
    return Seal(
        group=group,
        epoch=state.epoch,
        partition=state.partition,
        day=day,
        next_offset=state.next_offset,
        log_time_ms=state.log_time_ms,
        fold_version=state.directory.fold_version,
        hash=hashlib.sha256(plain).digest(),
        packed=zstandard.ZstdCompressor(level=3).compress(plain),
    )


async def sealed_aside(group: str, state: PartitionState, day: int) -> Seal:
    """`sealed`, in a thread: a large state takes a second. The caller folds nothing meanwhile."""
    return await asyncio.to_thread(sealed, group, state, day)


def seals(records: Iterable[tuple[bytes | None, bytes | None]], epoch: str) -> list[Seal]:
    """Whole, undamaged and not deleted ones of a log, from (key, value) records in log order; the newest write of each."""
    values: dict[bytes, bytes | None] = {key: value for key, value in records if key is not None and is_sealed(key)}
    found: dict[str, Seal] = {}
    for body in unframed(values.values()):
        version, *fields = msgpack.unpackb(body, raw=False)
        if version == FORMAT and (seal := Seal(*fields)).epoch == epoch:
            found[seal.key] = seal
    return sorted(found.values(), key=lambda seal: (seal.group, seal.partition, seal.day))


def is_sealed(key: bytes | None) -> bool:
    """Whether a key of `tollway.checkpoints` is a sealed snapshot's."""
    return key is not None and key.decode("utf-8", "replace").split("|")[3:4] == [SEALED]


def _sorted(value: Any) -> Any:
    """Maps by ascending key: a dict remembers what came first, which batches decide."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


def _plain(dump: dict[str, Any]) -> dict[str, Any]:
    return _buffers(dump, unpack_buffer)


def dump_of(plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse: what `PartitionState.load` takes."""
    return _buffers(plain, pack_buffer)


def _buffers(dump: dict[str, Any], change: Any) -> dict[str, Any]:
    """A dump with each of the quota's buffers changed."""
    quota = dump["parts"].get("quota")
    if quota is None:
        return dump
    tables = []
    for stored in quota["tables"]:
        table = list(stored)
        table[_BUFFERS["keys"]] = [change(segment) for segment in table[_BUFFERS["keys"]]]
        table[_BUFFERS["totals"]] = change(table[_BUFFERS["totals"]])
        table[_BUFFERS["last"]] = change(table[_BUFFERS["last"]]) if table[_BUFFERS["last"]] else b""
        tables.append(table)
    changed = {**quota, "scopes": [change(segment) for segment in quota["scopes"]], "tables": tables}
    return {**dump, "parts": {**dump["parts"], "quota": changed}}
