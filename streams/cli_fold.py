"""Commands about the version by which the log is folded: see it, and let the next one count from a step on."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from tollway.streams.cli_words import Data, Json, do, read_settings, say, table

app = typer.Typer()
fold_app = typer.Typer(no_args_is_help=True, help="By which version the log is folded.")
app.add_typer(fold_app, name="fold")


@fold_app.command("show")
def fold_show(data: Data = None, as_json: Json = False) -> None:
    """By which version each partition is folded, what the log has told, and what its workers know."""
    from tollway.streams.fold_change import fold_versions

    say(do(fold_versions(read_settings(data))), as_json, _print)


def _print(shown: dict[str, Any]) -> None:
    rows = [{**row, "changes": _changes(row["changes"])} for row in shown["partitions"]]
    title = f"log {shown['epoch']}: this build knows versions up to {shown['known']}"
    table(title, rows, ["group", "partition", "version", "changes", "worker"])


def _changes(changes: dict[int, int]) -> str:
    return ", ".join(f"{version} from {_time(at_s)}" for version, at_s in changes.items())


def _time(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="seconds")


@fold_app.command("change")
def fold_change(
    version: Annotated[int, typer.Argument(help="The next version.")],
    in_s: Annotated[int, typer.Option(min=0, max=86_400 * 30, help="Seconds from now until it counts.")] = 60,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Let the next version count from the first step at or past a time; refused while a worker does not know it."""
    from tollway.streams.fold_change import change_fold

    done = do(change_fold(read_settings(data), version, in_s))
    say(
        done,
        as_json,
        lambda _: print(
            f"version {done['version']} counts from {_time(done['at_s'])} UTC on"
            + ("" if done["offsets"] else ": the log had that already")
        ),
    )
