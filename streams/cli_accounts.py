"""Commands about accounts: freeze, who calls for them, runs and sessions that are over; and what the log says of one."""

from typing import Annotated, Any

import typer

from tollway.connectors.errors import Refused
from tollway.streams.cli_control import account_app, append
from tollway.streams.cli_words import Data, Json, do, read_settings, say, table

app = typer.Typer()
principal_app = typer.Typer(no_args_is_help=True, help="Whose bearer tokens call for an account.")
run_app = typer.Typer(no_args_is_help=True, help="Runs of agents.")
session_app = typer.Typer(no_args_is_help=True, help="Sessions.")
for name, group in (("principal", principal_app), ("run", run_app), ("session", session_app)):
    app.add_typer(group, name=name)

Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]
Issuer = Annotated[str, typer.Option(help="The token's `iss`.")]
User = Annotated[str, typer.Option(help="A user's token: its `sub`.")]
Client = Annotated[str, typer.Option(help="A client's own token: its `client_id`.")]


@account_app.command("freeze")
def freeze(account: str, reason: Reason = "", data: Data = None, as_json: Json = False) -> None:
    """Gates refuse every call of the account from here on; what is under way is settled and billed."""
    append(data, account, "account.freeze", {"reason": reason} if reason else {}, as_json)


@account_app.command("unfreeze")
def unfreeze(account: str, reason: Reason = "", data: Data = None, as_json: Json = False) -> None:
    """Gates let the account's calls pass again."""
    append(data, account, "account.unfreeze", {"reason": reason} if reason else {}, as_json)


@account_app.command("show")
def show(account: str, data: Data = None, as_json: Json = False) -> None:
    """Customer, freeze, policy, principals, and who signed the last change of each kind."""
    from tollway.streams.accounts_look import account_of

    say(do(account_of(read_settings(data), account)), as_json, _print_account)


def _print_account(found: dict[str, Any]) -> None:
    frozen = ", FROZEN" if found["frozen"] else ""
    print(f"{found['account']} {found['name']}: customer {found['customer'] or 'none'}{frozen}")
    policy = found["policy"]
    print(
        f"policy version {found['policy_version']}: outage {policy['outage']}, staleness {policy['max_staleness_s']} s"
    )
    table("counted", policy["counts"], ["meter", "windows", "scopes"])
    if policy["limits"]:
        table("limits", policy["limits"], ["scope", "meter", "window", "limit"])
    if found["principals"]:
        table("principals", found["principals"], list(found["principals"][0]))
    table("last changes", found["changes"], ["kind", "key", "command_id", "append_ms", "offset"])


@principal_app.command("bind")
def bind(
    account: str,
    principal: Annotated[str, typer.Argument(help="The pseudonym under which its calls are counted.")],
    issuer: Issuer,
    user: User = "",
    client: Client = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="A further scope of its calls, such as agent:helpdesk.")
    ] = None,
    operation: Annotated[
        list[str] | None, typer.Option(help="What it may call, a name or a beginning and *; without any, everything.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say that a token's bearer calls for an account, and under which name."""
    from tollway.streams.accounts_look import refuse_second_binding
    from tollway.streams.directory import token

    named = _token(issuer, user, client)
    body = {**named, "principal": principal, "scopes": scope or [], "operations": operation or []}
    do(refuse_second_binding(read_settings(data), account, token(named)))
    append(data, account, "principal.bind", body, as_json)


@principal_app.command("unbind")
def unbind(
    account: str, issuer: Issuer, user: User = "", client: Client = "", data: Data = None, as_json: Json = False
) -> None:
    """A token's bearer calls for the account no more: its calls are refused within seconds."""
    append(data, account, "principal.unbind", _token(issuer, user, client), as_json)


def _token(issuer: str, user: str, client: str) -> dict[str, str]:
    if bool(user) == bool(client):
        raise Refused("whose token is it: give --user with its `sub`, or --client with its `client_id`")
    return {"issuer": issuer, "kind": "user" if user else "client", "subject": user or client}


@run_app.command("close")
def close_run(account: str, run: str, data: Data = None, as_json: Json = False) -> None:
    """A run is over: gates refuse its id for 35 days."""
    append(data, account, "run.close", {"run": run}, as_json)


@session_app.command("close")
def close_session(account: str, session: str, data: Data = None, as_json: Json = False) -> None:
    """A session is over: gates refuse its id for 35 days."""
    append(data, account, "session.close", {"session": session}, as_json)
