"""Billing: sums to the unit, one delta a window and flush, the same effects however the log is cut."""

from collections import Counter
from dataclasses import dataclass, field

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tollway.schemas import codec
from tollway.schemas.command import LogConfig
from tollway.schemas.meter_event import UNITS_MAX, MeterEvent, identifier
from tollway.schemas.usage import QUANTITY_MAX
from tollway.streams.batch import RECORDS_MAX, Batch, Records
from tollway.streams.billing import WAIT_S, Billing
from tollway.streams.decode import decode_id, usage_ids
from tollway.streams.directory import Account, Directory

WINDOW_S, GRACE_S, STEP_S = 60, 30, 5
T0 = 1_800_000_000
METERS = {"calls": "api_calls", "tokens": "llm_tokens", "seconds": None}


@dataclass
class Use:
    """One record of the log: accepted usage unless `accepted` says otherwise, or a bind."""

    account: str = "a1"
    at_s: int = T0
    quantities: dict[str, int] = field(default_factory=lambda: {"calls": 1})
    status: str = "ok"
    rail: str | None = None
    price_ref: str | None = None
    accepted: bool = True


@dataclass
class Bind:
    account: str
    customer: str


Record = Use | Bind


def directory(**customers: str | None) -> Directory:
    """A directory with the meters above and these accounts."""
    known = Directory()
    known.config = LogConfig("0", "test", "k", "p", step_s=STEP_S, billing_window_s=WINDOW_S, billing_grace_s=GRACE_S)
    known.meters = dict(METERS)
    known.accounts = {name: Account(customer=customer) for name, customer in customers.items()}
    return known


def batch(uses: list[Use]) -> Batch:
    """Usage as the engine hands it over: decoded from real bytes, and judged."""
    count = len(uses)
    usage = decode_id(usage_ids()[-1], [_bytes(use) for use in uses])
    occurred_us = usage.column("occurred_at").cast(pa.int64()).to_numpy()
    return Batch(
        partition=0,
        step=0,
        log_time_ms=0,
        records=Records(np.arange(count), np.zeros(count, np.int64), [None] * count, [None] * count, [()] * count),
        kind=np.zeros(count, np.uint8),
        verdict=np.zeros(count, np.uint8),
        reasons={},
        usage=usage,
        row=np.arange(count),
        accepted=np.array([use.accepted for use in uses], bool),
        occurred_us=occurred_us,
        window_us=occurred_us,
        schema_ids=np.full(count, usage_ids()[-1], np.uint32),
    )


def _bytes(use: Use) -> bytes:
    event = {
        "event_id": "0" * 32,
        "source": "0" * 32,
        "sequence": 1,
        "occurred_at": use.at_s * 1_000_000 + 5,
        "surface": "rest",
        "operation": "GET /",
        "account": use.account,
        "principal_kind": "user",
        "principal": "u",
        "status": use.status,
        "latency_us": 1,
        "quantities": use.quantities,
        "rail": use.rail,
        "price_ref": use.price_ref,
    }
    return codec.encode("UsageEvent", event)[5:]


def fold(billing: Billing, known: Directory, *uses: Use) -> None:
    billing.fold(known, batch(list(uses)))


def flushed(events: list[MeterEvent]) -> list[tuple[object, ...]]:
    """What a delta says, without what every one of them has."""
    return [
        (e["account"], e["n"], e["customer"], e["meter"], e["price_ref"], e["window_start_s"] - T0, e["units"])
        for e in events
    ]


def close(billing: Billing, known: Directory, windows: int) -> list[MeterEvent]:
    """The flush of the `windows` first windows after T0."""
    return billing.on_step(known, T0 + windows * WINDOW_S + GRACE_S)


