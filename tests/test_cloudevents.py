"""A CloudEvent becomes usage that admission takes, or is refused by field; its identity is its source and id alone."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollway.connectors.cloudevents import TEXT_MAX, parse, usage_of
from tollway.connectors.principal import Principal
from tollway.schemas import codec
from tollway.schemas.usage import FieldError, check

NOW_US = 1_800_000_000_123_456
CALLER = Principal("client", "svc", "acme", (), ("chat", "GET *"))
EVENT: dict[str, Any] = {
    "specversion": "1.0", "id": "e1", "source": "/svc", "type": "tollway.usage.v1", "time": "2027-01-15T08:00:00.123456Z",
    "data": {"surface": "rest", "operation": "chat", "principal_kind": "user", "principal": "u1", "status": "ok",
             "latency_us": 5, "quantities": {"tokens_in": 7}, "attributes": {"team": "x"}},
}  # fmt: skip


def of(event: Any, caller: Principal = CALLER) -> dict[str, Any]:
    return usage_of(event, caller, NOW_US, {"team"})[0]


def changed(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**EVENT, **fields}.items() if value is not ...}


def data(**fields: Any) -> dict[str, Any]:
    return changed(data={name: value for name, value in {**EVENT["data"], **fields}.items() if value is not ...})


def test_an_event_is_usage_of_the_tokens_account() -> None:
    """Data are the usage's fields, time its beginning to the microsecond, the account the token's; calls is one call."""
    event, value = usage_of(EVENT, CALLER, NOW_US, {"team"})
    assert (event["account"], event["occurred_at"], event["sequence"]) == ("acme", 1_800_000_000_123_456, 0)
    assert event["quantities"] == {"calls": 1, "tokens_in": 7}
    assert codec.decode(value)[1] == event
    check(event)


@given(st.text(min_size=1, max_size=TEXT_MAX), st.text(min_size=1, max_size=TEXT_MAX), st.integers(0, 3_000))
def test_identity_is_source_and_id_within_an_account(source: str, id_: str, ago_s: int) -> None:
    """The same source and id are the same event_id, whatever else is said and whenever; another account's never is."""
    at = datetime.fromtimestamp(1_800_000_000 - ago_s, UTC).isoformat()
    one, again = changed(source=source, id=id_), {**data(latency_us=9), "source": source, "id": id_, "time": at}
    assert of(one)["event_id"] == of(again)["event_id"]
    assert of(one)["event_id"] != of(one, CALLER._replace(account="other"))["event_id"]
    assert of(one)["event_id"] != of(changed(source=source, id=id_ + "x"))["event_id"] or len(id_) == TEXT_MAX


REFUSED: list[tuple[Any, str, str]] = [
    ([], "event", "bad_event"),
    *[(changed(**{name: value}), name, "bad_event") for name in ("id", "source", "type", "specversion") for value in (..., "", 5, "x" * 513)],
    (changed(specversion="0.3"), "specversion", "bad_event"),
    (changed(type="tollway.usage.v2"), "type", "bad_event"),
    (changed(datacontenttype="text/xml"), "datacontenttype", "bad_event"),
    (changed(data=...), "data", "bad_event"),
    (changed(data=[]), "data", "bad_event"),
    *[(changed(time=text), "time", "bad_time") for text in (..., 5, "soon", "2027-01-15", "2027-01-15T08:00:00", "2027-01-15 08:00:00Z")],
    (changed(time="2027-01-15T07:00:00Z"), "time", "unsequenced_age"),
    (changed(time="2027-01-15T08:00:31Z"), "time", "unsequenced_age"),
    *[(data(**{name: "x"}), f"data.{name}", "unknown_field") for name in ("event_id", "sequence", "hold", "occurred_at", "colour")],
    (data(account="other"), "data.account", "other_account"),
    (data(operation="delete"), "data.operation", "forbidden_operation"),
    (data(attributes={"prompt": "x"}), "data.attributes", "forbidden_attribute"),
    (data(operation=...), "operation", "missing"),
    (data(operation=["chat"]), "operation", "bad_value"),
    (data(quantities=[]), "quantities", "bad_value"),
    (data(quantities={"tokens_in": -1}), "quantities.tokens_in", "negative"),
    (data(quantities={"tokens_in": 1.5}), "quantities.tokens_in", "bad_value"),
    (data(principal="a b"), "principal", "bad_id"),
    (data(attributes=["team"]), "attributes", "bad_value"),
    (data(model="\ud800"), "model", "bad_value"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "field", "reason"), REFUSED)
def test_what_no_one_could_bill_is_refused_by_field(event: Any, field: str, reason: str) -> None:
    """Each wrong field is named with its reason."""
    with pytest.raises(FieldError) as caught:
        of(event)
    assert (caught.value.field, caught.value.reason) == (field, reason)


def test_a_null_is_a_missing_field() -> None:
    """JSON's null says nothing: optional fields stay null, quantities are one call, the account is the token's."""
    event = of(data(agent=None, quantities=None, account=None))
    assert (event["agent"], event["quantities"], event["account"]) == (None, {"calls": 1}, "acme")


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", b'"\\ud800'])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    """Numbers that JSON lacks, a name twice, depth without end and bytes that are no text are one clear error."""
    with pytest.raises(FieldError) as caught:
        parse(body)
    assert caught.value.reason == "bad_json"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*EVENT, *EVENT["data"], "x"]), inner, max_size=5)
        ),
        max_leaves=12,
    )
)
def test_anything_is_usage_or_a_field_error(found: Any) -> None:
    """Whatever JSON holds, in whichever place, ends as usage or as one kind of error."""
    for event in (found, changed(data=found), data(quantities=found), data(attributes=found), changed(time=found)):
        try:
            usage, _ = usage_of(json.loads(json.dumps(event)), CALLER, NOW_US, {"team"})
        except FieldError:
            continue
        check(usage)
