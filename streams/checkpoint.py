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


@dataclass(frozen=True)
class Checkpoint:
    """A decoded checkpoint: `state` is what the fold dumped; `turn` counts writes of the sender, whose state is no function of its log."""

    group: str
    epoch: str
    partition: int
    slot: int
    next_offset: int
    turn: int
    written_ms: int
    stats: dict[str, Any]
    state: dict[str, Any]
    size: int


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
) -> list[tuple[bytes, bytes]]:
    """(key, value) records of one checkpoint: one, or numbered parts where it is larger than a message."""
    packed = msgpack.packb(state, use_bin_type=True)
    body = zstandard.ZstdCompressor(level=1).compress(packed)
    digest = hashlib.sha256(body).digest()
    chunks = [body[at : at + PART_BYTES_MAX] for at in range(0, len(body), PART_BYTES_MAX)]
    records = []
    for number, chunk in enumerate(chunks):
        header = {
            "format": FORMAT,
            "group": group,
            "epoch": epoch,
            "partition": partition,
            "slot": slot,
            "next_offset": next_offset,
            "turn": turn,
            "written_ms": written_ms,
            "fold_version": fold_version,
            "stats": stats,
            "part": number,
            "parts": len(chunks),
            "digest": digest,
            "body": chunk,
        }
        key = f"{group}|{epoch}|{partition}|{slot}" + (f"|{number}" if number else "")
        records.append((key.encode(), msgpack.packb(header, use_bin_type=True)))
    return records


def newest(
    records: Iterable[tuple[bytes, bytes]], group: str, epoch: str, partition: int, *, by_turn: bool = False
) -> Checkpoint | None:
    """The valid checkpoint with the highest offset (`by_turn`: the highest turn) among (key, value) records in log order.

    Damaged, torn and foreign records are passed over: the other slot is there for them.
    """
    writes: dict[bytes, dict[int, dict[str, Any]]] = {}
    for key, value in records:
        name = key.decode("utf-8", "replace").split("|")
        if name[:3] != [group, epoch, str(partition)] or not value:
            continue
        header = _unpack(value)
        if header is not None and header["format"] == FORMAT:
            writes.setdefault(header["digest"], {})[header["part"]] = header
    valid = [found for parts in writes.values() if (found := _assemble(parts)) is not None]
    return max(valid, key=lambda found: (found.turn if by_turn else found.next_offset, found.written_ms), default=None)


def epochs(records: Iterable[tuple[bytes, bytes]], group: str, partition: int) -> set[str]:
    """Epochs of all checkpoints of a group and partition: to tell `none yet` from `another log's`."""
    names = [key.decode("utf-8", "replace").split("|") for key, _ in records]
    return {name[1] for name in names if len(name) >= 4 and name[0] == group and name[2] == str(partition)}


def _unpack(value: bytes) -> dict[str, Any] | None:
    try:
        header = msgpack.unpackb(value, raw=False)
    except (ValueError, msgpack.UnpackException):
        return None
    return header if isinstance(header, dict) and "digest" in header and "body" in header else None


def _assemble(parts: dict[int, dict[str, Any]]) -> Checkpoint | None:
    head = parts.get(0)
    if head is None or set(parts) != set(range(head["parts"])):
        return None
    body = b"".join(parts[number]["body"] for number in range(head["parts"]))
    if hashlib.sha256(body).digest() != head["digest"]:
        return None
    state = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(body), raw=False, strict_map_key=False)
    names = ("group", "epoch", "partition", "slot", "next_offset", "turn", "written_ms", "stats")
    return Checkpoint(**{name: head[name] for name in names}, state=state, size=len(body))
