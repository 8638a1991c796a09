"""The command line: one command a job, every answer also as `--json`, every failure one sentence with its cure."""

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from tollway.connectors.errors import Refused, TollwayError, Unavailable
from tollway.schemas.evolution import SchemaError
from tollway.streams import cli_accounts, cli_control, cli_fold, cli_looks, cli_rebuild, cli_setup
from tollway.streams.cli_words import Data, Json, do, read_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Usage metering as a fold of one log.",
)


@app.command()
def up(
    data: Data = None,
    test_windows: Annotated[
        bool, typer.Option(help="A new log gets billing windows of 10 s, grace 5 s, snapshots 60 s.")
    ] = False,
    workers: Annotated[bool, typer.Option(help="Start the workers too.")] = True,
) -> None:
    """Start Kafka, Valkey, ClickHouse's engine, the Stripe stand-in and the workers; stop them with Ctrl-C."""
    from tollway.streams.local import run_up

    run_up(read_settings(data), test_windows=test_windows, workers=workers)


@app.command()
def demo(
    data: Data = None,
    seconds: Annotated[int, typer.Option(min=5, max=3600, help="How long the sample services call.")] = 30,
    plant_fault: Annotated[
        bool, typer.Option(help="Plant one lost and one doubled unit: the demo must notice.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start everything, run sample services, and show that Kafka, ClickHouse, Redis and Stripe agree to the unit."""
    from tollway.streams.demo import run_demo

    raise typer.Exit(run_demo(read_settings(data), seconds=seconds, plant_fault=plant_fault, as_json=as_json))


@app.command()
def worker(
    group: Annotated[str, typer.Option(help="accounts, audit, stripe or all.")] = "all",
    data: Data = None,
) -> None:
    """Run one worker until SIGTERM; more of them share the partitions. Exit 75: a part is away, start it again."""
    from tollway.streams.app import run
    from tollway.streams.topic_faults import refuse_unsafe
    from tollway.streams.worker import GROUPS

    if group != "all" and group not in GROUPS:
        raise Refused(f"--group is {group!r}: give one of {', '.join(GROUPS)}, all")
    settings = read_settings(data)
    with suppress(Unavailable):  # that is the folds' to say; what Kafka refuses is one sentence, before Faust connects
        do(refuse_unsafe(settings))
    failure = run(settings, list(GROUPS) if group == "all" else [group])
    if isinstance(failure, Unavailable):
        sys.stderr.write(f"tollway: {failure}\n")
        raise typer.Exit(os.EX_TEMPFAIL)
    if failure is not None:
        raise failure


@app.command()
def ingest(data: Data = None) -> None:
    """Take usage as CloudEvents over HTTP, and Stripe's webhooks, until SIGTERM."""
    from tollway.streams.ingest import serve

    do(serve(read_settings(data)))


app.add_typer(cli_setup.app)
app.add_typer(cli_control.app)
app.add_typer(cli_accounts.app)
app.add_typer(cli_looks.app)
app.add_typer(cli_rebuild.app)
app.add_typer(cli_fold.app)


def main() -> None:
    """Entry point: failures of ours are one sentence and exit 1, Ctrl-C is 130."""
    try:
        app()
    except (TollwayError, SchemaError) as error:
        sys.stderr.write(f"tollway: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
