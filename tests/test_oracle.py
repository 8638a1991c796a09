"""The oracle is right about small logs worked out by hand, and sees every single unit that goes astray."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.load import METERS, PRICES, emitted_fields, opening, traffic, world
from tests.load_poison import Forge, Raw, closed_hole, poisons, source_id, unsequenced
from tests.oracle import Actual, judge
from tests.oracle_book import DAY, HOUR, stripe_identifier, window_end, window_start
from tests.oracle_fold import Oracle, Sequences
from tests.oracle_journal import Journal, JournalLines, check_journals
from tests.oracle_paper import Paper, faithful
from tests.oracle_wire import Refused, lane
from tests.raw_writer import shuffled

T0 = 1_800_000_000_000
"""A step boundary: ms, divisible by 10 s."""


def opened(accounts: dict[str, str | None]) -> Paper:
    """Two partitions, all meters and prices, accounts bound to the customers given."""
    paper = Paper(2, T0)
    for meter, name in METERS.items():
        paper.command("*", "meter.add", {"meter": meter, "event_name": name})
    for reference, price in PRICES.items():
        paper.command("*", "price.add", {"price_ref": reference, **price})
    for account, customer in accounts.items():
        paper.command(account, "account.open", {})
        if customer:
            paper.command(account, "customer.bind", {"customer": customer})
    return paper


def folded(paper: Paper) -> Oracle:
    oracle = Oracle(paper.partitions)
    oracle.feed(paper.records)
    return oracle


def test_counts_and_bills_a_log_worked_out_by_hand() -> None:
    """Two calls of one window, one error, one late: the totals and deltas are those of the sum on paper."""
    paper = opened({"acme": "cus_1"})
    forge = Forge("acme", T0 * 1000)
    paper.now_ms = T0 + 1_000
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000, quantities={"calls": 2, "tokens_in": 50}))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000 + 900_000, quantities={"calls": 3, "compute_ms": 9}))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000, status="error"))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000, status="denied"))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000, rail="x402"))
    paper.tick(14)
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000 + 1, quantities={"calls": 7}))
    paper.tick(10)
    book = folded(paper).book
    hour = T0 // 1000 - T0 // 1000 % HOUR
    assert book.used["acme", "acct", "calls", "h", hour] == 2 + 3 + 1 + 1 + 7
    assert book.used["acme", "user:eve", "calls", "M", window_start("M", hour)] == 14
    assert not [total for total in book.used if total[2] != "calls"], "the default counts calls alone"
    first, second = (T0 // 1000 + 10) // 10, (T0 // 1000 + 20) // 10
    units = {identifier: delta.units for identifier, delta in book.deltas.items()}
    key = ("acme", "cus_1", "calls", "", T0 // 1000)
    assert units == {
        stripe_identifier("paper", key, first, 0): 5,
        stripe_identifier("paper", ("acme", "cus_1", "tokens_in", "", T0 // 1000), first, 0): 50,
        stripe_identifier("paper", key, second, 0): 7,
    }


def test_units_of_an_unbound_account_wait_for_the_bind() -> None:
    """What was used before the bind is billed to the customer by the first flush after it."""
    paper = opened({"acme": None})
    paper.raw(Forge("acme", T0 * 1000).raw("accepted"))
    paper.tick(60)
    assert not folded(paper).book.deltas
    paper.command("acme", "customer.bind", {"customer": "cus_9"})
    assert folded(paper).still_open() == 1
    paper.tick(10)
    oracle = folded(paper)
    assert [(delta.customer, delta.units) for delta in oracle.book.deltas.values()] == [("cus_9", 1)]
    assert not oracle.still_open()


def test_times_decide_the_windows() -> None:
    """Late usage counts an hour before append, held usage where it happened, ahead of the clock at append time."""
    paper = opened({"acme": None})
    forge = Forge("acme", T0 * 1000)
    two_days = 2 * DAY * 10**6
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000 - two_days))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000 - two_days, hold="h1", principal="held"))
    paper.raw(forge.raw("accepted", occurred_at=T0 * 1000 + HOUR * 10**6, principal="ahead"))
    used = folded(paper).book.used
    now_s = T0 // 1000
    assert used["acme", "user:eve", "calls", "m", now_s - HOUR] == 1
    assert used["acme", "user:held", "calls", "d", window_start("d", now_s - 2 * DAY)] == 1
    assert ("acme", "user:held", "calls", "m", window_start("m", now_s - 2 * DAY)) not in used, "kept two hours only"
    assert used["acme", "user:ahead", "calls", "m", now_s] == 1


def test_every_poison_is_refused_for_its_own_reason() -> None:
    """Each record of the poison cabinet becomes a dead letter with the reason that it carries."""
    paper = opened({"acme": None})
    paper.now_ms += 1_000
    found = {}
    for raw in poisons("acme", "stranger", paper.now_ms * 1000, paper.sign, paper.forge):
        found[paper.raw(raw)] = raw.want
    book = folded(paper).book
    assert {at: book.dead.get(at) for at in found} == found
    assert not book.rows


def test_sequences_are_taken_once_in_any_order() -> None:
    """High and holes: out of order is new, again is a duplicate, a hole that had to close is said to be closed."""
    paper = opened({"acme": None})
    wants = {}
    for raw in [*closed_hole("acme", T0 * 1000), *unsequenced("acme", T0 * 1000, 9)]:
        wants[paper.raw(raw)] = raw.want
    book = folded(paper).book
    assert {at: book.verdict(*at) for at in wants} == wants
    seen = Sequences()
    assert [seen.take(n) for n in (3, 1, 1, 2, 3, 4)] == [
        "accepted", "accepted", "duplicate", "accepted", "duplicate", "accepted",
    ]  # fmt: skip
    assert not seen.holes


def test_months_have_their_own_length() -> None:
    """A month starts on its first second UTC and ends where the next one starts, in December too."""
    december = window_start("M", 1_798_700_000)
    assert window_end("M", december) == december + 31 * DAY
    assert window_start("M", december + 31 * DAY) == december + 31 * DAY


def test_a_forged_command_changes_nothing() -> None:
    """A bind signed by another key leaves the customer as it was."""
    paper = opened({"acme": "cus_1"})
    signed = [raw for raw in poisons("acme", "x", T0 * 1000, paper.sign, paper.forge) if raw.want == "bad_signature"]
    for raw in signed:
        paper.raw(raw)
    assert folded(paper).book.bound == {"acme": "cus_1"}
    assert len(signed) == 3


@pytest.fixture(scope="module")
def busy() -> tuple[Oracle, list[Journal], Actual, dict[tuple[int, int], bytes | None]]:
    """Two thousand calls of forty accounts, folded; and sides that hold exactly what the log says."""
    made = world(7, accounts=40, principals_each=5)
    paper = Paper(4, T0)
    for account, kind, body in opening(made):
        paper.command(account, kind, body)
    lines: list[dict[str, Any]] = []
    lanes = dict[int, int]()
    source = source_id(T0, 5)
    for number, call in enumerate(traffic(made, 7, "e0", 0, 2_000, 1)):
        paper.now_ms += 20
        fields = emitted_fields(call, paper.now_ms * 1000)
        of = lane(fields["account"])
        lanes[of] = lanes.get(of, 0) + 1
        forge = Forge(fields["account"], paper.now_ms * 1000)
        paper.raw(forge.raw("accepted", source=source, sequence=lanes[of], **fields))
        lines.append({"b": f"e0.{number}", "t": 0, "e": fields})
        lines.append({"r": f"e0.{number}", "s": source, "l": of, "q": lanes[of]})
    raws: list[dict[str, Any]] = []
    for raw in [*shuffled(made, 7, 100, paper.now_ms * 1000), Raw("empty", made.accounts[0].encode(), None)]:
        partition, offset = paper.raw(raw)
        raws.append({"b": raw.tag, "raw": "test", "want": raw.want})
        raws.append({"r": raw.tag, "p": partition, "o": offset})
    paper.tick(30)
    oracle = folded(paper)
    original = {(record.partition, record.offset): record.value for record in paper.records}
    return oracle, [Journal("e0", lines), Journal("raw", raws)], faithful(oracle.book, original), original


def test_faithful_sides_are_reconciled(busy: Any) -> None:
    """Where every side holds what the log says, there is no difference, and all deltas have been flushed."""
    oracle, journals, actual, original = busy
    verdict = judge(oracle.book, journals, actual, original)
    assert verdict.differences == []
    assert verdict.accepted == 2_100
    assert not oracle.still_open()


def _shift(totals: dict[Any, int], by: int) -> None:
    key = sorted(total for total, units in totals.items() if units)[len(totals) // 3]
    totals[key] += by


FAULTS = {
    "redis lost one unit": lambda actual: _shift(actual.redis, -1),
    "redis doubled one unit": lambda actual: _shift(actual.redis, +1),
    "redis has a total of its own": lambda actual: actual.redis.__setitem__(("acme", "acct", "calls", "d", 0), 1),
    "redis misses a total": lambda actual: actual.redis.pop(next(key for key, units in actual.redis.items() if units)),
    "clickhouse lost a row": lambda actual: actual.view.kept.pop(next(iter(actual.view.kept))),
    "clickhouse has a row more": lambda actual: actual.view.kept.__setitem__((0, 10**6), next(iter(actual.view.kept.values()))),
    "clickhouse changed a unit": lambda actual: next(iter(actual.view.kept.values()))["quantities"].update(calls=99),
    "clickhouse sums differ": lambda actual: _shift(actual.view.sums, 1),
    "stripe lost an event": lambda actual: actual.stripe.pop(next(n for n, e in enumerate(actual.stripe) if e["value"])),
    "stripe doubled an event": lambda actual: actual.stripe.append({**actual.stripe[0], "identifier": "tw1_other"}),
    "stripe took one twice": lambda actual: actual.stripe.append(dict(actual.stripe[0])),
    "stripe has one unit less": lambda actual: actual.stripe[0].update(value=actual.stripe[0]["value"] - 1),
    "stripe has another minute": lambda actual: actual.stripe[0].update(timestamp=actual.stripe[0]["timestamp"] - 90),
    "kafka misses a meter event": lambda actual: actual.meter_events.popitem(),
    "a dead letter is missing": lambda actual: actual.dead.popitem(),
    "a dead letter has another reason": lambda actual: actual.dead.update({k: ("x", v[1]) for k, v in actual.dead.items()}),
    "a dead letter has other bytes": lambda actual: actual.dead.update({k: (v[0], b"x") for k, v in actual.dead.items()}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_seen(busy: Any, fault: str) -> None:
    """One unit lost or doubled on any one side makes the verdict red."""
    oracle, journals, actual, original = busy
    planted = deepcopy(actual)
    FAULTS[fault](planted)
    assert not judge(oracle.book, journals, planted, original).reconciled


def test_one_lost_and_one_doubled_unit_do_not_cancel_out(busy: Any) -> None:
    """Equal sums hide nothing: a unit moved from one account to another is two differences."""
    oracle, journals, actual, original = busy
    planted = deepcopy(actual)
    lost, doubled = [total for total in sorted(planted.redis) if total[1:4] == ("acct", "calls", "M")][:2]
    planted.redis[lost] -= 1
    planted.redis[doubled] += 1
    verdict = judge(oracle.book, journals, planted, original)
    assert len(verdict.differences) == 2
    assert verdict.redis_units == judge(oracle.book, journals, actual, original).redis_units


def test_journals_catch_what_never_reached_the_log(busy: Any) -> None:
    """Returned and not in the log is lost; in the log and in no journal is invented; two open calls in one thread are too many."""
    oracle, (journal, raws), actual, original = busy

    def told(lines: list[dict[str, Any]]) -> str:
        return "\n".join(judge(oracle.book, [Journal("e0", lines), raws], actual, original).differences)

    promised = [{"b": "e0.x", "t": 0, "e": {}}, {"r": "e0.x", "s": "0" * 32, "l": 0, "q": 1}]
    assert "LOST" in told([*journal.lines, *promised])
    assert "INVENTED" in told([line for line in journal.lines if "e0.0" not in line.values()])
    assert "left 2 open" in told([*journal.lines, *({"b": f"e0.{n}", "t": 0, "e": {}} for n in ("y", "z"))])
    changed = deepcopy(journal.lines)
    next(line for line in changed if line.get("b") == "e0.5")["e"]["latency_us"] += 1
    assert "CHANGED" in told(changed)


def test_lost_and_doubled_are_counted_apart(busy: Any) -> None:
    """One unit lost in Redis, two doubled there, one row lost: each is told by its side and number."""
    oracle, journals, actual, original = busy
    planted = deepcopy(actual)
    lost, doubled = [total for total in sorted(planted.redis) if total[1:4] == ("acct", "calls", "M")][:2]
    planted.redis[lost] -= 1
    planted.redis[doubled] += 2
    planted.view.kept.popitem()
    verdict = judge(oracle.book, journals, planted, original)
    assert {side: n for side, n in verdict.lost.items() if n} == {"redis_units": 1, "clickhouse_rows": 1}
    assert {side: n for side, n in verdict.doubled.items() if n} == {"redis_units": 2}


def test_a_journal_cut_short_by_a_kill_is_read(busy: Any, tmp_path: Path) -> None:
    """The line that a kill −9 left half written never returned; all before it count."""
    path = tmp_path / "e0.jsonl"
    lines = busy[1][0].lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]) + json.dumps(lines[3])[:-5])
    told = check_journals([Journal("e0", JournalLines(path))], busy[0].book)
    assert (told.emitted, told.killed) == (1, 1)
    assert all(line.startswith("INVENTED") for line in told.wrong)


def test_a_closed_hole_cannot_be_filled() -> None:
    """Beyond a thousand hole ranges the oldest closes: its sequences are refused, later ones are not."""
    seen = Sequences()
    for number in range(1_002):
        seen.take(2 * number + 1)
    with pytest.raises(Refused, match="hole_closed"):
        seen.take(2)
    assert seen.take(4) == "accepted"
