"""The services of a crash campaign as children of a supervisor: each death is followed by a life with a journal of its own.

`python -m tests.crash_lives --name e0 …` is a life of an emitting service: `tests.emitter_process` under the next free name.
"""

import argparse
import os
import sys
from pathlib import Path

from tests import emitter_process
from tests.prove_emitters import ROOT
from tollway.connectors.embedded.process import Child
from tollway.connectors.embedded.stack import Endpoints
from tollway.connectors.embedded.supervisor import Supervisor

STOP_DEADLINE_S = 90.0
"""From SIGTERM on: the spool is flushed meanwhile."""


def next_life(journals: Path, name: str) -> int:
    """A number that no journal of this name has yet."""
    return sum(1 for _ in journals.glob(f"{name}.*.jsonl"))


def journal_bytes(journals: Path, name: str) -> int:
    """What all lives of a service have written: it grows where one works."""
    return sum(path.stat().st_size for path in journals.glob(f"{name}.*.jsonl"))


def spooled_bytes(spool: Path) -> int:
    """What lies in a spool: acknowledged segments are deleted, also this moment."""
    found = 0
    for folder, _, names in os.walk(spool):
        for name in names:
            try:
                found += (Path(folder) / name).stat().st_size
            except FileNotFoundError:
                continue
    return found


class Services:
    """Emitters and gates, supervised beside the stack: they are stopped before it."""

    def __init__(self, data: Path, journals: Path) -> None:
        self.data, self.journals = data / "services", journals
        self.supervisor = Supervisor(self.data)
        self.names: list[str] = []

    def start(self, children: list[Child]) -> None:
        """Returns when all of them run."""
        self.names += [child.name for child in children]
        self.supervisor.add(children)
        for child in children:
            self.supervisor.wait_ready(child.name)

    def spool(self, name: str) -> Path:
        """A service's folder, the same for all its lives."""
        return self.data / f"spool-{name}"

    def emitter(self, name: str, where: Endpoints, seed: int, per_s: float, accounts: int, principals: int) -> Child:
        """A service that emits."""
        argv = [sys.executable, "-m", "tests.crash_lives", "--name", name, "--journals", str(self.journals)]
        argv += ["--bootstrap", where.kafka_bootstrap, "--spool", str(self.spool(name)), "--seed", str(seed)]
        argv += ["--accounts", str(accounts), "--principals", str(principals), "--rate", str(per_s)]
        return self._child(name, argv)

    def gate(self, name: str, where: Endpoints, seed: int, per_s: float, grace_s: int) -> Child:
        """A service whose calls a gate lets pass."""
        argv = [sys.executable, "-m", "tests.crash_gate", "--name", name, "--journals", str(self.journals)]
        argv += ["--bootstrap", where.kafka_bootstrap, "--redis", where.redis_url, "--spool", str(self.spool(name))]
        argv += ["--seed", str(seed), "--rate", str(per_s), "--grace-s", str(grace_s)]
        return self._child(name, argv)

    def _child(self, name: str, argv: list[str]) -> Child:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return Child(
            name,
            tuple(argv),
            ready=lambda: True,
            env={"PYTHONPATH": path},
            stop_deadline_s=STOP_DEADLINE_S,
        )

    def written(self, name: str) -> int:
        return journal_bytes(self.journals, name)

    def stop(self) -> None:
        """All flushed and closed."""
        self.supervisor.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--journals", type=Path, required=True)
    known, rest = parser.parse_known_args()
    name = f"{known.name}.{next_life(known.journals, known.name)}"
    events = ["--events", "1000000000", "--writers", "1000"]
    sys.argv = [sys.argv[0], "--name", name, "--journals", str(known.journals), *events, *rest]
    return emitter_process.main()


if __name__ == "__main__":
    sys.exit(main())
