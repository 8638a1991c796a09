"""Admission and de-duplication: each refusal by its name, the same verdicts however the log is cut."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.records import (
    CONFIG,
    NOW_MS,
    PARTITIONS,
    SIGNER,
    account_of,
    command,
    opened,
    raw,
    records,
    source,
    usage,
)
from tollway.connectors.control import Signer
from tollway.connectors.errors import Fatal
from tollway.schemas import codec
from tollway.schemas.usage import FieldError, check
from tollway.streams import bounds
from tollway.streams.batch import ACCEPTED, DUPLICATE, REFUSED, TICK
from tollway.streams.decode import decode_id
from tollway.streams.judge import cut, judge, judge_block
from tollway.streams.state import PartitionState

DAY_MS = 86_400_000
WHOLE = codec.encode("UsageEvent", usage())


def reason(item: Any, state: PartitionState | None = None) -> str:
    """Why one record is refused."""
    batch = judge(state or opened(), records([item]))
    assert batch.verdict[0] == REFUSED, "it was not refused"
    return batch.reasons[0][0]


POISON = {
    "empty": (b"acct-0", b"", (), NOW_MS),
    "oversized": (b"acct-0", WHOLE + b"\0" * 70_000, (), NOW_MS),
    "bad_framing": (b"acct-0", b"{}garbage", (), NOW_MS),
    "unknown_schema": (b"acct-0", b"\0\0\0\0\x07" + WHOLE[5:], (), NOW_MS),
    "undecodable": (account_of(0).encode(), WHOLE[:40], (), NOW_MS),
    "invalid_utf8": (
        account_of(0).encode(),
        WHOLE.replace(b"GET /things", b"GET /\xff\xfe\xff\xff\xff\xff"),
        (),
        NOW_MS,
    ),
    "misrouted": (account_of(1).encode(), codec.encode("UsageEvent", usage(1)), (), NOW_MS),
    "bad_id": raw(usage(principal="al ice")),
    "bad_value": raw(usage(status="fine")),
    "negative": raw(usage(quantities={"calls": 1, "tokens": -5})),
    "over_bound": raw(usage(quantities={"calls": 10**12 + 1})),
    "missing_calls": raw(usage(quantities={"tokens": 1})),
    "hold_unsequenced": raw(usage(hold="h-1", sequence=0)),
    "too_late": raw(usage(occurred_at=(NOW_MS - 34 * DAY_MS - 1) * 1000)),
    "source_expired": raw(usage(source=source(9, NOW_MS - 5 * DAY_MS - 1))),
    "source_ahead": raw(usage(source=source(9, NOW_MS + DAY_MS + 1))),
    "unknown_account": raw(usage(account=account_of(0, 1))),
    "unknown_price": raw(usage(price_ref="p-1", revenue_nano=1, revenue_asset="USD")),
    "unsequenced_age": raw(usage(sequence=0, occurred_at=(NOW_MS - 3_600_000) * 1000)),
    "bad_signature": command(account_of(0), "account.open", {}, signer=Signer(SIGNER._private, "unknown")),
    "stale_command": (
        *command(account_of(0), "account.open", {}, NOW_MS - 600_001)[:3],
        NOW_MS,
    ),
}


@pytest.mark.parametrize("name", POISON)
def test_each_poison_is_refused_by_its_name(name: str) -> None:
    """A record with one fault is refused with the name of that fault."""
    assert reason(POISON[name]) == name


@pytest.mark.parametrize("name", POISON)
def test_poison_does_not_touch_its_neighbours(name: str) -> None:
    """Good records before and behind a poisoned one are accepted."""
    good = [raw(usage(sequence=1)), raw(usage(sequence=2))]
    batches = judge_block(opened(), records([good[0], POISON[name], good[1]]))
    verdicts = [int(verdict) for batch in batches for verdict in batch.verdict]
    assert verdicts == [ACCEPTED, REFUSED, ACCEPTED]


def test_keys_that_read_as_their_accounts_only_one_behind_the_other_are_misrouted() -> None:
    """Keys are compared with accounts record by record, though they are looked at all together."""
    first, second = account_of(0), account_of(0, 1)
    shifted = [
        (first[:-1].encode(), *raw(usage(account=first, sequence=1))[1:]),
        ((first[-1] + second).encode(), *raw(usage(account=second, sequence=2))[1:]),
    ]
    batch = judge(opened(0, first, second), records(shifted))
    assert [batch.reasons[row][0] for row in (0, 1)] == ["misrouted", "misrouted"]


def test_duplicate_map_key_is_refused() -> None:
    """A meter that stands twice in one record is refused: two decoders would bill two sums."""
    value = codec.encode("UsageEvent", usage(quantities={"calls": 1, "tokens": 7}))
    at = value.index(b"\x04\x0acalls")
    doubled = value[:at] + b"\x04\x0acalls\x02\x0acalls\x0e" + value[at + len(b"\x04\x0acalls\x02\x0ctokens\x0e") :]
    assert reason((account_of(0).encode(), doubled, (), NOW_MS)) == "duplicate_key"


def test_a_schema_id_of_ours_that_is_unknown_stops_the_partition() -> None:
    """A newer emitter's record means `deploy workers first`: it is neither skipped nor dead-lettered."""
    with pytest.raises(Fatal, match="deploy workers before emitters"):
        judge(opened(), records([(b"acct-0", b"\0" + (1_000_200).to_bytes(4, "big") + WHOLE[5:], (), NOW_MS)]))


