"""Commands that change something: signed into the log, checked before anything is written."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tollway.connectors.errors import Refused
from tollway.streams.cli_words import Data, Json, do, read_settings, say

app = typer.Typer()
account_app = typer.Typer(no_args_is_help=True, help="Billable organisations.")
customer_app = typer.Typer(no_args_is_help=True, help="Who pays at Stripe for an account.")
policy_app = typer.Typer(no_args_is_help=True, help="What is counted for an account, and its limits.")
meter_app = typer.Typer(no_args_is_help=True, help="What is measured.")
price_app = typer.Typer(no_args_is_help=True, help="Immutable price versions.")
for name, group in (
    ("account", account_app),
    ("customer", customer_app),
    ("policy", policy_app),
    ("meter", meter_app),
    ("price", price_app),
):
    app.add_typer(group, name=name)


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
