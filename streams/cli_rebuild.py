"""The command that puts state in its place again: from a sealed snapshot and the log."""

import sys
from typing import Annotated, Any, Literal

import typer

from tollway.streams.cli_words import Data, Json, read_settings, say, table

app = typer.Typer()


@app.command("rebuild")
def rebuild(
    what: Annotated[Literal["redis", "billing", "checkpoints"], typer.Argument(help="What is written anew.")],
    partition: Annotated[list[int] | None, typer.Option(help="One partition; again for more. Default: all.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Number of a sealed snapshot, or `log` for the log's first record."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only compare; exit 1 where a hash is another one.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fold a sealed snapshot and the log again, hold it against every hash on the way, and write what was lost or is wrong."""
    from tollway.streams.rebuild import run_rebuild

    found = run_rebuild(
        read_settings(data),
        what,
        lambda line: print(line, file=sys.stderr, flush=True),
        partitions=partition,
        start=start,
        dry_run=dry_run,
    )
    say(found, as_json, _print)
    raise typer.Exit(0 if found["ok"] else 1)


def _print(found: dict[str, Any]) -> None:
    rows = [
        {
            "group": row["group"],
            "partition": row["partition"],
            "from": row["from"],
            "records": row["end_offset"] - row["from_offset"],
            "compared": ", ".join(
                f"{each['what']} {'equal' if each['equal'] else 'DIFFERS'}" for each in row["boundaries"]
            ),
            "written": row["wrote"] or "nothing",
        }
        for row in found["partitions"]
    ]
    table(
        f"log {found['epoch']}: {found['compared']} hashes compared",
        rows,
        ["group", "partition", "from", "records", "compared", "written"],
    )
    if found["unread"]:
        print(f"without ClickHouse's copies: {found['unread']}")
    print("all equal" if found["ok"] else "RED: a hash is another one")
