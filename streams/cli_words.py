"""What every command shares: the options that all have, and how an answer is printed."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tollway.streams import settings as settings_module
from tollway.streams.settings import Settings

WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""

Data = Annotated[Path | None, typer.Option("--data", help="Folder of the local stack and the signing key.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def say(answer: Any, as_json: bool, text: Callable[[Any], None] | None = None) -> None:
    """Print an answer for a person, or as JSON."""
    if as_json or text is None:
        print(json.dumps(answer, default=str, ensure_ascii=False))
    else:
        text(answer)


def table(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows of equal keys."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        right = bool(rows) and isinstance(rows[0].get(column), int)
        shown.add_column(column, justify="right" if right else "left")
    for row in rows:
        shown.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(shown)


def read_settings(data: Path | None, **more: Any) -> Settings:
    """Settings with the command line's over all."""
    return settings_module.read(**({"data": data} if data else {}), **more)


def do(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end."""
    return asyncio.run(work)
