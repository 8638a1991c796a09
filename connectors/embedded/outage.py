"""Outages on purpose: any process can kill -9 one child of a running stack and hold it away.

While the file `DATA/away/<child>` is there, the stack's supervisor keeps that child (kafka, valkey, clickhouse, stripe,
worker-accounts …) killed: it dies by kill -9 within about 0.2 s of the file's making and is not started again. A text in the file
is the number of seconds until the supervisor removes the file itself; 0 is a kill and a start. When the file is gone the
child is started again like after any crash, without counting as a failure. In a shell: `echo 20 > DATA/away/kafka`.
What came of it stands in `DATA/run/children.json` (`supervisor.children`). Files of an earlier run are removed at start.
"""

import math
from pathlib import Path

from tollway.connectors.embedded.process import write_atomically
from tollway.connectors.errors import Refused


def hold(data: Path, name: str, seconds: float | None = None) -> None:
    """Kill -9 `name` in the stack that runs in `data` and hold it away, until `release` where no `seconds` are given."""
    write_atomically(_file(data, name), "" if seconds is None else f"{seconds:g}\n")


def release(data: Path, name: str) -> None:
    """Let `name` be started again. Nothing happens where it is not held."""
    _file(data, name).unlink(missing_ok=True)


def held(data: Path) -> dict[str, float]:
    """name → seconds it is to stay away; infinite where it waits for `release`."""
    found = {}
    for path in _folder(data).glob("*"):
        if path.suffix != ".new":
            try:
                text = path.read_text().strip()
                found[path.name] = float(text) if text else math.inf
            except FileNotFoundError:  # released this moment
                continue
            except ValueError:
                found[path.name] = math.inf
    return found


def release_all(data: Path) -> None:
    """At a stack's start."""
    for path in _folder(data).glob("*"):
        path.unlink(missing_ok=True)


def _folder(data: Path) -> Path:
    return data / "away"


def _file(data: Path, name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise Refused(f"{name!r} is no child's name: give one of DATA/run/children.json, such as kafka")
    return _folder(data) / name
