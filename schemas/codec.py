"""Record ⇄ bytes on the wire: Confluent framing (0x00, 4-byte id) around Avro. The only module that knows Avro.

fastavro encodes and decodes single records; workers decode batches straight to Arrow (`tollway.streams.decode`), from the
same `.avsc` text. Both refuse the same bytes only where a test says so: never find poison with the other decoder.
"""

import io
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import fastavro

ID_FIRST, ID_LAST = 1_000_000, 1_000_255
"""Range of our schema ids: an unknown id inside it means a newer emitter, outside it foreign bytes."""

VALUE_BYTES_MAX = 65_536


@cache
def catalogue() -> dict[int, dict[str, Any]]:
    """`ids.json` as {id: {record, version, file, void?}}."""
    text = (Path(__file__).parent / "ids.json").read_text(encoding="utf-8")
    return {int(number): entry for number, entry in json.loads(text).items()}


@cache
def schema_text(schema_id: int) -> str:
    """The `.avsc` text that a schema id names, without doc strings (decoders do not need them)."""
    entry = catalogue()[schema_id]
    return json.dumps(without_doc(json.loads((Path(__file__).parent / entry["file"]).read_text(encoding="utf-8"))))


@cache
def schema_id(record: str) -> int:
    """Newest id of a record name, for encoding."""
    return max(number for number, entry in catalogue().items() if entry["record"] == record and not entry.get("void"))


@cache
def header(schema_id: int) -> bytes:
    """The five bytes in front of a record: 0x00 and the id, big-endian."""
    return struct.pack(">bI", 0, schema_id)


def header_id(value: bytes) -> int | None:
    """Schema id of a framed value; None where the framing is not ours."""
    if len(value) < 5 or value[0] != 0:
        return None
    return int.from_bytes(value[1:5], "big")


@cache
def parsed(schema_id: int) -> Any:
    """fastavro's parsed schema. Timestamps stay integers: the logical type is dropped for reading and writing."""
    return fastavro.parse_schema(_plain(json.loads(schema_text(schema_id))), _force=True)


def encode(record: str, value: dict[str, Any]) -> bytes:
    """Frame and encode one record with its newest schema. Raises ValueError where a field is missing or of another type."""
    number = schema_id(record)
    out = io.BytesIO()
    try:
        fastavro.schemaless_writer(out, parsed(number), value, strict_allow_default=True)
    except (TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"{record} does not fit its schema: {error}") from error
    # The writer cuts 1.5 to 1 where a long belongs, and says nothing.
    out.seek(0)
    back: Any = fastavro.schemaless_reader(out, parsed(number), None)
    for name, given in value.items():
        if back[name] != (list(given) if isinstance(given, tuple) else given):
            raise ValueError(f"{record} does not fit its schema: {name} is {given!r}, would be read as {back[name]!r}")
    return header(number) + out.getvalue()


def decode(value: bytes) -> tuple[int, dict[str, Any]]:
    """(schema id, record) of a framed value. Raises ValueError for foreign framing, an unknown or void id, broken bytes."""
    number = header_id(value)
    if number is None or number not in catalogue() or catalogue()[number].get("void"):
        raise ValueError(f"no schema of ours in header {value[:5]!r}")
    try:
        return number, fastavro.schemaless_reader(io.BytesIO(value[5:]), parsed(number), None)
    except Exception as error:
        raise ValueError(f"{catalogue()[number]['record']}: {type(error).__name__}: {error}") from error


def without_doc(node: Any) -> Any:
    """A schema without its `doc` strings, which no decoder needs."""
    if isinstance(node, dict):
        return {key: without_doc(value) for key, value in node.items() if key != "doc"}
    return [without_doc(item) for item in node] if isinstance(node, list) else node


def _plain(node: Any) -> Any:
    """The schema without logical types: {"type": "long", "logicalType": …} becomes "long"."""
    if isinstance(node, dict):
        if "logicalType" in node:
            return node["type"]
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node
