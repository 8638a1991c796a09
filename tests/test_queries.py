"""The analyst's ten questions answer what plain Python computes from the same events."""

import contextlib
import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.audit_batches import T0_MS, Log, store_of, varied
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.streams.usage_queries import analysts, ask, usage_report

SINCE_S, UNTIL_S = T0_MS // 1000 - 60, T0_MS // 1000 + 3600
PERIOD = {"since": SINCE_S, "until": UNTIL_S}
Event = dict[str, Any]


@pytest.fixture(scope="module")
def asked(clickhouse: ClickHouseServer) -> Iterator[tuple[AuditStore, list[Event]]]:
    """A database with varied usage of two accounts, and the events that were accepted."""
    store = store_of(clickhouse, f"queries_{uuid.uuid4().hex}")
    store.migrate()
    log = Log()
    events = varied(log, 400)
    for number, status in enumerate(("denied", "rate_limited", "payment_required", "error", "ok")):
        events.append(
            log.usage("acme", status=status, operation="GET /odd", principal=f"odd{number}", latency_us=number)
        )
    seen = next(event["sequence"] for event in events if event["account"] == "acme")
    log.usage("acme", sequence=seen, operation="GET /twice")  # a duplicate: counted nowhere
    log.usage("acme", principal="not an id")  # refused: counted nowhere
    with contextlib.closing(store):
        store._insert(list(log.blocks()))
        yield store, events
        store.command(f"DROP DATABASE {store.database}")


def money(event: Event, side: str) -> Decimal:
    """Revenue or cost of an event, 0 where it has none."""
    return Decimal(event.get(f"{side}_nano") or 0) / 10**9


def calls(events: list[Event]) -> int:
    """Sum of `calls`."""
    return sum(event["quantities"]["calls"] for event in events)


def grouped(events: list[Event], *names: str) -> dict[tuple[Any, ...], list[Event]]:
    """Events by some fields, '' for null."""
    found: dict[tuple[Any, ...], list[Event]] = defaultdict(list)
    for event in events:
        found[tuple(event.get(name) or "" for name in names)].append(event)
    return found


def test_who_used_most(asked: tuple[AuditStore, list[Event]]) -> None:
    """Calls of every principal, most first; refusals count nowhere."""
    store, events = asked
    counted = [event for event in events if event["status"] in ("ok", "error")]
    expected = {key: calls(some) for key, some in grouped(counted, "account", "principal_kind", "principal").items()}
    rows = ask(store, "01_who_used_most", **PERIOD, most=1000)
    assert {(row["account"], row["principal_kind"], row["principal"]): row["calls"] for row in rows} == expected
    assert [row["calls"] for row in rows] == sorted(expected.values(), reverse=True)


def earned(event: Event) -> bool:
    """Whether an event has revenue: only what is ok is billed."""
    return event["status"] == "ok" and event.get("revenue_nano") is not None


