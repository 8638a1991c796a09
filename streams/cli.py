"""The command line: one command a job, every answer also as `--json`, every failure one sentence with its cure."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tollway.connectors.errors import Refused, TollwayError
from tollway.schemas.evolution import SchemaError
from tollway.streams import settings as settings_module
from tollway.streams.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Usage metering as a fold of one log.",
)
account_app = typer.Typer(no_args_is_help=True, help="Billable organisations.")
customer_app = typer.Typer(no_args_is_help=True, help="Who pays at Stripe for an account.")
policy_app = typer.Typer(no_args_is_help=True, help="What is counted for an account, and its limits.")
meter_app = typer.Typer(no_args_is_help=True, help="What is measured.")
price_app = typer.Typer(no_args_is_help=True, help="Immutable price versions.")
topics_app = typer.Typer(no_args_is_help=True, help="The topics of a log.")
dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: what was refused, and why.")
audit_app = typer.Typer(no_args_is_help=True, help="Proof over the audit log.")
schema_app = typer.Typer(no_args_is_help=True, help="The contracts.")
for name, sub in (
    ("account", account_app),
    ("customer", customer_app),
    ("policy", policy_app),
    ("meter", meter_app),
    ("price", price_app),
    ("topics", topics_app),
    ("dlq", dlq_app),
    ("audit", audit_app),
    ("schema", schema_app),
):
    app.add_typer(sub, name=name)

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


# -- running ---------------------------------------------------------------------------------------------------------


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
    """Run one worker until SIGTERM; more of them share the partitions."""
    from tollway.streams.app import run
    from tollway.streams.worker import GROUPS

    if group != "all" and group not in GROUPS:
        raise Refused(f"--group is {group!r}: give one of {', '.join(GROUPS)}, all")
    failure = run(read_settings(data), list(GROUPS) if group == "all" else [group])
    if failure is not None:
        raise failure


# -- commands of the control plane -----------------------------------------------------------------------------------


def append(data: Path | None, account: str, kind: str, body: dict[str, Any], as_json: bool) -> None:
    """Sign and append one command; print where it stands in the log."""
    from tollway.streams.control_plane import append_command

    where = do(append_command(read_settings(data), account, kind, body))
    answer = {"kind": kind, "account": account, "body": body, "offsets": where}
    say(answer, as_json, lambda _: print(f"{kind} {account}: in the log at {_places(where)}"))


def _places(where: dict[int, int]) -> str:
    if len(where) > 1:
        return f"{len(where)} partitions"
    return ", ".join(f"partition {partition}, offset {offset}" for partition, offset in where.items())


@account_app.command("open")
def account_open(account: str, name: str = "", data: Data = None, as_json: Json = False) -> None:
    """Open an account; usage of an unknown account is dead-lettered."""
    append(data, account, "account.open", {"name": name} if name else {}, as_json)


@customer_app.command("bind")
def customer_bind(
    account: str,
    customer: Annotated[str | None, typer.Argument(help="Stripe's customer id, such as cus_123.")] = None,
    create_at_stripe: Annotated[bool, typer.Option(help="Without CUSTOMER: make one for this account.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Bind an account to the Stripe customer that pays for it; Stripe is asked whether it is there."""
    from tollway.streams.looks import customer_of

    if customer is None and not create_at_stripe:
        raise Refused("CUSTOMER is missing: give Stripe's customer id, or --create-at-stripe")
    found = do(customer_of(read_settings(data), account, customer))
    append(data, account, "customer.bind", {"customer": found}, as_json)


