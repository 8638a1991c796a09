"""What the log says of accounts, up to its end: newest checkpoints, and the commands behind them, judged as the fold judges."""

from collections.abc import Iterable
from typing import Any

from tollway.connectors.errors import Refused
from tollway.connectors.kafka import current_log, log_partitions, read_newest
from tollway.schemas.lane import lane, partition
from tollway.streams.directory import Account, Token
from tollway.streams.judge import judge
from tollway.streams.judge_command import is_command
from tollway.streams.owned import as_records
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState
from tollway.streams.status import checkpoints_of
from tollway.streams.wiring import kafka_admin


async def accounts_of(settings: Settings, wanted: Iterable[int] | None = None) -> dict[str, Account]:
    """name → account, of some partitions or all, as the log's end has them. Raises Refused where there is no log."""
    log = await current_log(kafka_admin(settings))
    found = await checkpoints_of(settings, log.epoch, log.partitions, ["accounts"])
    numbers = sorted(set(range(log.partitions) if wanted is None else wanted) & {number for _, number in found})
    behind = await read_newest(
        settings.kafka_bootstrap,
        settings.kafka_security(),
        log.topic,
        numbers,
        None,
        starts={number: found["accounts", number].next_offset for number in numbers},
        keep=lambda record: is_command(record.value),
    )
    accounts: dict[str, Account] = {}
    for number in numbers:
        state = PartitionState.load(number, log.partitions, log.epoch, found["accounts", number].state, {})
        for record in behind[number]:
            judge(state, as_records([record]))
        accounts |= state.directory.accounts
    return accounts


async def account_of(settings: Settings, name: str) -> dict[str, Any]:
    """One account as a person reads it. Raises Refused where it was never opened."""
    partitions = await log_partitions(kafka_admin(settings))
    found = (await accounts_of(settings, [partition(lane(name), partitions)])).get(name)
    if found is None:
        raise Refused(f"account {name!r} is not open: tollway account open {name}")
    return {
        "account": name,
        "name": found.name,
        "customer": found.customer,
        "frozen": found.frozen,
        "policy_version": found.policy_version,
        "policy": found.policy,
        "principals": [
            {
                "issuer": issuer,
                "kind": kind,
                "subject": subject,
                "principal": bound.principal,
                "scopes": bound.scopes,
                "operations": bound.operations,
            }
            for (issuer, kind, subject), bound in sorted(found.bindings.items())
            if bound.principal is not None
        ],
        "changes": [
            {"kind": kind, "key": kid, "command_id": command_id, "append_ms": at_ms, "offset": offset}
            for kind, (kid, command_id, at_ms, offset) in sorted(found.signed.items(), key=lambda item: item[1][3])
        ],
    }


async def refuse_second_binding(settings: Settings, account: str, token: Token) -> None:
    """A token's bearer has one account: whose would a call be otherwise? Raises Refused naming the other one."""
    for name, found in (await accounts_of(settings)).items():
        bound = found.bindings.get(token)
        if name != account and bound is not None and bound.principal is not None:
            raise Refused(
                f"{token[1]} {token[2]!r} of {token[0]!r} is bound to account {name}: "
                f"tollway principal unbind {name} first"
            )
