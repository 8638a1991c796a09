"""A log of more partitions takes over under load, the command that does it killed on the way: nothing lost, nothing doubled.

The oracle folds both logs and cuts its own states by lanes between them.
"""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import Court
from tests.oracle_book import Record
from tests.prove_emitters import ROOT
from tests.prove_scale import EMITTERS, THREADS
from tests.raw_writer import RawWriter, copies
from tests.reshaping import Reshaping, Step, modest, wrong

BEFORE, AFTER = 8, 32
COPY_SHARE, COPIES_LEAST = 0.3, 30
WORKERS = ["worker-all", "worker-all-1"]
KILLED_AT = ("takes no usage any more", "states cut into")
"""Lines of its progress after which the command is killed: the brokers refuse usage; the new states are written."""


class Growing(Reshaping):
    """Two workers, a log of a few partitions."""

    def __init__(self, data: Path, said: Any) -> None:
        steps = [
            Step("what cannot be is refused", self.refused),
            *(Step(f"growing is killed: {line}", lambda _, line=line: self.killed(line)) for line in KILLED_AT),  # type: ignore[misc]
            Step("growing", self.grown),
            Step("workers go over", lambda _: self.spread(WORKERS, AFTER, billing=BEFORE)),
            Step("the new log gets what the old one has", lambda _: self.sent_again()),
        ]
        self.old: list[Record] = []
        super().__init__(data, 1, modest(2, BEFORE), steps, said.append)
        self.heard: dict[str, Any] = {}

    def refused(self, _: object) -> None:
        self.heard["refused"] = self._tollway("topics", "grow", "4", str(AFTER)).get("error")

    def killed(self, line: str) -> None:
        """kill −9 as soon as it has said so."""
        command = [sys.executable, "-m", "tollway.streams.cli", "topics", "grow", str(BEFORE), str(AFTER)]
        process = subprocess.Popen([*command, "--data", str(self.data)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stderr is not None
        heard = next((said for said in iter(process.stderr.readline, "") if line in said), "")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        self.heard[line] = heard

    def _follow(self, court: Court) -> list[Record]:
        """Remembers what the old log has."""
        found = super()._follow(court)
        self.old += [] if "grown" in self.heard else found
        return found

    def sent_again(self) -> None:
        """As a producer does that never heard the old log's answer: what was counted there counts no second time."""
        writers = {f"e{index}t{thread}" for index in range(EMITTERS) for thread in range(THREADS)}
        raw = RawWriter(self.stack.endpoints.kafka_bootstrap, self.journals / "again.jsonl", AFTER, growth=1)
        for copy, _ in copies(self.old, self.random, COPY_SHARE, writers):
            raw.write(copy, "copy")
        raw.close()
        self.heard["again"] = {**self.heard["again"], "copies": raw.written}

    def grown(self, _: object) -> None:
        """To its end; then once more, which does nothing."""
        self.heard["grown"] = self._tollway("topics", "grow", str(BEFORE), str(AFTER))
        self.heard["again"] = self._tollway("topics", "grow", str(BEFORE), str(AFTER))
        self.court.grown()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    said: list[str] = []
    site = Growing(tmp_path_factory.mktemp("grow") / "data", said)
    return {**asdict(site.run()), "heard": site.heard, "said": said}


@pytest.mark.campaign
def test_nothing_is_lost_and_nothing_is_doubled(report: dict[str, Any]) -> None:
    """Every unit once on every side, no total ever back, the bill's deltas one row an account across both logs."""
    assert wrong(report) == [], report["said"]


@pytest.mark.campaign
def test_both_logs_are_proven(report: dict[str, Any]) -> None:
    """`audit verify` is green over both, each partition of each; the new log folds again to what its workers sealed."""
    assert report["audit"]["chains"] == BEFORE + AFTER
    assert report["audit"]["unproven"] == []
    assert report["seals"]["ok"], report["seals"]


@pytest.mark.campaign
def test_what_was_killed_is_finished_by_the_next_run(report: dict[str, Any]) -> None:
    """Killed twice on its way, the command ends where it should; said again, it finds nothing to do."""
    assert all(report["heard"][line] for line in KILLED_AT)
    assert (report["heard"]["grown"]["grown"], report["heard"]["grown"]["partitions"]) == (True, AFTER)
    assert report["heard"]["again"]["grown"] is False
    assert report["heard"]["again"]["copies"] >= COPIES_LEAST


@pytest.mark.campaign
def test_another_count_than_the_log_has_is_refused(report: dict[str, Any]) -> None:
    """One sentence, and nothing was changed: the traffic went on."""
    assert "FROM is 4: the log has 8 partitions" in report["heard"]["refused"]
