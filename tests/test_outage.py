"""Outages on purpose: one child of a running supervisor killed and held away by another process."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tollway.connectors.embedded import outage
from tollway.connectors.embedded import supervisor as supervisor_module
from tollway.connectors.embedded.process import Child, poll
from tollway.connectors.embedded.supervisor import AWAY_EXIT, State, Supervisor, children
from tollway.connectors.errors import Refused

DEADLINE_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in poll(DEADLINE_S):
        if condition():
            return
    pytest.fail(f"not within {DEADLINE_S:.0f} s: {what}")


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    argv = (sys.executable, "-c", "import signal; signal.pause()")
    outage.hold(tmp_path, "left-over")
    supervisor.add([Child(name, argv, lambda: True) for name in ("one", "two")])
    for name in ("one", "two"):
        supervisor.wait_ready(name)
    yield supervisor
    supervisor.hurry()
    supervisor.stop()


def test_a_held_child_is_away_until_released(supervisor: Supervisor, tmp_path: Path) -> None:
    """A file with a child's name kills that child alone and keeps it away; without the file it is started again."""
    before = {name: supervisor.pid(name) for name in ("one", "two")}
    outage.hold(tmp_path, "one")
    until(lambda: children(tmp_path)["one"]["state"] == State.KILLED.value, "one is killed")
    assert supervisor.pid("one") is None
    assert outage.held(tmp_path) == {"one": float("inf")}
    outage.release(tmp_path, "one")
    until(lambda: children(tmp_path)["one"]["state"] == State.READY.value, "one is ready again")
    assert supervisor.pid("one") not in (None, before["one"])
    assert supervisor.pid("two") == before["two"]
    assert children(tmp_path)["one"]["restarts"] == 1


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_seconds_end_an_outage(supervisor: Supervisor, tmp_path: Path, seconds: float) -> None:
    """With seconds the child comes back by itself, and the file goes."""
    before = supervisor.pid("one")
    outage.hold(tmp_path, "one", seconds)
    until(lambda: supervisor.restarts("one") == 1, "one was started again")
    supervisor.wait_ready("one")
    assert supervisor.pid("one") not in (None, before)
    assert supervisor.state("two") is State.READY
    assert outage.held(tmp_path) == {}


def test_many_outages_are_no_failures(supervisor: Supervisor, tmp_path: Path) -> None:
    """A child that is killed on purpose again and again is never given up."""
    for turn in range(8):
        outage.hold(tmp_path, "one", 0)
        until(lambda turn=turn: supervisor.restarts("one") == turn + 1, "it was started again")  # type: ignore[misc]
        supervisor.wait_ready("one")
    assert supervisor.failed() == {}


def test_a_child_waits_for_what_is_away(tmp_path: Path) -> None:
    """A child that ends while what it comes after is away is no failure: it is started again when that is back."""
    supervisor = Supervisor(tmp_path, failures_max=2)
    down = tmp_path / "away" / "broker"
    needs = f"import os, signal, sys\nwhile not os.path.exists({str(down)!r}): signal.sigtimedwait([], 0.05)\nsys.exit('gone')"
    try:
        supervisor.add(
            [
                Child("broker", (sys.executable, "-c", "import signal; signal.pause()"), lambda: True),
                Child("worker", (sys.executable, "-c", needs), lambda: True, after=("broker",)),
            ]
        )
        supervisor.wait_ready("worker")
        for turn in range(3):
            outage.hold(tmp_path, "broker")
            until(lambda: children(tmp_path)["worker"]["state"] == State.WAITING.value, "the worker ended and waits")
            assert supervisor.restarts("worker") == turn
            assert "gone" in children(tmp_path)["worker"]["reason"]
            outage.release(tmp_path, "broker")
            until(lambda turn=turn: supervisor.restarts("worker") == turn + 1, "it is started")  # type: ignore[misc]
            supervisor.wait_ready("worker")
        assert supervisor.failed() == {}
    finally:
        supervisor.hurry()
        supervisor.stop()


def test_a_child_that_says_what_it_needs_is_away_is_never_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 is no failure of the child, however often it comes; the reason is shown all the while."""
    monkeypatch.setattr(supervisor_module, "BACK_OFF_S", 0.01)
    ends = Child("worker", (sys.executable, "-c", f"raise SystemExit({AWAY_EXIT})"), lambda: False)
    supervisor = Supervisor(tmp_path, failures_max=2)
    try:
        supervisor.add([ends])
        until(lambda: supervisor.restarts("worker") >= 4, "it is started again and again")
        assert supervisor.failed() == {}
        until(lambda: f"code {AWAY_EXIT}" in children(tmp_path)["worker"]["reason"], "the reason is shown")
    finally:
        supervisor.hurry()
        supervisor.stop()


def test_a_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    """Only files of the folder can be made."""
    with pytest.raises(Refused, match="no child's name"):
        outage.hold(tmp_path, "../lock")
