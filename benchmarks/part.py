"""How a part of the benchmarks is called: `python -m benchmarks.<part> [--quick] [--json] [--keep] [its own sizes]`."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import load, machine, report, say

KEPT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


@dataclass(frozen=True)
class Size:
    """How much of something: by default, and in a trial of a minute."""

    name: str
    usual: Any
    quick: Any
    help: str


def python_of(peer: str) -> Size:
    """Where a peer's interpreter is: `make bench` makes these environments, <PEER>_PYTHON names another. None: it is left out."""
    found = Path(__file__).resolve().parent.parent / ".venv" / peer / "bin" / "python"
    usual = os.environ.get(f"{peer.upper()}_PYTHON", str(found) if found.exists() else "")
    return Size(f"{peer}-python", usual, usual, f"interpreter with benchmarks/{peer}.txt installed")


def run(name: str, doc: str | None, sizes: list[Size], measure: Callable[..., dict[str, Any]]) -> int:
    """Measure, say what on, print; `--keep` writes docs/benchmarks/NAME.json."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for size in sizes:
        several = {"nargs": "+"} if isinstance(size.usual, list) else {}
        kind = type(size.usual[0] if several else size.usual)
        parser.add_argument(f"--{size.name}", type=kind, help=f"{size.help} (default {size.usual})", **several)  # type: ignore[arg-type]
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--keep", nargs="?", const=name, metavar="NAME", help=f"write docs/benchmarks/NAME.json (default {name})"
    )
    arguments = parser.parse_args()
    given = {}
    for size in sizes:
        key = size.name.replace("-", "_")
        told = getattr(arguments, key)
        given[key] = told if told is not None else size.quick if arguments.quick else size.usual
    on, began = machine(), time.monotonic()
    say(f"{name}: {on['cpu']}, {on['cores']} cores, load {on['load_1m']}, Python {on['python']}")
    told = {key: value for key, value in given.items() if not key.endswith("_python")}
    found = {"machine": on, "given": told, **measure(**given)}
    found["took_s"], found["load_1m_at_end"] = round(time.monotonic() - began), load()
    if arguments.keep:
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{arguments.keep}.json").write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    report(found, arguments.json)
    return 0
