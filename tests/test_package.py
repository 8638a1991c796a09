"""What is shipped: a wheel of exactly the three folders, whose import costs a service next to nothing."""

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("schemas", "connectors", "streams")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy so that nothing is left behind here."""
    copy, out = tmp_path_factory.mktemp("copy") / "tollway", tmp_path_factory.mktemp("out")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS, "src"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    with zipfile.ZipFile(next(out.glob("*.whl"))) as built:
        yield built


def shipped_files(folder: str) -> set[str]:
    """Every file of a folder, as its name in the wheel."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"tollway/{path.relative_to(ROOT).as_posix()}" for path in paths}


def test_the_wheel_holds_exactly_the_three_folders(wheel: zipfile.ZipFile) -> None:
    """Modules, schemas, scripts, statements and locks of the three folders, the public names, the type marker: no more."""
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {"tollway/__init__.py", "tollway/py.typed"}.union(*map(shipped_files, FOLDERS))
    assert inside == expected


def test_the_wheel_carries_data_as_well_as_code(wheel: zipfile.ZipFile) -> None:
    """Each kind of file that is read at run time is there: without one of them the comparison above would prove less."""
    suffixes = {Path(name).suffix for name in wheel.namelist()}
    assert {".py", ".avsc", ".json", ".lock", ".lua", ".sql", ".typed"} <= suffixes


def test_the_wheel_has_the_console_script(wheel: zipfile.ZipFile) -> None:
    """`tollway` is a command of the installed distribution, and what it names exists."""
    points = ConfigParser()
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points.read_string(wheel.read(name).decode())
    module, _, function = points["console_scripts"]["tollway"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_says_its_licence_and_extras(wheel: zipfile.ZipFile) -> None:
    """Licence and extras reach whoever installs it."""
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in metadata
    assert {"pipeline", "embedded", "dev"} <= {
        line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }


HEAVY = (
    "faust", "mode", "stripe", "clickhouse_connect", "chdb", "pyarrow", "pydantic", "numpy", "pandas", "redis",
    "confluent_kafka", "pyruhvro", "typer", "rich", "cryptography",
)  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `code`."""
    ask = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_tollway_is_thin() -> None:
    """A service that imports tollway, and every name it offers, loads none of the pipeline's parts; names of Redis load its client."""
    assert loaded_by("import tollway").isdisjoint(HEAVY)
    every_name = "import tollway\nfor name in tollway.__all__: getattr(tollway, name)"
    assert loaded_by(every_name).isdisjoint(set(HEAVY) - {"redis", "cryptography"})


def test_the_thinness_is_really_looked_at() -> None:
    """The look into a fresh interpreter sees a heavy part when one is loaded."""
    assert "numpy" in loaded_by("import numpy")


def test_the_lock_pins_what_the_project_needs() -> None:
    """Every package that the project names, in any extra, has one pinned version, and no address stands in the lock."""
    lines = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    assert all(line.count("==") == 1 and "/" not in line and " " not in line for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    needed = [
        *PROJECT["dependencies"],
        *(need for needs in PROJECT["optional-dependencies"].values() for need in needs),
    ]
    names = {need.partition(";")[0].strip().lower().replace("_", "-") for need in needed}
    bare = {name[: min((name.find(c) for c in "[<>=~! " if c in name), default=len(name))] for name in names}
    assert bare - pinned == {"tollway"}
