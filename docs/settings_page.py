"""Prints docs/settings.md: every setting of workers and CLI, from the class that reads them. `make docs` writes the page."""

from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from tollway.streams.settings import PREFIX, Settings

HEAD = """# Settings

Workers and the `tollway` command read these once, at start: from the environment; else, for the endpoints of a local stack,
from `stack.json` in its data folder; else the default. A wrong value is refused in one sentence. Services need none of them:
the SDK takes arguments.

This page is generated from `streams/settings.py` (`make docs`); a test holds the two together.

| setting | default | bounds | meaning |
|---|---|---|---|
"""

ELSEWHERE = """
Read where they are used, not by workers in production:

| variable | default | meaning |
|---|---|---|
| `TOLLWAY_SPOOL_DIR` | `$XDG_STATE_HOME/tollway/spool` | the emitter's spool where the service names no `spool_dir` |
| `TOLLWAY_MAVEN_URL` | Maven Central | repository that the local stack fetches Kafka's jars from; each is checked by SHA-256 |
| `TOLLWAY_FAILPOINT` | – | tests only: `name:k` kills the worker at the k-th pass of a named point |
"""


def row(name: str, field: FieldInfo) -> str:
    """One line of the table."""
    cells = (
        f"`{PREFIX}{name.upper()}`",
        default(field.default),
        bounds(field),
        escaped(field.description or ""),
    )
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Text that stands in a table's cell as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def default(value: Any) -> str:
    """The default as one would write it in the environment; – where there is none."""
    shown = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(shown, bool):
        shown = str(shown).lower()
    return "–" if shown in (None, "") else f"`{shown}`"


def bounds(field: FieldInfo) -> str:
    """The values that are taken, where not any value of the type is."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    words = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "pattern": "`{}`"}
    said = [
        words[name].format(getattr(rule, name).replace("|", "\\|") if name == "pattern" else getattr(rule, name))
        for rule in field.metadata
        for name in words
        if getattr(rule, name, None) is not None
    ]
    return ", ".join(said)


if __name__ == "__main__":
    print(HEAD + "\n".join(row(name, field) for name, field in Settings.model_fields.items()))
    print(ELSEWHERE, end="")
