"""Refused records → dead.letters: the original bytes, the reason in headers. An effect, never an input (design §4)."""

from typing import Any

from tollway.schemas.topics import DEAD_LETTERS, USAGE
from tollway.streams.batch import Batch
from tollway.streams.fold import Message

HEADER_BYTES_MAX = 512


def dead_letter(epoch: str, batch: Batch, row: int) -> Message:
    """The letter of one refused record; its key is its identity, so a second one replaces the first."""
    records = batch.records
    reason, detail = batch.reasons[row]
    offset = int(records.offsets[row])
    headers = [
        ("reason", reason.encode()),
        ("detail", detail.encode()[:HEADER_BYTES_MAX]),
        ("topic", USAGE.name.encode()),
        ("key", (records.keys[row] or b"")[:HEADER_BYTES_MAX]),
        ("append_ms", str(int(records.append_ms[row])).encode()),
        ("attempts", b"1"),
        *_origin(batch, row),
    ]
    # A null value would be a tombstone; an empty original stays empty.
    return (
        DEAD_LETTERS.name,
        batch.partition,
        letter_key(epoch, batch.partition, offset),
        records.values[row] or b"",
        headers,
    )


def letter_key(epoch: str, partition: int, offset: int) -> bytes:
    """Identity of a dead letter: where its record stands."""
    return f"{epoch}|{partition}|{offset}".encode()


def parse_letter(key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> dict[str, Any]:
    """A letter as people and `--json` read it."""
    epoch, partition, offset = key.decode().split("|")
    texts = {name: text.decode("utf-8", "replace") for name, text in headers}
    return {
        "epoch": epoch,
        "partition": int(partition),
        "offset": int(offset),
        "reason": texts.get("reason", ""),
        "detail": texts.get("detail", ""),
        "key": texts.get("key", ""),
        "append_ms": int(texts.get("append_ms", 0)),
        "source": texts.get("source"),
        "sequence": int(texts["sequence"]) if "sequence" in texts else None,
        "attempts": int(texts.get("attempts", 1)),
        "bytes": len(value),
        "value_hex": value.hex(),
    }


def _origin(batch: Batch, row: int) -> list[tuple[str, bytes]]:
    """Source and sequence where the record decodes: what explains a hole."""
    at = batch.row.searchsorted(row)
    if at == len(batch.row) or batch.row[at] != row:
        return []
    source, sequence = batch.usage.column("source")[int(at)].as_py(), batch.usage.column("sequence")[int(at)].as_py()
    return [("source", source.encode()[:HEADER_BYTES_MAX]), ("sequence", str(sequence).encode())]
