"""The oracle: folds the log and the writers' journals by itself, and says to the unit where the pipeline disagrees.

Separate code on purpose: it imports nothing of tollway. `python -m tests.oracle --data DIR --journals DIR --json`.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.oracle_book import BILLED, DUPLICATE, GROWN, Book, Row, Total, scopes_of, window_end, window_start
from tests.oracle_fold import Oracle
from tests.oracle_journal import Journal, check_journals, read_journals
from tests.oracle_log import Log
from tests.oracle_sides import (
    ClickHouse,
    as_the_view,
    dead_letters,
    meter_events,
    redis_totals,
    stripe_events,
)

SHOWN_MAX = 20
DAY_S = 86_400
REST = 3
"""Between two looks at whether all has settled lies so many times what one took: looking is not to delay what it waits for."""


@dataclass
class Verdict:
    """What was compared and every difference found. `reconciled` is their absence."""

    records: int = 0
    emitted: int = 0
    lives_killed: int = 0
    raw: dict[str, int] = field(default_factory=dict)
    accepted: int = 0
    late: int = 0
    """Accepted more than a minute after it occurred."""
    duplicates: int = 0
    dead_letters: dict[str, int] = field(default_factory=dict)
    redis_totals: int = 0
    redis_units: int = 0
    clickhouse_rows: int = 0
    clickhouse_totals: int = 0
    meter_events: int = 0
    stripe_events: int = 0
    stripe_units: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    """side → events, rows or units that must be there and are not."""
    doubled: dict[str, int] = field(default_factory=dict)
    """side → events, rows or units that are there and must not be."""
    differences: list[str] = field(default_factory=list)

    @property
    def reconciled(self) -> bool:
        return not self.differences


class View(Protocol):
    """The analyst's view, one partition at a time: a million rows of dictionaries are not held at once."""

    def count(self) -> int: ...

    def rows(self, partition: int) -> dict[tuple[int, int], dict[str, Any]]: ...

    def totals(self, partition: int) -> dict[Total, int]: ...


@dataclass
class Actual:
    """What the sides hold."""

    redis: dict[Total, int]
    view: View
    stripe: list[dict[str, Any]]
    dead: dict[tuple[int, int], tuple[str, bytes]]
    meter_events: dict[str, dict[str, Any]]
    wrong: list[str] = field(default_factory=list)


def compare(side: str, expected: dict[Any, Any], actual: dict[Any, Any]) -> list[str]:
    """Both directions; a total of zero and none are the same."""
    return [
        f"{side}: {key} is {actual.get(key)!r}, must be {expected.get(key)!r}"
        for key in expected.keys() | actual.keys()
        if (expected.get(key) or 0) != (actual.get(key) or 0)
    ]


def apart(verdict: Verdict, side: str, expected: dict[Any, int], actual: dict[Any, int]) -> None:
    """Enter what is missing and what is too much, unit by unit: they never cancel out."""
    deltas = [actual.get(key, 0) - expected.get(key, 0) for key in expected.keys() | actual.keys()]
    verdict.lost[side] = verdict.lost.get(side, 0) - sum(delta for delta in deltas if delta < 0)
    verdict.doubled[side] = verdict.doubled.get(side, 0) + sum(delta for delta in deltas if delta > 0)


def redis_due(book: Book, actual: dict[Total, int]) -> dict[Total, int]:
    """Fields go a day after their window: until then they must be there, afterwards they may be, with the same total."""
    now_s = min(book.log_time_ms.values()) // 1000
    gone = {
        total
        for total in book.used
        if total not in actual and (end := window_end(total[3], total[4])) is not None and end + DAY_S <= now_s
    }
    return {total: units for total, units in book.used.items() if total not in gone}


Events = list[tuple[Row, dict[str, Any]]]
"""Accepted rows with what they decode to."""


def compare_rows(events: Events, actual: dict[tuple[int, int], dict[str, Any]]) -> list[str]:
    """The view shows accepted usage: each row once, each field as it was sent."""
    expected = {(row.record.partition, row.record.offset): (row, event) for row, event in events}
    wrong = [f"clickhouse: {at} is missing" for at in expected.keys() - actual.keys()]
    wrong += [f"clickhouse: {at} is not accepted usage" for at in actual.keys() - expected.keys()]
    for at in expected.keys() & actual.keys():
        shown = as_the_view(*expected[at])
        wrong += [
            f"clickhouse: {at} {name} is {actual[at][name]!r}, must be {value!r}"
            for name, value in shown.items()
            if actual[at][name] != value
        ]
    return wrong


def expected_totals(events: Events) -> dict[Total, int]:
    """Every meter x window x scope of what counts, whether a policy asks for it or not."""
    totals: dict[Total, int] = defaultdict(int)
    for row, event in events:
        if event["status"] not in ("ok", "error"):
            continue
        at_s = row.counted_us // 10**6
        scopes = {scopes_of(event, kind) for kind in ("acct", "principal", "agent", "sess", "run")} - {None}
        for window in ("m", "h", "d", "M"):
            start = window_start(window, at_s)
            for meter, units in event["quantities"].items():
                for scope in scopes:
                    totals[event["account"], str(scope), meter, window, start] += units
    return totals


