"""Usage is accepted at each bound and refused one beyond it, with field, value and cure named."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tollway.schemas import codec, usage
from tollway.schemas.usage import FieldError, check

SMALLEST: dict[str, Any] = {
    "event_id": "0" * 32,
    "source": "f" * 32,
    "sequence": 0,
    "occurred_at": 0,
    "surface": "rest",
    "operation": "x",
    "account": "a",
    "principal_kind": "anonymous",
    "principal": "p",
    "status": "ok",
    "latency_us": 0,
    "quantities": {"calls": 0},
}
ID_LONGEST = "A" * 119 + "az09._:@/"
LARGEST: dict[str, Any] = {
    "event_id": "9" * 32,
    "source": "a" * 32,
    "sequence": 2**62,
    "occurred_at": 2**62,
    "surface": "llm",
    "operation": "ü" * 128,
    **dict.fromkeys(usage.ID_FIELDS, ID_LONGEST),
    "principal_kind": "client",
    "status": "payment_required",
    "latency_us": usage.LATENCY_US_MAX,
    "quantities": {"calls": usage.QUANTITY_MAX, **{"m" + "_" * 61 + f"{i:02d}": 0 for i in range(31)}},
    "path": [ID_LONGEST] * usage.PATH_MAX,
    "rail": "r" * 256,
    "revenue_nano": usage.MONEY_NANO_MAX,
    "revenue_asset": "U" * 256,
    "cost_nano": usage.MONEY_NANO_MAX,
    "cost_asset": "U" * 256,
    "provider": "p" * 256,
    "model": "m" * 256,
    "attributes": {f"{i:02d}" + "k" * 254: "v" * 256 for i in range(32)},
}


@pytest.mark.parametrize("event", [SMALLEST, LARGEST], ids=["smallest", "largest"])
def test_usage_at_its_bounds_passes(event: dict[str, Any]) -> None:
    """Every field at its lower bound, and every field at its upper one, is usage; and it travels."""
    check(event)
    number, record = codec.decode(codec.encode("UsageEvent", event))
    assert number == codec.schema_id("UsageEvent")
    assert {name: record[name] for name in event} == event


def test_the_largest_usage_uses_every_field() -> None:
    """No field's upper bound goes untested."""
    assert set(LARGEST) == set(usage.FIELDS)