@policy_app.command("set")
def policy_set(
    account: str,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="JSON body: counts, limits, outage, max_staleness_s; - = standard input."),
    ] = None,
    count: Annotated[
        list[str] | None, typer.Option(help="meter:windows:scopes, such as tokens_in:m,h,d:acct,principal")
    ] = None,
    limit: Annotated[list[str] | None, typer.Option(help="scope=meter=window=limit, such as acct=calls=d=1000")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say which meters x windows x scopes are counted for an account, and their limits."""
    from tollway.streams.control_plane import policy_body

    append(data, account, "policy.set", policy_body(file, count or [], limit or []), as_json)


@meter_app.command("add")
def meter_add(
    meter: str,
    event_name: Annotated[
        str | None, typer.Option(help="Stripe's event name; without one it is counted, not billed.")
    ] = None,
    create_at_stripe: Annotated[
        bool, typer.Option(help="Create Stripe's meter, formula sum, where it is missing.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Declare a meter, in every partition. At Stripe it must be there with formula sum; --create-at-stripe makes it so."""
    if event_name and create_at_stripe:
        from tollway.streams.looks import ensure_meter

        do(ensure_meter(read_settings(data), event_name))
    append(data, "*", "meter.add", {"meter": meter, "event_name": event_name}, as_json)


@price_app.command("add")
def price_add(
    price_ref: str,
    asset: Annotated[str, typer.Option(help="Such as USD.")],
    unit_nano: Annotated[list[str], typer.Option(help="meter=nano units a unit, such as tokens_in=3000")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Add an immutable price version, in every partition."""
    from tollway.streams.control_plane import price_body

    append(data, "*", "price.add", price_body(price_ref, asset, unit_nano), as_json)


@topics_app.command("create")
def topics_create(data: Data = None, as_json: Json = False) -> None:
    """Create the topics, the first checkpoints and log.open; finishes what an interrupted run began."""
    from tollway.streams.bootstrap import create

    done = do(create(read_settings(data)))
    say(
        done,
        as_json,
        lambda _: print(f"log {done['epoch']}: {done['partitions']} partitions, {len(done['opened'])} opened now"),
    )


@topics_app.command("check")
def topics_check(data: Data = None, as_json: Json = False) -> None:
    """Say what is missing or unsafe about the topics; exit 1 where anything is."""
    from tollway.streams.control_plane import topics_faults

    faults = do(topics_faults(read_settings(data)))
    say({"faults": faults}, as_json, lambda _: print("\n".join(faults) if faults else "topics are as they must be"))
    raise typer.Exit(1 if faults else 0)


# -- ways to look ----------------------------------------------------------------------------------------------------


@app.command()
def quota(account: str, data: Data = None, as_json: Json = False) -> None:
    """What Redis says an account has used, by scope, meter and window."""
    from tollway.streams.looks import quota_of

    rows = do(quota_of(read_settings(data), account))
    say(
        rows,
        as_json,
        lambda _: table(
            f"{account}: lane {rows['lane']}, {rows['state']}",
            rows["totals"],
            ["scope", "meter", "window", "start", "used", "held", "limit"],
        ),
    )


@app.command()
def usage(
    account: str,
    hours: Annotated[int, typer.Option(min=1, help="How far back.")] = 24,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """What ClickHouse says an account has used, by operation and principal."""
    from tollway.streams.audit_looks import usage_of

    rows = do(usage_of(read_settings(data), account, hours))
    say(
        {"account": account, "rows": rows},
        as_json,
        lambda _: table(f"{account}, last {hours} h", rows, list(rows[0]) if rows else ["no usage"]),
    )


@app.command("meter-events")
def meter_events(account: str, data: Data = None, as_json: Json = False) -> None:
    """The account's meter events beside what Stripe has, by meter and hour."""
    from tollway.streams.looks import meter_events_of

    found = do(meter_events_of(read_settings(data), account))
    say(
        found,
        as_json,
        lambda _: table(
            f"{account}: {found['customer'] or 'no customer'}",
            found["rows"],
            ["customer", "meter", "hour", "events", "units", "stripe_units", "agree"],
        ),
    )


@app.command()
def status(data: Data = None, as_json: Json = False) -> None:
    """Groups, partitions, lag, log time, staleness, age of checkpoints, holes."""
    from tollway.streams.status import status as read_status

    found = do(read_status(read_settings(data)))
    say(found, as_json, _print_status)


def _print_status(found: dict[str, Any]) -> None:
    columns = [
        "partition",
        "end",
        "next_offset",
        "lag",
        "staleness_s",
        "checkpoint_age_s",
        "checkpoint_bytes",
        "missing",
        "duplicates",
    ]
    for group, rows in found["groups"].items():
        table(f"{group}: lag {rows['lag']}, refused {sum(rows['refused'].values())}", rows["partitions"], columns)
    print(f"log {found['epoch']}, {found['dead_letters']} dead letters")


@app.command()
def doctor(data: Data = None, as_json: Json = False) -> None:
    """Look at every connection, right, setting and clock, and say what is wrong; exit 1 where anything is."""
    from tollway.streams.doctor import examine
    from tollway.streams.examination import Finding

    def tell(found: Finding) -> None:
        cure = f"; {found.cure}" if found.cure else ""
        print(f"{'ok ' if found.ok else 'BAD'}  {found.part}: {found.what}{cure}", flush=True)

    findings = do(examine(read_settings(data), on_found=(lambda _: None) if as_json else tell))
    ok = all(found.ok for found in findings)
    if as_json:
        say({"ok": ok, "findings": [vars(found) for found in findings]}, as_json)
    raise typer.Exit(0 if ok else 1)


@dlq_app.command("list")
def dlq_list(
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 100, data: Data = None, as_json: Json = False
) -> None:
    """Newest dead letters, with their reasons."""
    from tollway.streams.looks import dead_letters

    found = do(dead_letters(read_settings(data), limit))
    say(
        found,
        as_json,
        lambda _: table(
            f"{found['total']} dead letters: {found['by_reason']}",
            found["letters"],
            ["partition", "offset", "reason", "key", "detail"],
        ),
    )


@dlq_app.command("show")
def dlq_show(partition: int, offset: int, data: Data = None, as_json: Json = False) -> None:
    """One dead letter, with its bytes and, where they decode, its record."""
    from tollway.streams.looks import dead_letter_at

    found = do(dead_letter_at(read_settings(data), partition, offset))
    say(found, as_json, lambda _: print("\n".join(f"{name}: {value}" for name, value in found.items())))


@audit_app.command("verify")
def audit_verify(data: Data = None, as_json: Json = False) -> None:
    """Prove no gap, no double, no change in the audit log; exit 1 where the proof fails."""
    from tollway.streams.audit_looks import verify_audit

    report = do(verify_audit(read_settings(data), lambda line: print(line, file=sys.stderr)))
    say(report, as_json, lambda _: _print_report(report))
    raise typer.Exit(0 if report["ok"] else 1)


def _print_report(report: dict[str, Any]) -> None:
    for fault in report["faults"]:
        print(fault["text"])
    for sentence in report["unproven"]:
        print(f"not proven: {sentence}")
    found = (
        f"{len(report['faults']) + report['more_faults']} faults"
        if report["faults"]
        else "no gap, no double, no change"
    )
    print(
        f"{'green' if report['ok'] else 'RED'}: {found} in {report['records']:,} records of {report['blocks']:,} blocks"
    )


@schema_app.command("check")
def schema_check(
    file: Annotated[
        Path | None, typer.Argument(help="A changed .avsc; without one all committed versions are checked.")
    ] = None,
    against: Annotated[str, typer.Option(help="The record that FILE would be the next version of.")] = "UsageEvent",
    as_json: Json = False,
) -> None:
    """Refuse what evolution forbids, naming field and rule; exit 1 where anything is refused."""
    from tollway.schemas import evolution

    found = evolution.check_file(file, against) if file else evolution.check_all()
    rows = [{"field": item.field, "rule": item.rule, "message": item.message} for item in found]
    say(
        {"violations": rows},
        as_json,
        lambda _: print("\n".join(f"{row['field']}: {row['rule']}: {row['message']}" for row in rows) or "compatible"),
    )
    raise typer.Exit(1 if rows else 0)


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
