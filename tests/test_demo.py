"""The demo: a whole stack, sample services, one table; green where all sides agree, red for one lost or doubled unit."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tollway.streams.demo_books import Book, Books, Units, differences, kafka_book, units_of

SECONDS = 8
DEADLINE_S = 240


def demo(data: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Run `tollway demo --json`; returns its exit code and its object."""
    argv = [
        sys.executable,
        "-m",
        "tollway.streams.cli",
        "demo",
        "--data",
        str(data),
        "--seconds",
        str(SECONDS),
        "--json",
    ]
    done = subprocess.run([*argv, *more], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def test_the_demo_reconciles(tmp_path: Path) -> None:
    """Services, Kafka, ClickHouse, Redis and Stripe hold the same units, and the exit code says so."""
    code, found = demo(tmp_path)
    assert (code, found["reconciled"], found["differences"]) == (0, True, [])
    assert found["events"] == found["kafka_events"] == found["clickhouse_rows"] > 500
    assert found["redis_units"] == found["units"]["services"]["counted"]["calls"]
    assert found["stripe_units"] == sum(found["units"]["services"]["billable"].values()) > 0
    assert found["dead_letters"] == 3


def test_a_planted_fault_makes_the_demo_red(tmp_path: Path) -> None:
    """One unit lost in Redis and one doubled at Stripe: exit 1, and the difference names both sides."""
    code, found = demo(tmp_path, "--plant-fault")
    assert (code, found["reconciled"]) == (1, False)
    assert sorted(text.partition(": ")[2].split()[0] for text in found["differences"]) == ["Redis", "Stripe"]


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    """The demo clears only what a demo made."""
    (tmp_path / "demo").mkdir()
    kept = tmp_path / "demo" / "thesis.txt"
    kept.write_text("years of work")
    argv = [sys.executable, "-m", "tollway.streams.cli", "demo", "--data", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "move it away" in done.stderr
    assert "Traceback" not in done.stderr
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize("side", ["Kafka", "Redis", "Stripe"])
def test_a_unit_moved_between_accounts_is_a_difference(side: str) -> None:
    """Equal sums hide nothing: books are compared account by account."""
    counted, billable = units_of([("a", "calls", "ok", 5), ("b", "calls", "ok", 5)])
    moved = Units({("a", "calls"): 4, ("b", "calls"): 6})
    books = Books([Book("services", 2, counted, billable, 0), Book(side, 2, moved, None, 0)])
    assert len(differences(books)) == 2
    assert Counter(difference.side for difference in differences(books)) == {side: 2}


def test_denied_calls_neither_count_nor_bill() -> None:
    """ok counts and bills, error counts, a refusal does neither."""
    counted, billable = units_of([("a", "calls", "ok", 1), ("a", "calls", "error", 2), ("a", "calls", "denied", 4)])
    assert (counted["a", "calls"], billable["a", "calls"]) == (3, 1)


def test_an_empty_log_is_an_empty_book() -> None:
    """No records, no events."""
    assert kafka_book([], set()).events == 0