def test_one_delta_for_each_customer_meter_price_and_window() -> None:
    """Units are summed by customer, meter, price and usage window; deltas come in order and are numbered an account."""
    billing, known = Billing(), directory(a1="cus_1", a2="cus_2")
    fold(
        billing,
        known,
        Use("a2", T0 + 1, {"calls": 1, "tokens": 7}),
        Use("a1", T0 + 1, price_ref="gold"),
        Use("a1", T0 + 59, {"calls": 2}),
        Use("a1", T0 + 60, {"calls": 4, "seconds": 9}),
        Use("a1", T0 + 2, {"calls": 3}),
    )
    assert flushed(close(billing, known, 2)) == [
        ("a1", 1, "cus_1", "calls", None, 0, 5),
        ("a1", 2, "cus_1", "calls", None, 60, 4),
        ("a1", 3, "cus_1", "calls", "gold", 0, 1),
        ("a2", 1, "cus_2", "calls", None, 0, 1),
        ("a2", 2, "cus_2", "tokens", None, 0, 7),
    ]


def test_a_delta_carries_its_identity_and_its_newest_call() -> None:
    """A delta names deployment, event name and flush, and the largest occurred_at of its units."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(billing, known, Use(at_s=T0 + 40), Use(at_s=T0 + 50), Use(at_s=T0 + 55, quantities={"calls": 0}))
    fold(billing, known, Use(at_s=T0 + 45))
    (event,) = close(billing, known, 1)
    assert event == {
        "epoch": "0",
        "account": "a1",
        "n": 1,
        "deployment": "test",
        "customer": "cus_1",
        "meter": "calls",
        "event_name": "api_calls",
        "price_ref": None,
        "window_start_s": T0,
        "flush": T0 // WINDOW_S + 1,
        "part": 0,
        "units": 3,
        "last_occurred_at": (T0 + 50) * 1_000_000 + 5,
    }


def test_what_is_not_invoiced_is_not_counted() -> None:
    """Refused records, other statuses than ok, usage paid by another rail and meters without event name bill nothing."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(
        billing,
        known,
        Use(accepted=False),
        Use(status="error"),
        Use(status="denied"),
        Use(rail="x402"),
        Use(quantities={"calls": 0, "seconds": 5, "unknown": 1}),
    )
    assert close(billing, known, 1) == []


def test_a_window_is_flushed_after_its_grace_and_once() -> None:
    """Nothing goes out before window end + grace; the next step of the same flush sends nothing more."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(billing, known, Use())
    assert billing.on_step(known, T0 + WINDOW_S + GRACE_S - STEP_S) == []
    assert len(billing.on_step(known, T0 + WINDOW_S + GRACE_S)) == 1
    fold(billing, known, Use())
    assert billing.on_step(known, T0 + WINDOW_S + GRACE_S + STEP_S) == []


def test_late_usage_is_a_later_delta_with_another_identity() -> None:
    """Usage of a window that was flushed goes out with the next flush, under another identifier."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(billing, known, Use())
    first = close(billing, known, 1)
    fold(billing, known, Use(quantities={"calls": 3}))
    late = close(billing, known, 2)
    assert flushed(first + late) == [
        ("a1", 1, "cus_1", "calls", None, 0, 1),
        ("a1", 2, "cus_1", "calls", None, 0, 3),
    ]
    assert identifier(first[0]) != identifier(late[0])


def test_of_several_flushes_that_passed_only_the_last_happens() -> None:
    """After a silence of five windows one flush sends all that ended, with the newest flush's number."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(billing, known, Use(), Use(at_s=T0 + 61))
    assert {event["flush"] for event in close(billing, known, 5)} == {T0 // WINDOW_S + 5}
    assert close(billing, known, 5) == []


def test_units_wait_for_a_customer_and_join_those_after_the_bind() -> None:
    """Units of an unbound account wait in sight; the first flush after the bind sends one delta a window, not two."""
    billing, known = Billing(), directory(a1=None)
    fold(billing, known, Use(), Use(at_s=T0 + 61))
    assert close(billing, known, 1) == []
    assert billing.unbound() == {"a1": {"calls": 2}}
    known.accounts["a1"].customer = "cus_1"
    fold(billing, known, Use(at_s=T0 + 62))
    assert flushed(close(billing, known, 2)) == [
        ("a1", 1, "cus_1", "calls", None, 0, 1),
        ("a1", 2, "cus_1", "calls", None, 60, 2),
    ]
    assert billing.unbound() == {}


def test_units_stay_with_the_customer_of_their_time() -> None:
    """After a second bind, what was folded before it is still the first customer's."""
    billing, known = Billing(), directory(a1="cus_1")
    fold(billing, known, Use())
    known.accounts["a1"].customer = "cus_2"
    fold(billing, known, Use())
    assert [(e["customer"], e["units"]) for e in close(billing, known, 1)] == [("cus_1", 1), ("cus_2", 1)]


