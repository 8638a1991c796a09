"""Named places where a test kills the worker: off unless `<data>/failpoint.<group>` says `<name>:<k>`."""

import os
import signal
import sys
from pathlib import Path


class Failpoints:
    """Armed at start by a file, or by TOLLWAY_FAILPOINT, that reads `<name>:<k>`: die by SIGKILL at the k-th pass of that name."""

    def __init__(self, name: str = "", passes: int = 0, armed_by: Path | None = None) -> None:
        self._name, self._left, self._armed_by = name, passes, armed_by

    @classmethod
    def read(cls, data: Path, group: str) -> "Failpoints":
        """Armed by the file of this group, else by the environment, else off."""
        path = data / f"failpoint.{group}"
        text = path.read_text(encoding="utf-8") if path.exists() else os.environ.get("TOLLWAY_FAILPOINT", "")
        name, _, passes = text.strip().partition(":")
        return cls(name, int(passes or 1), path) if name else cls()

    def hit(self, name: str) -> None:
        """Pass a place. The arming file is removed first, so that the next life is not killed again."""
        if name != self._name:
            return
        self._left -= 1
        if self._left > 0:
            return
        if self._armed_by is not None and self._still_armed(self._armed_by):
            self._armed_by.unlink(missing_ok=True)
        sys.stderr.write(f"failpoint {name} hit\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def _still_armed(self, path: Path) -> bool:
        """A replica that was armed by the same file may have been here first, and the file say another name by now."""
        return path.exists() and path.read_text(encoding="utf-8").partition(":")[0] == self._name