def compare_view(book: Book, view: View, verdict: Verdict) -> tuple[list[str], dict[tuple[str, str, int], int]]:
    """Differences of rows and totals, one partition after the other; and the units due at the rail by minute."""
    rows: dict[int, list[Row]] = defaultdict(list)
    for row in book.rows:
        rows[row.record.partition].append(row)
    wrong: list[str] = []
    billed: dict[tuple[str, str, int], int] = defaultdict(int)
    for partition in sorted(book.verdicts):
        events = [(row, row.event) for row in rows[partition]]
        shown, totals, due = view.rows(partition), view.totals(partition), expected_totals(events)
        wrong += compare_rows(events, shown) + compare("clickhouse totals", due, totals)
        apart(verdict, "clickhouse_rows", dict.fromkeys(_places(events), 1), dict.fromkeys(shown, 1))
        apart(verdict, "clickhouse_units", due, totals)
        _bill_minutes(book, events, billed)
        verdict.clickhouse_rows += len(shown)
        verdict.clickhouse_totals += len(totals)
    if verdict.clickhouse_rows != view.count():
        wrong.append(f"clickhouse: {view.count()} rows in all, {verdict.clickhouse_rows} in the log's partitions")
    return wrong, billed


def _places(events: Events) -> list[tuple[int, int]]:
    return [(row.record.partition, row.record.offset) for row, _ in events]