def more(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    return {name: {**LARGEST[name], **extra}}


WHOLE = "give a whole number from 0 to "
BEYOND: list[tuple[dict[str, Any], str, str, str]] = [
    *[({name: None}, name, "missing", f"{name} is None: it is required") for name in usage.REQUIRED],
    *[({name: "0" * 33}, name, "bad_id", "give a UUIDv7 as 32 hex digits") for name in ("event_id", "source")],
    ({"event_id": "0" * 31}, "event_id", "bad_id", "give a UUIDv7"),
    ({"event_id": "G" * 32}, "event_id", "bad_id", "give a UUIDv7"),
    ({"event_id": int("1" * 32)}, "event_id", "bad_id", "give a UUIDv7"),
    ({"sequence": 2**62 + 1}, "sequence", "over_bound", WHOLE),
    ({"sequence": -1}, "sequence", "negative", "sequence is -1: give a whole number"),
    ({"sequence": True}, "sequence", "bad_value", "give a whole number"),
    ({"sequence": 1.0}, "sequence", "bad_value", "give a whole number"),
    ({"sequence": 0}, "sequence", "hold_unsequenced", "usage with a hold needs a sequence of 1 or more"),
    ({"occurred_at": 2**62 + 1}, "occurred_at", "over_bound", WHOLE),
    ({"occurred_at": -1}, "occurred_at", "negative", WHOLE),
    ({"latency_us": usage.LATENCY_US_MAX + 1}, "latency_us", "over_bound", WHOLE),
    ({"latency_us": -1}, "latency_us", "negative", WHOLE),
    ({"surface": "soap"}, "surface", "bad_value", "surface is 'soap': give one of rest, mcp, agent, llm"),
    ({"principal_kind": "robot"}, "principal_kind", "bad_value", "give one of user, client, anonymous"),
    ({"status": "fine"}, "status", "bad_value", "give one of ok, error"),
    *[({name: "A" * 129}, name, "bad_id", "ids match") for name in usage.ID_FIELDS],
    *[({name: ""}, name, "bad_id", f"{name} is '': ids match") for name in usage.ID_FIELDS],
    *[({name: "a~b"}, name, "bad_id", f"{name} is 'a~b': ids match") for name in usage.ID_FIELDS],
    *[({name: 5}, name, "bad_id", f"{name} is 5: ids match") for name in usage.ID_FIELDS],
    ({"account": "a\n"}, "account", "bad_id", "ids match"),
    ({"account": "ä"}, "account", "bad_id", "ids match"),
    *[({name: "ü" * 128 + "x"}, name, "over_bound", "give 1 to 256 bytes") for name in usage.TEXT_FIELDS],
    *[({name: ""}, name, "over_bound", "give 1 to 256 bytes") for name in usage.TEXT_FIELDS],
    *[({name: 5}, name, "bad_value", f"{name} is 5: give a text") for name in usage.TEXT_FIELDS],
    ({"operation": "\ud800"}, "operation", "bad_value", "no lone surrogates"),
    *[({f"{n}_nano": usage.MONEY_NANO_MAX + 1}, f"{n}_nano", "over_bound", WHOLE) for n in ("revenue", "cost")],
    *[({f"{n}_nano": -1}, f"{n}_nano", "negative", "usage never subtracts") for n in ("revenue", "cost")],
    *[({f"{n}_nano": 0.5}, f"{n}_nano", "bad_value", "is 0.5: give a whole number") for n in ("revenue", "cost")],
    *[({f"{n}_nano": None}, f"{n}_asset", "bad_value", "come together") for n in ("revenue", "cost")],
    *[({f"{n}_asset": None}, f"{n}_asset", "bad_value", "come together") for n in ("revenue", "cost")],
    ({"quantities": {"tokens": 1}}, "quantities", "missing_calls", "the meter `calls` is always there"),
    ({"quantities": {}}, "quantities", "missing_calls", "the meter `calls` is always there"),
    ({"quantities": [("calls", 1)]}, "quantities", "bad_value", "give a map of at most 32 meters"),
    (more("quantities", {"one_more": 0}), "quantities", "over_bound", "quantities is 33: give at most 32 meters"),
    ({"quantities": {"calls": usage.QUANTITY_MAX + 1}}, "quantities.calls", "over_bound", WHOLE),
    ({"quantities": {"calls": -1}}, "quantities.calls", "negative", "quantities.calls is -1"),
    ({"quantities": {"calls": 1.5}}, "quantities.calls", "bad_value", "give a whole number"),
    ({"quantities": {"calls": True}}, "quantities.calls", "bad_value", "give a whole number"),
    ({"quantities": {"calls": 1, "m" * 65: 1}}, "quantities", "bad_id", "meters match"),
    ({"quantities": {"calls": 1, "1m": 1}}, "quantities", "bad_id", "quantities is '1m': meters match"),
    ({"quantities": {"calls": 1, 5: 1}}, "quantities", "bad_id", "quantities is 5: meters match"),
    ({"path": ["r"] * 33}, "path", "over_bound", "path is 33: give at most 32 runs"),
    ({"path": ["r r"]}, "path", "bad_id", "path is 'r r': ids match"),
    ({"path": "run"}, "path", "bad_value", "path is 'run': give a list of at most 32 runs"),
    (more("attributes", {"one more": ""}), "attributes", "over_bound", "attributes is 33: give at most 32 keys"),
    ({"attributes": {"": "v"}}, "attributes", "over_bound", "give 1 to 256 bytes"),
    ({"attributes": {"k" * 257: "v"}}, "attributes", "over_bound", "give 1 to 256 bytes"),
    ({"attributes": {"k": "v" * 257}}, "attributes.k", "over_bound", "give 0 to 256 bytes"),
    ({"attributes": {"k": 5}}, "attributes.k", "bad_value", "attributes.k is 5: give a text"),
    ({"attributes": {5: "v"}}, "attributes", "bad_value", "attributes is 5: give a text"),
    ({"attributes": ["k"]}, "attributes", "bad_value", "give a map of at most 32 keys"),
    ({"opration": "x"}, "opration", "unknown_field", "opration is 'x': fields are event_id, source"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "reason", "sentence"), BEYOND, ids=[f"{row[1]}-{row[2]}-{i}" for i, row in enumerate(BEYOND)]
)
def test_usage_beyond_a_bound_is_refused(change: dict[str, Any], field: str, reason: str, sentence: str) -> None:
    """One step beyond a bound, another type, a field that nobody knows: refused by field, value and cure."""
    with pytest.raises(FieldError) as caught:
        check({**LARGEST, **change})
    assert (caught.value.field, caught.value.reason) == (field, reason)
    assert str(caught.value).startswith(f"{field} is ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", usage.REQUIRED)
def test_a_required_field_must_be_there(name: str) -> None:
    """Leaving a required field out is the same as giving null."""
    with pytest.raises(FieldError) as caught:
        check({key: value for key, value in SMALLEST.items() if key != name})
    assert (caught.value.field, caught.value.reason) == (name, "missing")


def test_a_long_value_is_shown_cut() -> None:
    """A message stays a sentence whatever was given."""
    with pytest.raises(FieldError) as caught:
        check({**SMALLEST, "operation": "x" * 10_000})
    assert len(str(caught.value)) < 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(st.sampled_from([*usage.FIELDS, "other"]), ANYTHING, max_size=4))
def test_whatever_is_given_is_usage_or_a_field_error(change: dict[str, Any]) -> None:
    """No value of any type makes the check raise anything else; what passes it can be encoded."""
    event = {**SMALLEST, **change}
    try:
        check(event)
    except FieldError:
        return
    codec.encode("UsageEvent", event)
