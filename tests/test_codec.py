"""The codec gives back what it was given, frames it as Confluent does, and refuses what it cannot carry."""

import struct
from typing import Any

import pyruhvro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_golden import as_record
from tollway.schemas import codec, command, meter_event, usage
from tollway.schemas.ids import born_ms, uuid7_hex

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def nullable(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of an Avro type, so that a field added tomorrow is tested too."""
    if isinstance(kind, list):
        return nullable(values_of(kind[1]))
    if isinstance(kind, dict) and kind["type"] == "map":
        return st.dictionaries(TEXT, values_of(kind["values"]), max_size=5)
    if isinstance(kind, dict) and kind["type"] == "array":
        return st.lists(values_of(kind["items"]), max_size=5)
    return {"string": TEXT, "long": LONG, "double": st.floats(allow_nan=False), "boolean": st.booleans()}[kind]


def records(name: str) -> st.SearchStrategy[dict[str, Any]]:
    fields = codec.parsed(codec.schema_id(name))["fields"]
    return st.fixed_dictionaries({field["name"]: values_of(field["type"]) for field in fields})


def round_trip(name: str, record: dict[str, Any]) -> None:
    value = codec.encode(name, record)
    assert codec.decode(value) == (codec.schema_id(name), record)
    assert as_record(pyruhvro.deserialize_array([value[5:]], codec.schema_text(codec.schema_id(name)))) == record


@settings(deadline=None)
@given(records("UsageEvent"))
def test_usage_comes_back_as_it_was(record: dict[str, Any]) -> None:
    """Any usage, with any text and any long, is read by both decoders as it was written."""
    round_trip("UsageEvent", record)


@settings(deadline=None)
@given(records("Command"))
def test_a_command_comes_back_as_it_was(record: dict[str, Any]) -> None:
    """Any command is read by both decoders as it was written."""
    round_trip("Command", record)


@settings(deadline=None)
@given(records("MeterEvent"))
def test_a_meter_event_comes_back_as_it_was(record: dict[str, Any]) -> None:
    """Any meter event is read by both decoders as it was written."""
    round_trip("MeterEvent", record)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("UsageEvent", usage.FIELDS),
        ("MeterEvent", tuple(meter_event.MeterEvent.__annotations__)),
        ("Command", ("command_id", "account", "kind", "body", "signed_at")),
    ],
)
def test_the_typed_record_has_the_fields_of_its_schema(name: str, fields: tuple[str, ...]) -> None:
    """The type that code is checked against and the schema that travels name the same fields in the same order."""
    assert tuple(field["name"] for field in codec.parsed(codec.schema_id(name))["fields"]) == fields


COMMAND = {"command_id": "c1", "account": "acme", "kind": "account.open", "body": "{}", "signed_at": 1}


def test_the_header_is_a_zero_and_the_id() -> None:
    """Confluent framing: 0x00, then the id in four bytes, big-endian."""
    value = codec.encode("Command", COMMAND)
    assert value[:5] == struct.pack(">bI", 0, 1_000_001)
    assert codec.header_id(value) == 1_000_001


@pytest.mark.parametrize("value", [b"", b"\x00", b"\x00\x00\x0f\x42", b"\x01\x00\x0f\x42\x41", b"{}"])
def test_foreign_framing_has_no_id(value: bytes) -> None:
    """What is too short or begins otherwise is none of ours, and decoding says so."""
    if len(value) < 5 or value[0]:
        assert codec.header_id(value) is None
    with pytest.raises(ValueError, match="no schema of ours"):
        codec.decode(value)


@pytest.mark.parametrize("number", [0, 1, 999_999, 1_000_255, 1_000_256, 2**32 - 1])
def test_an_unknown_id_is_refused(number: int) -> None:
    """An id that stands in no catalogue of ours is not guessed at."""
    with pytest.raises(ValueError, match="no schema of ours"):
        codec.decode(struct.pack(">bI", 0, number) + b"\x00" * 20)


@settings(deadline=None)
@given(st.integers(5, 17))
def test_a_truncated_record_is_refused(length: int) -> None:
    """A record cut anywhere is an error, never a shorter record."""
    value = codec.encode("Command", COMMAND)
    with pytest.raises(ValueError, match="Command"):
        codec.decode(value[: min(length, len(value) - 1)])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"signed_at": None}, "signed_at"),
        ({"signed_at": "1"}, "signed_at"),
        ({"signed_at": 1.5}, "signed_at"),
        ({"signed_at": 2**63}, "too large"),
        ({"kind": 5}, "kind"),
        ({"kind": b"x"}, "kind"),
        ({"kind": "\ud800"}, "surrogates"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change: dict[str, Any], named: str) -> None:
    """A value of another type, a number out of range, a fraction where a whole belongs, a foreign field: ValueError."""
    with pytest.raises(ValueError, match=named):
        codec.encode("Command", {**COMMAND, **change})


@pytest.mark.parametrize("name", COMMAND)
def test_a_missing_field_is_refused(name: str) -> None:
    """A required field that is not there is named."""
    with pytest.raises(ValueError, match=name):
        codec.encode("Command", {key: value for key, value in COMMAND.items() if key != name})


@settings(deadline=None)
@given(st.integers(0, 2**48 - 1), st.integers(0, 2**74 - 1))
def test_a_uuid7_tells_when_it_was_born(at_ms: int, random_bits: int) -> None:
    """An id carries its millisecond, version 7, the RFC's variant and all its random bits, and sorts by time."""
    minted = uuid7_hex(at_ms, random_bits)
    assert usage.UUID_HEX.fullmatch(minted)
    assert born_ms(minted) == at_ms
    assert minted[12] == "7"
    assert minted[16] in "89ab"
    assert (int(minted[13:16], 16) << 62 | int(minted[16:], 16) & (1 << 62) - 1) == random_bits


EVENT: meter_event.MeterEvent = {
    "epoch": "0-a",
    "account": "acme",
    "n": 1,
    "deployment": "prod",
    "customer": "cus_1",
    "meter": "calls",
    "event_name": "calls",
    "price_ref": None,
    "window_start_s": 3600,
    "flush": 2,
    "part": 0,
    "units": 5,
    "last_occurred_at": 7,
}


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("epoch", "1-b", True),
        ("n", 2, True),
        ("units", 6, True),
        ("last_occurred_at", 8, True),
        ("event_name", "renamed", True),
        ("deployment", "test", False),
        ("account", "other", False),
        ("customer", "cus_2", False),
        ("meter", "tokens", False),
        ("price_ref", "p", False),
        ("window_start_s", 0, False),
        ("flush", 3, False),
        ("part", 1, False),
    ],
)
def test_an_identifier_names_the_delta_and_nothing_else(name: str, other: Any, same: bool) -> None:
    """Stripe's identifier is pinned, changes with each part of the identity, and with no value outside it."""
    pinned = "tw1_ossszgym6mywz3pfzimvqb247sfkog4hoezxj77c"
    assert meter_event.identifier(EVENT) == pinned
    changed: Any = {**EVENT, name: other}
    assert (meter_event.identifier(changed) == pinned) == same
    assert len(pinned) == 44


def test_a_command_body_is_the_same_bytes_however_it_was_written() -> None:
    """Order of keys and layout of the JSON do not change what is signed."""
    first, second = command.parse_body('{"b": 1, "a": "ü"}'), command.parse_body('{"a":"\\u00fc","b":1}')
    assert command.body_text(first) == command.body_text(second) == '{"a":"ü","b":1}'