def test_nothing_counts_before_log_open() -> None:
    """Usage in front of log.open is refused; behind it, it is accepted."""
    state = PartitionState(0, PARTITIONS, CONFIG.epoch)
    opening = [
        raw(usage(sequence=1)),
        command("*", "log.open", CONFIG.body()),
        command(account_of(0), "account.open", {}),
        raw(usage(sequence=2)),
    ]
    batches = judge_block(state, records(opening))
    assert [batch.reasons.get(0, ("",))[0] for batch in batches] == ["not_open", "", "", ""]


def test_a_command_counts_once() -> None:
    """The same signed command in the log twice is a duplicate the second time."""
    state, again = opened(), command(account_of(0), "customer.bind", {"customer": "cus_1"})
    assert [int(batch.verdict[0]) for batch in judge_block(state, records([again, again]))] == [ACCEPTED, DUPLICATE]


def test_a_command_with_null_headers_is_refused() -> None:
    """Any producer can write null headers: the command is dead-lettered, the partition goes on."""
    key, value, _, at_ms = command(account_of(0), "account.open", {})
    assert reason((key, value, (("sig", None), ("kid", None)), at_ms)) == "bad_signature"


def test_price_is_recomputed() -> None:
    """Revenue that is not units x unit price of the named version is refused; the right sum is accepted."""
    state = opened()
    judge(state, records([command("*", "price.add", {"price_ref": "p-1", "asset": "USD", "unit_nano": {"tokens": 3}})]))
    priced: dict[str, Any] = {"price_ref": "p-1", "revenue_asset": "USD", "quantities": {"calls": 1, "tokens": 5}}
    assert reason(raw(usage(revenue_nano=14, **priced)), state) == "price_mismatch"
    assert judge(state, records([raw(usage(revenue_nano=15, **priced))])).verdict[0] == ACCEPTED


def test_a_clock_ahead_is_clamped_and_a_held_call_is_not() -> None:
    """Usage from more than a minute ahead counts at append time; with a hold, in the windows the hold names."""
    ahead = (NOW_MS + 120_000) * 1000
    batch = judge(
        opened(),
        records([raw(usage(sequence=1, occurred_at=ahead)), raw(usage(sequence=2, occurred_at=ahead, hold="h"))]),
    )
    assert batch.occurred_us.tolist() == [NOW_MS * 1000, NOW_MS * 1000]
    assert batch.window_us.tolist() == [NOW_MS * 1000, ahead]


def test_a_tick_moves_nothing_but_time() -> None:
    """A tick is accepted, holds no usage, and log time follows it."""
    state = opened()
    batch = judge(state, records([(b"tick", None, (), NOW_MS + 10_000)]))
    assert (batch.kind[0], batch.verdict[0], len(batch.usage)) == (TICK, ACCEPTED, 0)
    assert state.log_time_ms == NOW_MS + 10_000