def compare_stripe(
    book: Book, events: list[dict[str, Any]], billed: dict[tuple[str, str, int], int], verdict: Verdict
) -> list[str]:
    """Each identifier's own value; and, whatever was flushed when, units by customer, meter and minute."""
    expected = {
        identifier: (delta.customer, delta.event_name, delta.units, delta.last_us // 10**6)
        for identifier, delta in book.deltas.items()
        if delta.units
    }
    actual = {
        event["identifier"]: (event["customer"], event["event_name"], event["value"], event["timestamp"])
        for event in events
        if event["value"]
    }
    twice = Counter(event["identifier"] for event in events)
    wrong = [f"stripe: {identifier} stands {count} times" for identifier, count in twice.items() if count > 1]
    minutes: dict[tuple[str, str, int], int] = defaultdict(int)
    for event in events:
        minutes[event["customer"], event["event_name"], event["timestamp"] // _bucket_s(book)] += event["value"]
    apart(verdict, "stripe_units", billed, minutes)
    return wrong + compare("stripe", expected, actual) + compare("stripe minute", billed, minutes)


def _bucket_s(book: Book) -> int:
    return max(60, int(book.config["billing_window_s"]))


def _bill_minutes(book: Book, events: Events, into: dict[tuple[str, str, int], int]) -> None:
    """From the accepted rows alone: no flush, no delta, no identifier."""
    for row, event in events:
        customer = row.customer or book.bound.get(event["account"])
        if event["status"] not in BILLED[row.version] or event["rail"] is not None or customer is None:
            continue
        for meter, units in event["quantities"].items():
            name = book.meters.get(meter)
            if name is not None:
                into[customer, name, row.billed_us // 10**6 // _bucket_s(book)] += units


def compare_meter_events(book: Book, events: dict[str, dict[str, Any]]) -> list[str]:
    """Our own meter events in Kafka against the deltas."""
    expected = {key: (d.customer, d.units, d.last_us) for key, d in book.deltas.items() if d.units}
    actual = {key: (e["customer"], e["units"], e["last_occurred_at"]) for key, e in events.items() if e["units"]}
    return compare("meter events", expected, actual)


def judge(
    book: Book, journals: list[Journal], actual: Actual, original: dict[tuple[int, int], bytes | None]
) -> Verdict:
    """Everything against everything."""
    told = check_journals(journals, book)
    verdict = Verdict(
        records=book.records,
        emitted=told.emitted,
        lives_killed=told.killed,
        raw=dict(told.raw),
        accepted=len(book.rows),
        late=book.late,
        duplicates=sum(found.count(DUPLICATE) for found in book.verdicts.values()),
        dead_letters=dict(Counter(book.dead.values())),
        redis_totals=len(actual.redis),
        redis_units=sum(
            u for (_, scope, meter, w, _), u in actual.redis.items() if (scope, meter, w) == ("acct", "calls", "M")
        ),
        meter_events=len(actual.meter_events),
        stripe_events=len(actual.stripe),
        stripe_units=sum(event["value"] for event in actual.stripe),
        lost={"events": sum(line.startswith("LOST") for line in told.wrong)},
        doubled={"events": sum(line.startswith("DOUBLED") for line in told.wrong)},
    )
    # A null would delete the letter from its compacted topic: an empty value stands for it.
    letters = {at: (reason, original.get(at) or b"") for at, reason in book.dead.items()}
    in_redis = redis_due(book, actual.redis)
    apart(verdict, "redis_units", in_redis, actual.redis)
    in_view, billed = compare_view(book, actual.view, verdict)
    verdict.differences = [
        *actual.wrong,
        *told.wrong,
        *compare("redis", in_redis, actual.redis),
        *in_view,
        *compare_meter_events(book, actual.meter_events),
        *compare_stripe(book, actual.stripe, billed, verdict),
        *compare("dead letters", letters, actual.dead),
    ]
    return verdict


class Court:
    """The oracle at work on one stack: follows the log, waits until the sides can agree, then compares."""

    def __init__(self, endpoints: dict[str, Any], journals: Path) -> None:
        self.endpoints, self.journals = endpoints, journals
        bootstrap = endpoints["kafka_bootstrap"]
        self.log = Log(bootstrap, "usage.events", gapless=True)
        self.logs = [self.log]
        self.letters, self.events = Log(bootstrap, "dead.letters"), Log(bootstrap, "billing.meter_events", gapless=True)
        self.oracle = Oracle(self.log.partitions)
        self.original: dict[tuple[int, int], bytes | None] = {}
        self.letter_records, self.event_records = [], []  # type: ignore[var-annotated]
        self.clickhouse = ClickHouse(endpoints)

    @property
    def book(self) -> Book:
        return self.oracle.book

    def grown(self) -> None:
        """The log has grown: read the old one to its end, and from here on the new one too."""
        self.follow()
        growth, bootstrap = len(self.logs), self.endpoints["kafka_bootstrap"]
        self.logs.append(Log(bootstrap, f"usage.events.{growth}", gapless=True, base=growth * GROWN))
        self.oracle.grow(self.logs[-1].partitions)
        self.letters.close()  # it has more partitions now
        self.letters, self.letter_records = Log(bootstrap, "dead.letters"), []

    def follow(self) -> list[Any]:
        """Fold what has been appended; returns those records."""
        records = [record for log in self.logs for record in log.read()]
        self.oracle.feed(records)
        dead = self.book.dead
        self.original.update({(r.partition, r.offset): r.value for r in records if (r.partition, r.offset) in dead})
        return records

    def look(self) -> Actual:
        """Read every side."""
        self.letter_records += self.letters.read()
        self.event_records += self.events.read()
        totals, wrong = redis_totals(self.endpoints["redis_url"])
        dead, wrong_letters = dead_letters(self.letter_records, self.book.epochs)
        events, wrong_events = meter_events(self.event_records)
        return Actual(
            redis=totals,
            view=self.clickhouse,
            stripe=stripe_events(self.endpoints["stripe_url"]),
            dead=dead,
            meter_events=events,
            wrong=wrong + wrong_letters + wrong_events,
        )

    def is_settled(self) -> bool:
        """Cheap: the last delta is at Stripe and the view holds as many rows as the log. Agreement is not asked."""
        self.follow()
        if self.oracle.still_open():
            return False
        due = sum(1 for delta in self.book.deltas.values() if delta.units)
        sent = sum(1 for event in stripe_events(self.endpoints["stripe_url"]) if event["value"])
        return sent >= due and self.clickhouse.count() >= len(self.book.rows)

    def verdict(self, deadline_s: float, progress: Callable[[str], None] = lambda line: None) -> Verdict:
        """Wait until everything has settled, or the deadline; then the comparison, repeated while it still improves."""
        until, began = time.monotonic() + deadline_s, time.monotonic()
        while not self.is_settled() and time.monotonic() < until:
            progress(f"settling: {self.oracle.still_open()} deltas open, {len(self.book.deltas)} due")
            time.sleep(max(1.0, REST * (time.monotonic() - began)))
            began = time.monotonic()
        progress(f"comparing {self.book.records} records with every side")
        found = self._compare()
        while not found.reconciled and time.monotonic() < until:
            progress(f"settling: {len(found.differences)} differences")
            time.sleep(2.0)
            found = self._compare()
        return found

    def _compare(self) -> Verdict:
        actual = self.look()
        self.follow()
        return judge(self.book, read_journals(self.journals), actual, self.original)

    def close(self) -> None:
        for log in (*self.logs, self.letters, self.events):
            log.close()
        self.clickhouse.close()


def endpoints_of(data: Path) -> dict[str, Any]:
    """Where the stack in a data folder is."""
    found: dict[str, Any] = json.loads((data / "stack.json").read_text())["endpoints"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data folder of a running stack")
    parser.add_argument("--journals", type=Path, required=True, help="folder of the writers' journals")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds to wait for everything to settle")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    court = Court(endpoints_of(arguments.data), arguments.journals)
    try:
        found = court.verdict(arguments.deadline, lambda line: print(line, file=sys.stderr))
    finally:
        court.close()
    shown = {**asdict(found), "reconciled": found.reconciled, "differences": found.differences[:SHOWN_MAX]}
    print(json.dumps(shown) if arguments.json else "\n".join(f"{key}: {value}" for key, value in shown.items()))
    return 0 if found.reconciled else 1


if __name__ == "__main__":
    sys.exit(main())
