"""The generated encoder against fastavro, and its checks against `usage.check`."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollway.schemas import codec, encoder, usage
from tollway.schemas.usage import FieldError, check

IDS = st.from_regex(usage.ID, fullmatch=True)
METERS = st.from_regex(usage.METER, fullmatch=True)
UUIDS = st.from_regex(usage.UUID_HEX, fullmatch=True)
TEXTS = st.text(min_size=1, max_size=64)
LONGS = st.integers(0, 2**62) | st.sampled_from([2**k + d for k in range(3, 62) for d in (-1, 0, 1)])
MONEY = st.tuples(st.integers(0, usage.MONEY_NANO_MAX), TEXTS) | st.just((None, None))


@st.composite
def events(draw: st.DrawFn) -> dict[str, Any]:
    """Valid UsageEvents: every field, optional ones absent, null or set."""
    event: dict[str, Any] = {
        "event_id": draw(UUIDS),
        "source": draw(UUIDS),
        "sequence": draw(LONGS.filter(bool)),
        "occurred_at": draw(LONGS),
        "surface": draw(st.sampled_from(usage.SURFACES)),
        "operation": draw(TEXTS),
        "account": draw(IDS),
        "principal_kind": draw(st.sampled_from(usage.PRINCIPAL_KINDS)),
        "principal": draw(IDS),
        "status": draw(st.sampled_from(usage.STATUSES)),
        "latency_us": draw(st.integers(0, usage.LATENCY_US_MAX)),
        "quantities": {
            "calls": 1,
            **draw(st.dictionaries(METERS, st.integers(0, usage.QUANTITY_MAX), max_size=usage.QUANTITIES_MAX - 1)),
        },
    }
    for name in usage.ID_FIELDS[2:]:
        if draw(st.booleans()):
            event[name] = draw(st.none() | IDS)
    for name in ("rail", "provider", "model"):
        if draw(st.booleans()):
            event[name] = draw(st.none() | TEXTS)
    event["revenue_nano"], event["revenue_asset"] = draw(MONEY)
    event["cost_nano"], event["cost_asset"] = draw(MONEY)
    event["path"] = draw(st.none() | st.lists(IDS, max_size=4))
    event["attributes"] = draw(st.none() | st.dictionaries(TEXTS, st.text(max_size=64), max_size=4))
    return event


@given(events())
def test_equals_fastavro(event: dict[str, Any]) -> None:
    """The generated encoder and fastavro give equal bytes for every valid event, and the fast path takes it."""
    assert encoder._fast(event) == encoder.encode(event) == codec.encode("UsageEvent", event)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=300), st.binary(max_size=8),
    st.just("\ud800"), st.lists(st.integers(), max_size=40), st.dictionaries(st.text(max_size=4), st.text(max_size=4)),
    st.dictionaries(METERS, st.integers(), max_size=40), st.lists(st.text(max_size=4), max_size=40), st.just(("a", "b")),
    st.just({"calls": True}), st.just({"calls": 1.5}), st.just({1: 2}),
)  # fmt: skip


@given(events(), st.sampled_from((*usage.FIELDS, "unheard_of")), JUNK)
def test_refuses_what_check_refuses(event: dict[str, Any], field: str, junk: Any) -> None:
    """With anything at all in one field, encode refuses exactly where `usage.check` does, and else equals fastavro."""
    event[field] = junk
    refused = _refusal(check, event)
    assert _refusal(encoder.encode, event) == refused
    if refused is None:
        assert encoder.encode(event) == codec.encode("UsageEvent", event)


PLAIN: dict[str, Any] = {
    "event_id": "0" * 32, "source": "f" * 32, "sequence": 1, "occurred_at": 0, "surface": "mcp", "operation": "search",
    "account": "acct-1", "principal_kind": "user", "principal": "u", "status": "ok", "latency_us": 0,
    "quantities": {"calls": 1},
}  # fmt: skip
EDGES: list[dict[str, Any]] = [
    {"quantities": {"calls": usage.QUANTITY_MAX}},
    {"quantities": {"calls": usage.QUANTITY_MAX + 1}},
    {"quantities": {"calls": -1}},
    {"quantities": {"calls": True}},
    {"quantities": {"calls": 1.0}},
    {"quantities": {"tokens": 1}},
    {"quantities": {"calls": 1, **{f"m{n}": 1 for n in range(usage.QUANTITIES_MAX - 1)}}},
    {"quantities": {"calls": 1, **{f"m{n}": 1 for n in range(usage.QUANTITIES_MAX)}}},
    {"hold": "h", "sequence": 0},
    {"hold": "h" * 128},
    {"hold": "h" * 129},
    {"sequence": 0},
    {"sequence": 2**62 + 1},
    {"latency_us": usage.LATENCY_US_MAX + 1},
    {"latency_us": True},
    {"revenue_nano": usage.MONEY_NANO_MAX, "revenue_asset": "USD"},
    {"revenue_nano": usage.MONEY_NANO_MAX + 1, "revenue_asset": "USD"},
    {"revenue_nano": 1},
    {"cost_asset": "USD"},
    {"path": ["r"] * usage.PATH_MAX},
    {"path": ["r"] * (usage.PATH_MAX + 1)},
    {"path": ("r", "é")},
    {"attributes": {str(n): "" for n in range(usage.ATTRIBUTES_MAX)}},
    {"attributes": {str(n): "" for n in range(usage.ATTRIBUTES_MAX + 1)}},
    {"attributes": {"k": "é" * 128}},
    {"attributes": {"k": "é" * 129}},
    {"attributes": {"": "v"}},
    {"operation": "é" * 128},
    {"operation": "é" * 129},
    {"operation": ""},
    {"account": "a\n"},
    {"event_id": "0" * 31 + "G"},
    {"surface": "soap"},
    {"colour": "red"},
]


@pytest.mark.parametrize("change", EDGES, ids=lambda change: "-".join(change))
def test_edges(change: dict[str, Any]) -> None:
    """At each bound, and one beyond it, encode and `usage.check` agree: the same words, or fastavro's bytes."""
    event = PLAIN | change
    refused = _refusal(check, event)
    assert _refusal(encoder.encode, event) == refused
    if refused is None:
        assert encoder.encode(event) == codec.encode("UsageEvent", event)


def _refusal(judge: Callable[[dict[str, Any]], object], event: dict[str, Any]) -> str | None:
    try:
        judge(event)
    except FieldError as error:
        return str(error)
    return None


def test_full_caches_are_emptied_and_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache holds at most its maximum, and what is encoded after it was emptied is the same."""
    monkeypatch.setattr(encoder, "CACHED_MAX", 10)
    strings = encoder._Strings(encoder._id, b"\x02", {None: b"\x00"})
    first = [strings[f"id-{n}"] for n in range(25)]
    assert len(strings) <= 10
    assert [strings[f"id-{n}"] for n in range(25)] == first
    assert strings[None] == b"\x00"


def test_every_field_has_a_bound() -> None:
    """A field that usage.avsc gains without a bound in usage.py stops the encoder from being made, by name."""
    with pytest.raises(ValueError, match=r"field colour .* has no bound"):
        encoder._lines("colour", "string", True)