def margins(events: list[Event], *names: str) -> dict[tuple[Any, ...], tuple[Decimal, Decimal]]:
    """(…names, asset) → (revenue, cost) in that asset."""
    found: dict[tuple[Any, ...], list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
    for event in events:
        key = tuple(event.get(name) or "" for name in names)
        if earned(event):
            found[*key, event["revenue_asset"]][0] += money(event, "revenue")
        if event.get("cost_nano") is not None:
            found[*key, event["cost_asset"]][1] += money(event, "cost")
    return {key: (revenue, cost) for key, (revenue, cost) in found.items()}


def test_cost_of_a_run_with_its_sub_runs(asked: tuple[AuditStore, list[Event]]) -> None:
    """Every run of the tree with its own money and that of all runs below it, by asset; the run asked for comes first."""
    store, events = asked
    mine = [event for event in events if event["account"] == "acme"]
    expected = {}
    for run in ("r1", "r1.a", "r1.a.x"):
        tree = [event for event in mine if run in (*(event.get("path") or ()), event.get("run"))]
        expected |= {(run, *key): sums for key, sums in margins(tree).items()}
    rows = ask(store, "02_cost_of_a_run", account="acme", run="r1")
    assert {(row["of_run"], row["asset"]): (row["revenue"], row["cost"]) for row in rows} == expected
    assert len({asset for _, asset in expected}) == 2, "the data must have two assets"
    assert all(row["margin"] == row["revenue"] - row["cost"] for row in rows)
    assert rows[0]["of_run"] == "r1"
    inner = ask(store, "02_cost_of_a_run", account="acme", run="r1.a")
    assert [row for row in inner if row["of_run"] == "r1.a"] == [row for row in rows if row["of_run"] == "r1.a"]
    assert {row["of_run"] for row in inner} == {"r1.a", "r1.a.x"}


def test_busiest_operations(asked: tuple[AuditStore, list[Event]]) -> None:
    """Calls that ran, by operation, with a p95 that is one of the latencies measured; what was refused ran nowhere."""
    store, events = asked
    ran = [event for event in events if event["status"] in ("ok", "error")]
    rows = ask(store, "03_busiest_operations", **PERIOD, most=100)
    expected = grouped(ran, "operation", "surface")
    assert {(row["operation"], row["surface"]): row["calls"] for row in rows} == {
        k: calls(v) for k, v in expected.items()
    }
    for row in rows:
        latencies = sorted(event["latency_us"] for event in expected[row["operation"], row["surface"]])
        for level, column in ((0.5, "p50_us"), (0.95, "p95_us")):
            assert row[column] == latencies[min(len(latencies) - 1, int(level * len(latencies)))]


def test_last_calls_of_a_principal(asked: tuple[AuditStore, list[Event]]) -> None:
    """Newest first, whatever their status."""
    store, events = asked
    who = {"account": "acme", "principal_kind": events[0]["principal_kind"], "principal": events[0]["principal"]}
    mine = [event for event in events if all(event[name] == value for name, value in who.items())]
    expected = sorted(mine, key=lambda event: (event["occurred_at"], event["event_id"]), reverse=True)[:5]
    rows = ask(store, "04_last_calls_of_a_principal", **who, most=5)
    assert [(row["event_id"], row["status"]) for row in rows] == [(e["event_id"], e["status"]) for e in expected]


def test_errors_by_operation(asked: tuple[AuditStore, list[Event]]) -> None:
    """Errors and refusals apart."""
    store, events = asked
    rows = {row["operation"]: row for row in ask(store, "05_errors_by_operation", **PERIOD)}
    for (operation,), some in grouped(events, "operation").items():
        by_status = Counter[str]()
        for event in some:
            by_status[event["status"]] += event["quantities"]["calls"]
        refused = sum(by_status[status] for status in ("denied", "rate_limited", "payment_required"))
        found = rows[operation]
        assert (found["calls"], found["errors"], found["refused"]) == (calls(some), by_status["error"], refused)
        assert found["errors_permille"] == by_status["error"] * 1000 // max(calls(some), 1)


def test_usage_by_hour(asked: tuple[AuditStore, list[Event]]) -> None:
    """Units of every meter in their hour."""
    store, events = asked
    expected = Counter[tuple[datetime, str]]()
    for event in events:
        if event["account"] == "acme" and event["status"] in ("ok", "error"):
            hour = datetime.fromtimestamp(event["occurred_at"] // 3_600_000_000 * 3600, UTC)
            for meter, units in event["quantities"].items():
                expected[hour, meter] += units
    rows = ask(store, "06_usage_by_hour", account="acme", **PERIOD)
    assert {(row["hour"].replace(tzinfo=UTC), row["meter"]): row["units"] for row in rows} == dict(expected)


def test_sessions_by_day(asked: tuple[AuditStore, list[Event]]) -> None:
    """Each session, run and principal once a day."""
    store, events = asked
    [row] = ask(store, "07_sessions_by_day", **PERIOD)
    assert (row["sessions"], row["runs"], row["principals"]) == (
        len({(e["account"], e["session"]) for e in events if e.get("session")}),
        len({(e["account"], e["run"]) for e in events if e.get("run")}),
        len({(e["account"], e["principal_kind"], e["principal"]) for e in events}),
    )


def test_margin_by_model(asked: tuple[AuditStore, list[Event]]) -> None:
    """Revenue of what is ok, less cost of everything, by asset: two assets are never added."""
    store, events = asked
    rows = ask(store, "08_margin_by_model", **PERIOD)
    found = {(row["provider"], row["model"], row["asset"]): (row["revenue"], row["cost"]) for row in rows}
    assert found == margins(events, "provider", "model")
    assert all(row["margin"] == row["revenue"] - row["cost"] for row in rows)


def test_agents_by_cost(asked: tuple[AuditStore, list[Event]]) -> None:
    """What each agent cost, dearest first, and what it earned in that asset."""
    store, events = asked
    costly = [event for event in events if event.get("agent") and event.get("cost_nano") is not None]
    expected = {
        key: (
            sum(money(event, "cost") for event in some),
            sum(money(event, "revenue") for event in some if earned(event) and event["revenue_asset"] == key[2]),
        )
        for key, some in grouped(costly, "account", "agent", "cost_asset").items()
    }
    rows = ask(store, "09_agents_by_cost", **PERIOD, most=100)
    found = {(row["account"], row["agent"], row["asset"]): (row["cost"], row["revenue"] or 0) for row in rows}
    assert found == expected
    assert [row["cost"] for row in rows] == sorted((cost for cost, _ in expected.values()), reverse=True)


def test_how_it_is_paid(asked: tuple[AuditStore, list[Event]]) -> None:
    """Invoice where no rail is named; what is not ok is not billed; sums by asset."""
    store, events = asked
    expected: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        paid_by = "not billed" if event["status"] != "ok" else event.get("rail") or "invoice"
        expected[paid_by, event.get("revenue_asset") or ""].append(event)
    rows = ask(store, "10_how_it_is_paid", **PERIOD)
    assert {(row["paid_by"], row["asset"]): (row["events"], row["revenue"] or 0) for row in rows} == {
        key: (len(some), sum(money(event, "revenue") for event in some)) for key, some in expected.items()
    }


def test_usage_of_an_account(asked: tuple[AuditStore, list[Event]]) -> None:
    """`tollway usage`: the account's own calls and money, by asset, in what JSON has."""
    store, events = asked
    mine = [event for event in events if event["account"] == "acme"]
    rows = json.loads(json.dumps(usage_report(store, "acme", SINCE_S, UNTIL_S)))
    assert sum(row["calls"] for row in rows) == calls(mine)
    for side in ("revenue", "cost"):
        found: dict[str, Decimal] = defaultdict(Decimal)
        for row in rows:
            found[row[f"{side}_asset"]] += Decimal(row[side] or 0)
        assert {asset: amount for asset, amount in found.items() if asset} == {
            asset: sum(money(event, side) for event in some)
            for (asset,), some in grouped(mine, f"{side}_asset").items()
            if asset
        }
    assert all(row["last_at"].endswith("+00:00") for row in rows)
    last_s = max(datetime.fromisoformat(row["last_at"]).timestamp() for row in rows)
    assert last_s == max(event["occurred_at"] for event in mine) / 10**6


def test_a_question_refuses_what_it_was_not_asked_with(asked: tuple[AuditStore, list[Event]]) -> None:
    """A parameter too few is named before anything is asked."""
    with pytest.raises(TypeError, match="takes"):
        ask(asked[0], "account", account="acme")


def test_a_period_is_in_utc_whatever_the_zone_it_is_given_in(asked: tuple[AuditStore, list[Event]]) -> None:
    """The same moments as seconds, in UTC or in another zone are the same period, its end not in it."""
    store, events = asked
    at_s = events[200]["occurred_at"] // 10**6
    given: list[tuple[Any, Any]] = [(SINCE_S, at_s)]
    for zone in (UTC, timezone(timedelta(hours=9))):
        given.append((datetime.fromtimestamp(SINCE_S, zone), datetime.fromtimestamp(at_s, zone)))
    expected = sum(event["occurred_at"] < at_s * 10**6 for event in events)
    for since, until in given:
        rows = ask(store, "10_how_it_is_paid", since=since, until=until)
        assert sum(row["events"] for row in rows) == expected > 0


def test_the_page_shows_the_queries_that_are_run() -> None:
    """docs/queries.md holds the ten, word for word, under their titles."""
    page = (Path(__file__).parents[1] / "docs" / "queries.md").read_text(encoding="utf-8")
    found = analysts()
    assert len(found) == 10
    for each in found:
        assert f"## {each.title.rstrip('.')}\n" in page
        assert f"```sql\n{each.sql}\n```" in page
