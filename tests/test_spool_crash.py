"""The spool at every single change it makes to the disk: killed there, or refused there. All of them, by tests.spool_crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import spool_crash

STEPS = 24
"""A short life; `python -m tests.spool_crash FOLDER SEED KIND WHEN_FULL 70` is a long one."""


@pytest.mark.parametrize(
    ("kind", "seed", "when_full"), [("halfway", 3, "drop_oldest"), ("full", 5, "refuse"), ("full", 5, "drop_oldest")]
)
def test_cut_at_every_change(tmp_path: Path, kind: str, seed: int, when_full: str) -> None:
    """Killed before or inside of each write, rename, unlink and sync in turn, or refused four of them for a full disk, and
    its successor cut as well: all that emit() returned reaches the log, in order, no identity twice, every refusal counted.
    """
    command = [sys.executable, "-m", "tests.spool_crash", str(tmp_path), str(seed), kind, when_full, str(STEPS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr[-2_000:]
    found = json.loads(run.stdout)
    assert found["wrong"] == []
    assert found["changes"] > 50
    assert {"open", "write", "rename", "unlink"} <= set(found["kinds"])
    assert os.listdir(tmp_path)


def test_the_sweep_notices(tmp_path: Path) -> None:
    """An event that is removed from what the log has is found missing: the comparison can fail."""
    assert spool_crash.one(tmp_path / "a", 3, "whole", 0, "refuse", ("whole", 0), STEPS)[0] == []
    path = tmp_path / "a" / "journal"
    found = spool_crash.read(path)
    missing = found.log.pop(7)
    assert any("lost" in fault for fault in spool_crash.faults(found, "killed", "refuse", [])), missing
