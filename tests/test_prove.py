"""Fifty thousand calls through a stack whose workers keep dying: nothing lost, nothing doubled, to the unit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.load_poison import poisons
from tests.prove_kills import FAILPOINTS
from tests.prove_page import page

EVENTS = 50_000
ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 600


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """One campaign, as `make prove` runs it."""
    argv = [sys.executable, "-m", "tests.prove", "--events", str(EVENTS), "--seed", "1", "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, cwd=ROOT)
    assert done.stdout, f"the campaign ended with {done.returncode} and said nothing"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nothing_is_lost_and_nothing_is_doubled(report: dict[str, Any]) -> None:
    """Redis, ClickHouse, Stripe and the dead letters hold what the oracle computes from journals and log."""
    assert report["verdict"]["differences"] == []
    assert report["faults"] == []
    assert report["ok"]
    assert report["events"] >= EVENTS


def test_the_load_is_what_it_claims_to_be(report: dict[str, Any]) -> None:
    """Three processes, two hundred accounts, two thousand principals; copies and shuffled sequences, a percent each."""
    assert report["emitters"] >= 3
    assert report["accounts"] >= 200
    assert report["principals"] >= 2_000
    assert report["raw"]["duplicate"] >= EVENTS // 200
    assert report["verdict"]["late"] >= EVENTS // 200


def test_every_worker_died_at_every_named_place_and_at_random_ones(report: dict[str, Any]) -> None:
    """Each failpoint of each group was hit, and each worker was killed and asked to stop, with lag before it."""
    assert all(report["failpoints"][name] >= 1 for names in FAILPOINTS.values() for name in names)
    for group in FAILPOINTS:
        assert {"SIGKILL", "SIGTERM"} <= {kill["how"] for kill in report["kills"] if kill["group"] == group}
    assert all(kill["lag"] > 0 or kill["waiting"] > 0 for kill in report["kills"])
    assert report["emitters_killed"] == 1


def test_after_every_death_the_work_went_on(report: dict[str, Any]) -> None:
    """Each kill says its moment, what the process was doing, and how long that stood still."""
    assert all(kill["at"] and kill["doing"] and kill["recovered_s"] is not None for kill in report["kills"])
    assert {kill["process"] for kill in report["kills"]} == {*(f"worker-{group}" for group in FAILPOINTS), "emitter e1"}


def test_the_page_tells_the_report(report: dict[str, Any]) -> None:
    """Whoever reads the page sees every death, every side and the versions; a red campaign says so."""
    told = page(report, "prove/report.json")
    assert all(f"| {kill['at_s']:.1f} | {kill['process']} | {kill['how']} |" in told for kill in report["kills"])
    assert "agree to the unit" in told
    assert report["machine"]["clickhouse"] in told
    assert "campaign is red" in page({**report, "ok": False, "faults": ["something"]}, "prove/report.json")


def test_every_poison_became_a_dead_letter_with_its_own_reason(report: dict[str, Any]) -> None:
    """What the cabinet holds, and a late-filled hole, by reason and number."""
    written = {reason: count for reason, count in report["raw"].items() if reason not in ("accepted", "duplicate")}
    assert report["verdict"]["dead_letters"] == written
    cabinet = {raw.want for raw in poisons("a", "b", 2**50, lambda _: [], lambda _: [])}
    assert set(written) == cabinet | {"hole_closed"}


def test_the_audit_log_verifies(report: dict[str, Any]) -> None:
    """No gap, no double, no change, by the proof that ops run."""
    assert report["audit"]["ok"]
