"""A newer build takes over under load, worker by worker: a further schema version, then a fold that bills otherwise.

Old and new workers and emitters run side by side. The oracle, which knows both versions, compares to the unit; the log folded
again by the newer build must give what both builds sealed.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests import oracle_wire
from tests.builds import NEWER, TEAM_ID, newer_build, usage_v2
from tests.reshaping import SLACK_S, Reshaping, Step, modest, wrong
from tollway.connectors.embedded.process import poll, tail

OLD, OTHER, LATE = "worker-all", "worker-all-1", "worker-late"
IN_S = 6
TEAM = ("--more", '{"team": "blue"}')


class Rolling(Reshaping):
    """Two workers of this build, to be replaced by two of the newer one."""

    def __init__(self, data: Path, newer: dict[str, str], said: list[str]) -> None:
        steps = [
            Step("the fold's change is asked for too early", self.too_early),
            Step("the first worker is replaced", self.replace_first),
            Step("a newer emitter while an older worker has partitions", self.early_emitter),
            Step("the second worker is replaced", self.replace_second),
            Step("the fold changes", self.change),
            Step("an older worker comes back", self.comes_back),
        ]
        super().__init__(data, 1, modest(2), steps, said.append)
        self.env, self.heard = newer, dict[str, Any]()

    def too_early(self, _: object) -> None:
        self.heard["early"] = self._tollway("fold", "change", str(NEWER))

    def replace_first(self, _: object) -> None:
        self.heard["migrated"] = self._tollway("audit", "migrate")
        self.remove_worker(OLD)
        self.add_worker(OLD, self.env)

    def early_emitter(self, _: object) -> None:
        """Until the older worker has said why it stops, while the newer one goes on."""
        self.emitters.replace(1, TEAM, self.env)
        self._until(
            lambda: "deploy workers before emitters" in self._log(OTHER), "the older worker took a newer record"
        )

    def replace_second(self, _: object) -> None:
        self.remove_worker(OTHER)
        self.add_worker(OTHER, self.env)

    def change(self, _: object) -> None:
        """As soon as every partition's checkpoint is of the newer build; then until the step has come."""
        for _ in poll(SLACK_S, 1.0):
            self.heard["change"] = found = self._tollway("fold", "change", str(NEWER), "--in-s", str(IN_S))
            if "error" not in found:
                break
        self._until(
            lambda: all(row["version"] == NEWER for row in self._tollway("fold", "show")["partitions"]), "no step"
        )

    def comes_back(self, _: object) -> None:
        """It may begin again as often as its supervisor wants: it never folds."""
        from tests.reshaping import worker

        self.stack.supervisor.add([worker(self.data, LATE, self.scale)])
        self._until(
            lambda: "this worker knows up to 1: deploy the newer one" in self._log(LATE), "the older worker folds"
        )
        self.remove_worker(LATE)

    def _log(self, name: str) -> str:
        return tail(self.data / "log" / f"{name}.log", 1 << 20)

    def _until(self, holds: Any, failure: str) -> None:
        if not any(holds() for _ in poll(SLACK_S, 1.0)):
            raise TimeoutError(failure)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    oracle_wire.learn(TEAM_ID, usage_v2())
    newer, said = newer_build(tmp_path_factory.mktemp("newer")), list[str]()
    site = Rolling(tmp_path_factory.mktemp("rolling") / "data", newer, said)
    yield {**asdict(site.run()), "heard": site.heard, "said": said}
    oracle_wire.USAGE_IDS.discard(TEAM_ID)


@pytest.mark.campaign
def test_nothing_is_lost_and_nothing_is_doubled(report: dict[str, Any]) -> None:
    """Every unit under the schema and the fold of its place in the log, on every side."""
    assert wrong(report) == [], report["said"]


@pytest.mark.campaign
def test_the_log_folds_again_to_what_both_builds_sealed(report: dict[str, Any]) -> None:
    """The newer build folds the log from its first record, changes at the same one, and meets every hash."""
    assert report["seals"]["ok"], report["seals"]
    assert report["seals"]["sealed"] > 0


@pytest.mark.campaign
def test_the_change_waits_for_every_worker(report: dict[str, Any]) -> None:
    """Asked for while older builds' checkpoints stand, the change is refused by the partitions that are not ready."""
    assert "written by workers that know versions up to 1: deploy the newer build" in report["heard"]["early"]["error"]
    assert report["heard"]["change"]["version"] == NEWER


@pytest.mark.campaign
def test_the_newer_column_is_there_where_it_was_emitted(report: dict[str, Any]) -> None:
    """ClickHouse got its column before any worker wrote it."""
    assert report["heard"]["migrated"]["applied"] == ["0999_team.sql"]
