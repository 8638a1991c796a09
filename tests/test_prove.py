"""Fifty thousand calls through a stack whose workers keep dying: nothing lost, nothing doubled, to the unit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.load_poison import poisons
from tests.prove_gauge import Kill
from tests.prove_kills import FAILPOINTS, kill_faults
from tests.prove_page import page
from tests.prove_scale import whole

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


def test_a_death_of_an_idle_process_is_a_fault(tmp_path: Path) -> None:
    """A kill proves something only where work was interrupted."""
    idle = Kill("audit", "clickhouse", "SIGKILL", 3.0, lag=0)
    busy = Kill("stripe", "stripe", "SIGKILL", 4.0, lag=0, waiting=7)
    wrong = kill_faults([], [idle, busy], tmp_path)
    assert [line for line in wrong if "idle" in line] == ["clickhouse: SIGKILL at 3.0 s hit an idle process"]


def test_the_whole_campaign_breaks_every_part() -> None:
    """A million calls of five thousand principals; each part dies, and what is away is so for longer than a poll may last."""
    scale = whole(1_000_000)
    outages = [outage for row in scale.outages for outage in row]
    assert (scale.accounts, scale.accounts * scale.principals_each) == (1_000, 5_000)
    assert {o.part for o in outages if not o.away_s} == {"valkey", "kafka", "clickhouse", "stripe"}
    assert {o.part: o.away_s for o in outages if o.away_s} == {"kafka": 20.0, "clickhouse": 60.0, "stripe": 60.0}
    assert scale.max_poll_interval_ms == 30_000
    assert all(len(scale.workers(group)) == 2 for group in ("accounts", "audit"))


def test_the_page_tells_the_report(report: dict[str, Any]) -> None:
    """Whoever reads the page sees every death, every side and the versions; a red campaign says so."""
    told = page(report, "prove/report.json")
    assert all(f"| {kill['at_s']:.1f} | {kill['process']} | {kill['how']} |" in told for kill in report["kills"])
    assert "agree to the unit" in told
    assert "campaign is red" not in told
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
