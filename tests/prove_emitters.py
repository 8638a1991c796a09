"""The emitting processes of a campaign, and the successor of the one that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.prove_scale import EMITTERS, THREADS, Scale

ROOT = Path(__file__).resolve().parent.parent
END_DEADLINE_S = 5


class Emitters:
    """Each runs `tests.emitter_process` on a spool of its own."""

    def __init__(self, bootstrap: str, folder: Path, seed: int, scale: Scale) -> None:
        self.bootstrap, self.folder, self.seed, self.scale = bootstrap, folder, seed, scale
        self.each = -(-scale.events // (EMITTERS * THREADS))
        self.rate = scale.rate / EMITTERS
        self.running = {f"e{index}": self._start(index, 0) for index in range(EMITTERS)}

    def _start(
        self, index: int, life: int, more: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "tests.emitter_process", "--bootstrap", self.bootstrap, "--name", f"e{index}"]
        argv += ["--spool", str(self.folder / f"spool-e{index}"), "--journals", str(self.folder / "journals")]
        argv += ["--index", str(index), "--life", str(life), "--seed", str(self.seed), "--events", str(self.each)]
        argv += ["--threads", str(THREADS), "--writers", str(EMITTERS * THREADS), "--rate", str(self.rate)]
        argv += ["--accounts", str(self.scale.accounts), "--principals", str(self.scale.principals_each)]
        whole = {**os.environ, **(env or {})}
        return subprocess.Popen([*argv, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=whole)

    def journal_bytes(self, index: int, life: int) -> int:
        """How much one life has written of what it began and what returned."""
        path = self.folder / "journals" / f"e{index}.{life}.jsonl"
        return path.stat().st_size if path.exists() else 0

    def spooled_bytes(self, index: int) -> int:
        """What lies in a spool: acknowledged segments are deleted."""
        folder = self.folder / f"spool-e{index}"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def replace(self, index: int, more: Sequence[str] = (), env: Mapping[str, str] | None = None) -> str:
        """kill −9, and a successor on the same spool, told `more`. Returns what the dead one was doing."""
        dying = self.running[f"e{index}"]
        before, at = self.journal_bytes(index, 0), time.monotonic()
        while self.journal_bytes(index, 0) == before:
            if dying.poll() is not None or time.monotonic() > at + END_DEADLINE_S:
                raise RuntimeError(f"emitter e{index} was idle or had ended before it could be killed")
            time.sleep(0.001)
        dying.send_signal(signal.SIGKILL)
        dying.wait()
        doing = f"emitting, {self.spooled_bytes(index)} bytes in its spool"
        self.running[f"e{index}"] = self._start(index, 1, more, env)
        return doing

    def done(self) -> bool:
        return all(process.poll() is not None for process in self.running.values())

    def ask_to_end(self) -> None:
        """Each emits no more, sends what it has, and ends."""
        for process in self.running.values():
            process.terminate()

    def finish(self, deadline_s: float = END_DEADLINE_S) -> list[str]:
        """What is wrong with their ends."""
        wrong = []
        for name, process in self.running.items():
            try:
                out, _ = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                process.kill()
                wrong.append(f"{name} did not end")
                continue
            if process.returncode:
                wrong.append(f"{name} ended with {process.returncode}: {out[-300:]}")
        return wrong

    def kill(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()
