"""Commands that make the places of a deployment, and check them before anything is sent there."""

import sys
from typing import Annotated, Any

import typer

from tollway.streams.cli_looks import audit_app, schema_app
from tollway.streams.cli_words import Data, Json, do, read_settings, say

app = typer.Typer()
topics_app = typer.Typer(no_args_is_help=True, help="The topics of a log.")
app.add_typer(topics_app, name="topics")

SingleBroker = Annotated[
    bool,
    typer.Option(
        "--single-broker",
        help="Declare that one broker, whose disk is the only copy, is meant: as TOLLWAY_REPLICATION=1, which workers need.",
    ),
]


def _declared(single_broker: bool) -> dict[str, Any]:
    return {"replication": 1} if single_broker else {}


@topics_app.command("create")
def topics_create(single_broker: SingleBroker = False, data: Data = None, as_json: Json = False) -> None:
    """Create the topics, the first checkpoints and log.open; finishes what an interrupted run began, refuses unsafe ones."""
    from tollway.streams.bootstrap import create

    done = do(create(read_settings(data, **_declared(single_broker))))
    say(
        done,
        as_json,
        lambda _: print(f"log {done['epoch']}: {done['partitions']} partitions, {len(done['opened'])} opened now"),
    )


@topics_app.command("check")
def topics_check(single_broker: SingleBroker = False, data: Data = None, as_json: Json = False) -> None:
    """Say what is missing or unsafe about the topics, why, and what to do; exit 1 where anything is."""
    from tollway.streams.topic_faults import topics_faults

    faults = do(topics_faults(read_settings(data, **_declared(single_broker))))
    say(
        {"faults": [fault.to_json() for fault in faults]},
        as_json,
        lambda _: print("\n".join(map(str, faults)) if faults else "topics are as they must be"),
    )
    raise typer.Exit(1 if faults else 0)


@topics_app.command("grow")
def topics_grow(
    start: Annotated[int, typer.Argument(metavar="FROM", help="Partitions of the log now.")],
    to: Annotated[int, typer.Argument(metavar="TO", help="Partitions of the log that takes over: a power of two.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Let a log of more partitions take over, under traffic; finishes what an interrupted run began."""
    from tollway.streams.grow import grow

    done = do(grow(read_settings(data), start, to, lambda line: print(line, file=sys.stderr, flush=True)))
    say(
        done,
        as_json,
        lambda _: print(
            f"log {done['epoch']}: {done['partitions']} partitions"
            + ("" if done["grown"] else ", as it had already; nothing to do")
        ),
    )


@audit_app.command("migrate")
def audit_migrate(data: Data = None, as_json: Json = False) -> None:
    """Create ClickHouse's database and tables, and apply what a newer Tollway adds; repeats what was interrupted."""
    from tollway.streams.wiring import audit_store

    store = audit_store(read_settings(data))
    try:
        done = store.migrate()
    finally:
        store.close()
    say(
        {"database": store.database, "applied": done},
        as_json,
        lambda _: print(f"{store.database}: {', '.join(done) if done else 'nothing to do, it has all tables'}"),
    )


@schema_app.command("publish")
def schema_publish(data: Data = None, as_json: Json = False) -> None:
    """Give the schema registry every committed version that it lacks, under the rule FULL_TRANSITIVE."""
    from tollway.streams.schema_registry import publish

    rows = do(publish(read_settings(data)))
    say(
        {"versions": rows},
        as_json,
        lambda _: print(
            "\n".join(f"{row['subject']} {row['version']}: {'added' if row['added'] else 'there'}" for row in rows)
        ),
    )
