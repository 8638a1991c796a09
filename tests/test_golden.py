"""Golden bytes: what was once written is read to the same values for ever, by both decoders."""

import io
import json
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyruhvro
import pytest

from tollway.schemas import codec

EXAMPLES = Path(codec.__file__).parent / "examples"
GOLDEN = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(EXAMPLES.glob("*.json"))}
golden = pytest.mark.parametrize("example", GOLDEN.values(), ids=GOLDEN.keys())


def as_record(batch: pa.RecordBatch) -> dict[str, Any]:
    """The one row of an Arrow batch as fastavro gives it: times as integers, maps as dictionaries."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        column = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
        value = column[0].as_py()
        columns[name] = dict(value) if pa.types.is_map(column.type) and value is not None else value
    return columns


@golden
def test_fastavro_reads_the_golden_bytes(example: dict[str, Any]) -> None:
    """The single-record decoder reads the pinned bytes to the pinned values."""
    number, record = codec.decode(bytes.fromhex(example["bytes"]))
    assert number == example["schema_id"]
    assert codec.catalogue()[number]["record"] == example["record"]
    assert record == example["value"]


@golden
def test_pyruhvro_reads_the_golden_bytes(example: dict[str, Any]) -> None:
    """The columnar decoder reads the same bytes to the same values, in valid Arrow."""
    value = bytes.fromhex(example["bytes"])
    batch = pyruhvro.deserialize_array([value[5:]], codec.schema_text(example["schema_id"]))
    batch.validate(full=True)
    assert as_record(batch) == example["value"]


@golden
def test_the_same_values_give_the_same_bytes(example: dict[str, Any]) -> None:
    """Encoding the pinned values under their schema id gives the pinned bytes, to the byte."""
    out = io.BytesIO(codec.header(example["schema_id"]))
    out.seek(5)
    fastavro.schemaless_writer(out, codec.parsed(example["schema_id"]), example["value"])
    assert out.getvalue().hex() == example["bytes"]
    if codec.schema_id(example["record"]) == example["schema_id"]:
        assert codec.encode(example["record"], example["value"]).hex() == example["bytes"]


def test_every_version_has_golden_bytes() -> None:
    """No committed version goes without an example, and no example without a version."""
    committed = {number for number, entry in codec.catalogue().items() if not entry.get("void")}
    assert {example["schema_id"] for example in GOLDEN.values()} == committed


def test_the_examples_fill_every_field() -> None:
    """Each field of each version is other than null in some example, so that its bytes are really pinned."""
    filled: dict[int, set[str]] = {}
    for example in GOLDEN.values():
        names = {name for name, value in example["value"].items() if value is not None}
        filled.setdefault(example["schema_id"], set()).update(names)
    for number, names in filled.items():
        assert names == {field["name"] for field in json.loads(codec.schema_text(number))["fields"]}


@golden
def test_one_changed_byte_is_seen(example: dict[str, Any]) -> None:
    """A flipped bit anywhere in the golden bytes reads as other values or not at all: these tests can fail."""
    value = bytes.fromhex(example["bytes"])
    for at in range(len(value)):
        changed = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        try:
            read: object = codec.decode(changed)
        except ValueError:
            continue
        assert read != (example["schema_id"], example["value"])
