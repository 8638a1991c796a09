"""A small crash campaign: two dozen kills and stops of everything under load, looked at all the while, compared at the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash_effects import Moved, Sample, Strike
from tests.crash_page import page
from tests.crash_report import RECOVER_DEADLINE_S, Report, faults
from tests.crash_scale import GROUPS, sizes
from tests.crash_strike import SIGKILL, SIGSTOP
from tests.crash_tills import LIMITS, METER, overspent, tills
from tests.crash_watch import not_asked_for, not_counted_yet, over_limit, went_back
from tests.oracle import Verdict
from tests.oracle_book import Book, Delta

KILLS = 24
ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 400


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """One campaign, as `make crash` runs it."""
    argv = [sys.executable, "-m", "tests.crash", "--kills", str(KILLS), "--seed", "1", "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, cwd=ROOT)
    assert done.stdout, f"the campaign ended with {done.returncode} and said nothing"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nothing_is_lost_doubled_or_overspent(report: dict[str, Any]) -> None:
    """Redis, ClickHouse, Stripe, dead letters and gates hold what the oracle computes from journals and log."""
    assert report["verdict"]["differences"] == []
    assert report["breaches"] == []
    assert report["faults"] == []
    assert (report["lost"], report["doubled"], report["overspent"]) == (0, 0, 0)
    assert report["ok"]


def test_processes_died_slept_and_died_again(report: dict[str, Any]) -> None:
    """Two dozen strikes, zombies among them, some before the last was over; each says its moment and what lay before it."""
    strikes = report["strikes"]
    zombies = [strike for strike in strikes if strike["how"] == SIGSTOP and strike["process"].startswith("worker")]
    assert len(strikes) == KILLS >= 20
    assert len(zombies) >= 3
    assert all(strike["stopped_s"] * 1000 > report["sizes"]["session_timeout_ms"] for strike in zombies)
    assert sum(strike["in_recovery"] for strike in strikes) >= 2
    assert {strike["group"] for strike in strikes} >= set(GROUPS)
    assert all(strike["at"] and strike["recovered_s"] is not None for strike in strikes)


def test_every_side_was_looked_at_meanwhile(report: dict[str, Any]) -> None:
    """The oracle is held against each side while processes die, not at the end alone."""
    assert all(report["looks"][side] >= 5 for side in ("redis", "clickhouse", "rail", "dead letters", "gate"))
    assert report["looks"]["gate scopes"] >= 100
    assert report["audit"]["ok"]
    assert report["seals"]["ok"]


def test_the_page_tells_the_report(report: dict[str, Any]) -> None:
    """Whoever reads the page sees the count of kills, every process, every side and the versions; red says so."""
    told = page(report, "crash/report.json")
    assert f"**{KILLS} kills: 0 lost, 0 doubled, 0 overspent.**" in told
    assert all(f"| {name} |" in told for name in report["processes"])
    assert report["machine"]["clickhouse"] in told
    assert "campaign is red" not in told
    assert "campaign is red" in page({**report, "ok": False, "faults": ["something"]}, "crash/report.json")


def test_a_doubled_unit_is_seen_at_the_next_look() -> None:
    """A total above the log's or smaller than before, a meter event that nobody asked for, a load above a limit: each by name."""
    total = ("org", "acct", "calls", "h", 3_600)
    book = Book()
    book.used[total] = 5
    assert not_counted_yet({total: 5}, book) == []
    assert "REDIS ABOVE LOG" in not_counted_yet({total: 6}, book)[0]
    assert went_back({total: 5}, {total: 5}, 4_000) == []
    assert "REDIS WENT BACK" in went_back({total: 5}, {total: 4}, 10**6)[0]
    assert went_back({total: 5}, {}, 10**6) == []
    event = {"identifier": "tw1_a", "customer": "cus", "value": "7"}
    delta = Delta("org", "cus", "calls", "tollway_calls", 0, 7, 0)
    assert not_asked_for([event], {"tw1_a": delta}) == []
    assert "RAIL ABOVE LOG" in not_asked_for([{**event, "value": "8"}], {"tw1_a": delta})[0]
    assert "RAIL ABOVE LOG" in not_asked_for([event], {})[0]
    most, run = LIMITS["run", METER, "L"], f"tw:{{001}}:s:{tills(1)[0]}~run:r1"
    within = {f"{METER} L:0 u": most - 3, f"{METER} L:0 h": 3}
    assert over_limit({run: within}) == []
    assert len(over_limit({run: {**within, f"{METER} L:0 h": 4}})) == 1
    book.used[tills(1)[0], "run:r1", METER, "L", 0] = most + 2
    assert list(overspent(book, 1).values()) == [2]


def test_work_has_moved_only_behind_the_death() -> None:
    """What a process had sent before it died is not its successor's work; each of its partitions must move."""
    answers = {"audit": Sample(0.0, {})}
    moved = Moved(answers.__getitem__, {"audit": [0, 1]}, since=10.0)
    for at, marks, over in (
        (9.0, {0: 99, 1: 99}, False),
        (10.5, {0: 100, 1: 100}, False),
        (11.0, {0: 101, 1: 100}, False),
        (12.0, {0: 101, 1: 101}, True),
    ):
        answers["audit"] = Sample(at, marks)
        assert moved() is over


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"recovered_s": None}, "did not recover"),
        ({"recovered_s": RECOVER_DEADLINE_S + 1}, "did not recover"),
        ({"busy": False}, "idle process"),
        ({"how": SIGSTOP}, "was never killed"),
    ],
)
def test_a_campaign_that_proves_too_little_is_red(changes: dict[str, Any], fault: str) -> None:
    """Every strike must hit work and come back in time, and a long campaign must kill every process."""
    scale = sizes(200)
    names = sorted(scale.processes)
    strikes = [
        Strike(names[n % len(names)], "any", SIGKILL, 1.0, 5, [0], in_recovery=False, busy=True, recovered_s=1.0)
        for n in range(200)
    ]
    report = Report(
        1, {}, {}, audit={"ok": True}, seals={"ok": True}, gate={"held_apart": [], "allowed_twice": [], "open_holds": 0}
    )
    report.tell(strikes, scale.processes, {})
    assert faults(report, Verdict(), scale) == []
    for strike in strikes:
        if strike.process == names[0]:
            for name, value in changes.items():
                setattr(strike, name, value)
    report.tell(strikes, scale.processes, {})
    assert any(fault in line for line in faults(report, Verdict(), scale))
