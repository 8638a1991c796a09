"""A partition's whole state as one record in two alternating slots: written after its effects, loaded by the highest offset.

Several records could be torn by a worker that wakes up after its takeover; whole ones cannot (design §7). A state above one
message's size travels as numbered parts of one write id under the slot, valid only all together.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
import zstandard

FORMAT = 1
PART_BYTES_MAX = 15 * 1024 * 1024
RED_BYTES = 12 * 1024 * 1024
SLOTS = 2
SEALED = "sealed"
"""Stands where a checkpoint's key has its slot, in the keys of sealed snapshots (`streams.seal`)."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was written; `turn` counts writes of the sender, whose state is no function of its log."""

    group: str
    epoch: str
    partition: int
    slot: int
    next_offset: int
    turn: int
    written_ms: int
    fold_version: int
    stats: dict[str, Any]
    packed: bytes
    generation: int = 0
    """How often `tollway rebuild` has put another state in its place: the highest counts, whatever offsets it stands at."""

    @property
    def state(self) -> dict[str, Any]:
        """What the fold dumped; unpacked at each call."""
        plain = zstandard.ZstdDecompressor().decompress(self.packed)
        state: dict[str, Any] = msgpack.unpackb(plain, raw=False, strict_map_key=False)
        return state

    @property
    def size(self) -> int:
        """Bytes of the packed state."""
        return len(self.packed)


def encode(
    *,
    group: str,
    epoch: str,
    partition: int,
    slot: int,
    next_offset: int,
    turn: int,
    written_ms: int,
    fold_version: int,
    stats: dict[str, Any],
    state: dict[str, Any],
    generation: int = 0,
    part_bytes_max: int = PART_BYTES_MAX,
) -> list[tuple[bytes, bytes]]:
    """(key, value) records of one checkpoint: one, or numbered parts where it is larger than a message."""
    head = [group, epoch, partition, slot, next_offset, turn, written_ms, fold_version, stats]
    packed = zstandard.ZstdCompressor(level=1).compress(msgpack.packb(state, use_bin_type=True))
    body = msgpack.packb([*head, packed, generation], use_bin_type=True)
    return framed(f"{group}|{epoch}|{partition}|{slot}", body, part_bytes_max)


def framed(key: str, body: bytes, part_bytes_max: int = PART_BYTES_MAX) -> list[tuple[bytes, bytes]]:
    """A body as (key, value) records that `unframed` takes only whole. The digest covers the head too."""
    digest = hashlib.sha256(body).digest()
    chunks = [body[at : at + part_bytes_max] for at in range(0, len(body), part_bytes_max)]
    return [
        (
            (key + (f"|{number}" if number else "")).encode(),
            msgpack.packb([FORMAT, number, len(chunks), digest, chunk], use_bin_type=True),
        )
        for number, chunk in enumerate(chunks)
    ]


def newest(
    records: Iterable[tuple[bytes, bytes]], group: str, epoch: str, partition: int, *, by_turn: bool = False
) -> Checkpoint | None:
    """The valid checkpoint with the highest offset (`by_turn`: the highest turn) among (key, value) records in log order.

    Damaged, torn and foreign records are passed over: the other slot is there for them.
    """
    prefix = [group, epoch, str(partition)]
    named = ((key.decode("utf-8", "replace").split("|"), value) for key, value in records)
    mine = (value for name, value in named if name[:3] == prefix and name[3:4] != [SEALED])
    valid = [Checkpoint(*msgpack.unpackb(body, raw=False, strict_map_key=False)) for body in unframed(mine)]
    valid = [found for found in valid if (found.group, found.epoch, found.partition) == (group, epoch, partition)]
    return max(
        valid,
        key=lambda found: (found.generation, found.turn if by_turn else found.next_offset, found.written_ms),
        default=None,
    )


def unframed(values: Iterable[bytes | None]) -> list[bytes]:
    """The bodies among records' values that are whole and undamaged."""
    writes: dict[bytes, dict[int, tuple[int, bytes]]] = {}
    for value in values:
        part = _unpack(value) if value else None
        if part is not None:
            number, count, digest, chunk = part
            writes.setdefault(digest, {})[number] = (count, chunk)
    return [body for digest, parts in writes.items() if (body := _assemble(digest, parts)) is not None]


def epochs(records: Iterable[tuple[bytes, bytes]], group: str, partition: int) -> set[str]:
    """Epochs of all checkpoints of a group and partition: to tell `none yet` from `another log's`."""
    names = [key.decode("utf-8", "replace").split("|") for key, _ in records]
    return {name[1] for name in names if len(name) >= 4 and name[0] == group and name[2] == str(partition)}


def _unpack(value: bytes) -> tuple[int, int, bytes, bytes] | None:
    """(part, parts, digest, chunk) of one record; None where it is damaged or of another format."""
    try:
        version, number, count, digest, chunk = msgpack.unpackb(value, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    sound = version == FORMAT and isinstance(number, int) and isinstance(digest, bytes) and isinstance(chunk, bytes)
    return (number, count, digest, chunk) if sound else None


def _assemble(digest: bytes, parts: dict[int, tuple[int, bytes]]) -> bytes | None:
    if 0 not in parts or set(parts) != set(range(parts[0][0])):
        return None
    body = b"".join(parts[number][1] for number in range(len(parts)))
    return body if hashlib.sha256(body).digest() == digest else None