def test_units_that_nobody_was_bound_for_expire_in_sight() -> None:
    """A window that no invoice can take any more is counted as expired: it does not wait for ever, nor vanish."""
    billing, known = Billing(), directory(a1=None)
    fold(billing, known, Use(quantities={"calls": 5}))
    windows = WAIT_S // WINDOW_S + 1
    close(billing, known, windows - 1)
    assert billing.unbound() == {"a1": {"calls": 5}}
    close(billing, known, windows)
    assert (billing.unbound(), billing.expired) == ({}, {"a1": {"calls": 5}})
    assert Billing.load(billing.dump()).expired == {"a1": {"calls": 5}}


@pytest.mark.parametrize("units", [UNITS_MAX - 1, UNITS_MAX, UNITS_MAX + 1, 2 * UNITS_MAX, 2 * UNITS_MAX + 1])
def test_a_delta_with_more_digits_than_the_rail_takes_goes_out_in_parts(units: int) -> None:
    """Parts are at most UNITS_MAX, add up to the delta, and differ in identity."""
    billing, known = Billing(), directory(a1="cus_1")
    whole, rest = divmod(units, QUANTITY_MAX)
    fold(billing, known, *[Use(quantities={"calls": QUANTITY_MAX})] * whole, Use(quantities={"calls": rest}))
    events = close(billing, known, 1)
    assert len(events) == -(-units // UNITS_MAX)
    assert sum(event["units"] for event in events) == units
    assert max(event["units"] for event in events) <= UNITS_MAX
    assert [event["n"] for event in events] == list(range(1, len(events) + 1))
    assert len({identifier(event) for event in events}) == len(events)


def test_sums_hold_beyond_int64() -> None:
    """A full batch of the largest quantities, folded until the sum leaves int64, is exact, also across a restart."""
    billing, known = Billing(), directory(a1="cus_1")
    full = batch([Use(quantities={"calls": QUANTITY_MAX})] * RECORDS_MAX)
    times = 2**63 // (RECORDS_MAX * QUANTITY_MAX) + 1
    for _ in range(times):
        billing.fold(known, full)
    restarted = Billing.load(msgpack.unpackb(msgpack.packb(billing.dump())))
    assert restarted.unbound() == {}
    total = sum(event["units"] for event in close(restarted, known, 1))
    assert total == times * RECORDS_MAX * QUANTITY_MAX > 2**63


def test_a_slice_of_a_decoded_batch_counts_its_own_rows() -> None:
    """Arrow slices share the parent's quantities; only the slice's own are counted."""
    known = directory(a1="cus_1")
    whole = batch([Use(quantities={"calls": 10**at, **({"tokens": 7} if at < 2 else {})}) for at in range(6)])
    whole.usage, whole.occurred_us = whole.usage.slice(2, 3), whole.occurred_us[2:5]
    for accepted, units in (([True, True, True], 11_100), ([True, False, True], 10_100)):
        billing, whole.accepted = Billing(), np.array(accepted)
        billing.fold(known, whole)
        assert [event["units"] for event in close(billing, known, 1)] == [units]


ACCOUNTS = ("a1", "a2", "a3")
uses = st.builds(
    Use,
    account=st.sampled_from(ACCOUNTS),
    at_s=st.sampled_from([T0 - 100, T0, T0 + 1, T0 + 59, T0 + 60, T0 + 119, T0 + 300]),
    quantities=st.fixed_dictionaries(
        {"calls": st.integers(0, 3)}, optional={"tokens": st.integers(0, QUANTITY_MAX), "seconds": st.integers(0, 9)}
    ),
    status=st.sampled_from(["ok", "ok", "ok", "error"]),
    rail=st.sampled_from([None, None, "x402"]),
    price_ref=st.sampled_from([None, "gold"]),
    accepted=st.sampled_from([True, True, True, False]),
)
binds = st.builds(Bind, account=st.sampled_from(ACCOUNTS), customer=st.sampled_from(["cus_1", "cus_2"]))
steps_ahead = st.sampled_from([0, 0, 0, 1, 2, 7, 12, 40])
logs = st.lists(st.tuples(steps_ahead, st.one_of(uses, uses, uses, uses, binds)), max_size=40)


def run(log: list[tuple[int, Record]], cuts: set[int], restarts: set[int]) -> tuple[list[MeterEvent], bytes, Billing]:
    """Fold a log as the engine does: batches end at steps, at commands and at `cuts`; a restart loads the last dump."""
    billing, known, step, waiting = Billing(), directory(a1="cus_9", a2=None, a3=None), T0 // STEP_S, list[Use]()
    effects = list(billing.on_step(known, step * STEP_S))
    for at, (ahead, record) in enumerate(log):
        if waiting and (ahead or isinstance(record, Bind) or at in cuts):
            fold(billing, known, *waiting)
            waiting = []
        if at in restarts and not waiting:
            billing = Billing.load(msgpack.unpackb(msgpack.packb(billing.dump())))
        if ahead:
            step += ahead
            effects += billing.on_step(known, step * STEP_S)
        if isinstance(record, Bind):
            known.accounts[record.account].customer = record.customer
        else:
            waiting.append(record)
    if waiting:
        fold(billing, known, *waiting)
    return effects, msgpack.packb(billing.dump()), billing


@settings(max_examples=200, deadline=None)
@given(log=logs, cuts=st.sets(st.integers(0, 40)), restarts=st.sets(st.integers(0, 40)))
def test_effects_and_state_do_not_depend_on_cuts_or_restarts(
    log: list[tuple[int, Record]], cuts: set[int], restarts: set[int]
) -> None:
    """One log, cut and restarted anywhere, has the same deltas and leaves the same bytes."""
    effects, state, _ = run(log, set(), set())
    assert run(log, cuts, restarts)[:2] == (effects, state)
    assert run(log, set(range(41)), set())[:2] == (effects, state)


@settings(max_examples=200, deadline=None)
@given(log=logs)
def test_every_billable_unit_is_in_exactly_one_delta_or_still_waits(log: list[tuple[int, Record]]) -> None:
    """Units folded one by one in plain Python equal the deltas plus what a last bind and flush bring out."""
    effects, _, billing = run(log, set(), set())
    known = directory(a1="cus_9", a2="cus_9", a3="cus_9")
    events = effects + billing.on_step(known, T0 + 10_000 * STEP_S)
    expected = Counter[tuple[str, str, str | None, int]]()
    for _, use in log:
        if isinstance(use, Use) and use.accepted and use.status == "ok" and use.rail is None:
            for meter, units in use.quantities.items():
                if METERS[meter]:
                    expected[use.account, meter, use.price_ref, use.at_s // WINDOW_S * WINDOW_S] += units
    billed = Counter[tuple[str, str, str | None, int]]()
    for event in events:
        billed[event["account"], event["meter"], event["price_ref"], event["window_start_s"]] += event["units"]
        assert event["window_start_s"] == event["last_occurred_at"] // 1_000_000 // WINDOW_S * WINDOW_S
    assert billed == +expected
    assert len({identifier(event) for event in events}) == len(events)
    for account in ACCOUNTS:
        numbers = [event["n"] for event in events if event["account"] == account]
        assert numbers == list(range(1, len(numbers) + 1))