@given(st.integers(0, 2**32), st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_verdicts_do_not_depend_on_where_batches_are_cut(seed: int, sizes: list[int]) -> None:
    """Duplicates, late and poisoned records get the same verdicts and leave the same state in any batches."""
    rng = random.Random(seed)
    raws: list[Any] = []
    for number in range(80):
        sequence = max(1, number + rng.choice((0, 0, 0, -3, 4)))
        choice = rng.random()
        if choice < 0.08:
            raws.append(POISON[rng.choice(sorted(POISON))])
        elif choice < 0.12:
            raws.append((b"tick", None, (), NOW_MS + number * 500))
        else:
            raws.append(
                raw(usage(sequence=rng.choice((0, sequence)), source=source(rng.randrange(3))), NOW_MS + number * 500)
            )
    whole_state, cut_state = opened(), opened()
    whole = [v for batch in judge_block(whole_state, records(raws)) for v in batch.verdict.tolist()]
    pieces: list[int] = []
    start = 0
    while start < len(raws):
        size = sizes[start % len(sizes)]
        for batch in judge_block(cut_state, records(raws[start : start + size], start)):
            pieces += batch.verdict.tolist()
        start += size
    assert pieces == whole
    assert cut_state.dump() == whole_state.dump()


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "account": st.text(max_size=5) | st.just("a" * 129),
        "principal": st.text(min_size=0, max_size=4),
        "run": st.none() | st.text(max_size=4),
        "operation": st.text(max_size=300),
        "latency_us": st.integers(-2, 10**12 + 2),
        "sequence": st.integers(-2, 3),
        "hold": st.none() | st.just("h"),
        "revenue_nano": st.none() | st.integers(-1, 10**14 + 1),
        "revenue_asset": st.none() | st.just("USD"),
        "path": st.none() | st.lists(st.sampled_from(["r", "", "b d", "x" * 128]), max_size=34),
        "attributes": st.none()
        | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.just("é" * 129), max_size=34),
        "quantities": st.dictionaries(
            st.sampled_from(["calls", "tokens", "Bad", "", "x" * 65]), st.integers(-1, 10**12 + 1), max_size=5
        ),
    },
)
"""Fields inside, at and beyond their bounds."""


@given(FIELDS)
@settings(max_examples=300, deadline=None)
def test_column_checks_pass_nothing_that_the_exact_check_refuses(fields: dict[str, Any]) -> None:
    """What the columns call good, `schemas.usage.check` calls good too, with the same reason where it does not."""
    event = usage(**fields)
    batch = decode_id(codec.schema_id("UsageEvent"), [codec.encode("UsageEvent", event)[5:]])
    try:
        check({**dict.fromkeys(("path", "attributes", "hold", "run", "revenue_nano", "revenue_asset")), **event})
        expected = None
    except FieldError as error:
        expected = error.reason
    found = bounds.fault(batch, 0) if bounds.suspects(batch)[0] else None
    assert (found[0] if found else None) == expected


@given(st.lists(FIELDS, min_size=2, max_size=12), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_row_is_as_suspect_among_others_as_it_is_alone(rows: list[dict[str, Any]], first: int) -> None:
    """Column checks over a batch, or a slice of one, name just the rows that they name one by one."""
    bodies = [codec.encode("UsageEvent", usage(**fields))[5:] for fields in rows]
    batch = decode_id(codec.schema_id("UsageEvent"), bodies)
    alone = [bool(bounds.suspects(decode_id(codec.schema_id("UsageEvent"), [body]))[0]) for body in bodies]
    assert bounds.suspects(batch).tolist() == alone
    assert bounds.suspects(batch.slice(first)).tolist() == alone[first:]


def test_a_batch_ends_at_a_step_and_around_a_command() -> None:
    """Usage, a step later usage, a command: three batches."""
    raws = [
        raw(usage(sequence=1)),
        raw(usage(sequence=2), NOW_MS + 5_000),
        command(account_of(0), "account.open", {}, NOW_MS + 5_000),
    ]
    state, lengths, start = opened(), [], 0
    while start < len(raws):
        rest = records(raws[start:], start)
        lengths.append(cut(state, rest))
        judge(state, rest.part(0, lengths[-1]))
        start += lengths[-1]
    assert lengths == [1, 1, 1]
