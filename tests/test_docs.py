"""The docs are true as far as a program can tell: links lead somewhere, settings and commands are all there, the example runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from tests.house_rules import LAYERS, sources
from tollway.streams import cli
from tollway.streams.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(text: str) -> list[str]:
    """Targets of a page's relative links, outside of its code."""
    prose = re.sub(
        r"```.*?```|`[^`\n]*`",
        lambda code: " " * len(code[0]) if code[0].startswith("```") else "code",
        text,
        flags=re.S,
    )
    return [
        target.partition("#")[0] for target in LINK.findall(prose) if "://" not in target and not target.startswith("#")
    ]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Every relative link of every page names a file or a folder that is there."""
    page = PAGES[name]
    broken = [target for target in links(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()]
    assert broken == []


def test_links_are_found() -> None:
    """A link in prose is seen, one in code or to elsewhere is not."""
    assert links("[a](b.md#c) [d](https://e) `[f](g)` [`h`](i)\n```\n[j](k)\n```\n") == ["b.md", "i"]


def test_every_guarantee_names_its_test() -> None:
    """Each sentence of the guarantees, and each promise of the README, ends in a link to a test."""
    text = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    promises = (ROOT / "README.md").read_text(encoding="utf-8").partition("## It promises")[2].partition("\n## ")[0]
    for page in (text, promises):
        items = re.findall(r"^- (.*?)(?=\n- |\n\n|\Z)", page, flags=re.S | re.M)
        assert items
        assert [item for item in items if "tests/test_" not in item] == []


def test_the_settings_page_is_the_settings() -> None:
    """docs/settings.md is what `make docs` would write: every setting with default, bounds and meaning."""
    made = subprocess.run([sys.executable, ROOT / "docs/settings_page.py"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == made.stdout, "run `make docs`"
    for name, field in Settings.model_fields.items():
        assert f"`{PREFIX}{name.upper()}`" in made.stdout
        assert field.description, f"{name} has no description"


def test_every_variable_of_the_environment_is_documented() -> None:
    """What any module reads from the environment stands on the settings page."""
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    used = {
        name for module in sources(*LAYERS) for name in re.findall(r"TOLLWAY_[A-Z][A-Z_]*[A-Z](?![A-Z_])", module.text)
    }
    assert {name for name in used if f"`{name}`" not in page} == set()


def commands() -> dict[str, str | None]:
    """`account open` and the like → its help."""
    found = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found |= {f"{name} {sub}": below[sub].help for sub in below} if below else {name: command.help}
    return found


def test_every_command_is_documented() -> None:
    """Each command of the CLI has help of its own and stands on the page for operators."""
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    assert [name for name, text in commands().items() if f"tollway {name}" not in page or not text] == []


def test_documented_commands_exist() -> None:
    """No page names a command that is not there."""
    known = commands()
    for name, page in PAGES.items():
        said = re.findall(r"`tollway ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", page.read_text(encoding="utf-8"))
        unknown = [
            words
            for words in said
            if not any(words == k or words.split()[0] == k or k.startswith(words + " ") for k in known)
        ]
        assert unknown == [], name


def test_the_readme_is_a_screen_and_a_half() -> None:
    """200 to 500 words, and CONTRIBUTING at most 80 lines."""
    assert 200 <= len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 500
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_readme_s_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the README, taken from the page, emits one valid event, with no Kafka there."""
    monkeypatch.setenv("TOLLWAY_SPOOL_DIR", str(tmp_path))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = ast.parse(re.search(r"```python\n(.*?)```", text, flags=re.S)[1])  # type: ignore[index]
    sending = tree.body.pop()
    assert isinstance(sending, ast.With)
    names: dict[str, object] = {}
    exec(compile(tree, "README.md", "exec"), names)
    emitter, search = names["emitter"], names["search"]
    assert search("u-7", "Toll") == ["Tolls"]  # type: ignore[operator]
    assert emitter.counters["emitted"] == emitter.counters["waiting"] == 1  # type: ignore[attr-defined]
    assert emitter.close_sync(0.0)  # type: ignore[attr-defined]
