"""Workers come and go under load, two, four, one: nothing lost, nothing doubled, no total ever back."""

from dataclasses import asdict
from typing import Any

import pytest

from tests.reshaping import GROUPS, Reshaping, Step, modest, shared, wrong

PARTITIONS = 16
TWO, MORE = ["worker-all", "worker-all-1"], ["worker-all-2", "worker-all-3"]


def grow(site: Reshaping) -> None:
    """Two workers become four; each has partitions of each group before anything else happens."""
    for name in MORE:
        site.add_worker(name)
    site.spread([*TWO, *MORE], PARTITIONS)


def shrink(site: Reshaping) -> None:
    """Four become one: the first two are gone, so that no partition stays where it began."""
    for name in [*TWO, MORE[0]]:
        site.remove_worker(name)
    site.spread(MORE[1:], PARTITIONS)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    steps = [Step("two workers become four", grow), Step("four become one", shrink)]
    said: list[str] = []
    site = Reshaping(tmp_path_factory.mktemp("scaling") / "data", 1, modest(2), steps, said.append)
    return {**asdict(site.run()), "took": site.taken, "said": said}


@pytest.mark.campaign
def test_nothing_is_lost_and_nothing_is_doubled(report: dict[str, Any]) -> None:
    """Redis, ClickHouse, Stripe and the dead letters hold what the oracle computes; the audit log and the refolded log agree."""
    assert wrong(report) == [], report["said"]
    assert report["seals"]["ok"]


@pytest.mark.campaign
def test_both_changes_fell_into_the_traffic(report: dict[str, Any]) -> None:
    """Four shared every group, then one had all of it, while calls were being made."""
    assert set(report["took"]) == {"two workers become four", "four become one"}


@pytest.mark.parametrize(
    ("parts", "well"),
    [([{0, 1}, {2, 3}], True), ([{0, 1}, {1, 2, 3}], False), ([{0, 1}, {2}], False), ([{0, 1, 2, 3}, set()], False)],
)
def test_sharing_is_each_partition_once_and_something_for_each(parts: list[set[int]], well: bool) -> None:
    """Two owners of one partition, one without any, and a partition of nobody are all noticed."""
    assert shared(parts, 4) is well


def test_the_groups_are_those_that_a_worker_runs() -> None:
    """A worker of `all` is asked about each of its groups."""
    from tollway.streams import worker

    assert worker.GROUPS == GROUPS
