"""Commands that look, and change nothing."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tollway.connectors.errors import Refused
from tollway.streams.cli_words import Data, Json, do, read_settings, say, table

app = typer.Typer()
dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: what was refused, and why.")
audit_app = typer.Typer(no_args_is_help=True, help="Proof over the audit log.")
schema_app = typer.Typer(no_args_is_help=True, help="The contracts.")
for name, group in (("dlq", dlq_app), ("audit", audit_app), ("schema", schema_app)):
    app.add_typer(group, name=name)


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
        table(
            f"{group}: lag {rows['lag']}, standing for {rows['standing_s']} s, refused {sum(rows['refused'].values())}",
            rows["partitions"],
            columns,
        )
    print(f"log {found['epoch']}, {found['dead_letters']} dead letters")


@app.command()
def doctor(
    role: Annotated[
        str,
        typer.Option(help="Whose rights are asked for: emitter, accounts, audit, stripe, gate, control, look or all."),
    ] = "all",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Look at every connection, right, setting and clock, and say what is wrong; exit 1 where anything is."""
    from tollway.connectors.rights import ROLES
    from tollway.streams.doctor import examine
    from tollway.streams.examination import ALL, Finding

    def tell(found: Finding) -> None:
        cure = f"; {found.cure}" if found.cure else ""
        print(f"{'ok ' if found.ok else 'BAD'}  {found.part}: {found.what}{cure}", flush=True)

    if role not in {*ROLES, ALL}:
        raise Refused(f"--role is {role!r}: give one of {', '.join(ROLES)}, {ALL}")
    findings = do(examine(read_settings(data), role=role, on_found=(lambda _: None) if as_json else tell))
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
    registry: Annotated[bool, typer.Option(help="Compare all versions with those of the schema registry too.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Refuse what evolution forbids, naming field and rule; exit 1 where anything is refused."""
    from tollway.schemas import evolution

    found = evolution.check_file(file, against) if file else evolution.check_all()
    rows = [{"field": item.field, "rule": item.rule, "message": item.message} for item in found]
    if registry:
        from tollway.streams.schema_registry import registry_report

        report = do(registry_report(read_settings(data)))
        rows += [{"field": text.split()[0], "rule": "registry", "message": text} for text in report["faults"]]
    say(
        {"violations": rows},
        as_json,
        lambda _: print("\n".join(f"{row['field']}: {row['rule']}: {row['message']}" for row in rows) or "compatible"),
    )
    raise typer.Exit(1 if rows else 0)
