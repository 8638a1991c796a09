"""A command of the log: decoded, in its place, signed, in time, sound, and taken once (design §4)."""

from typing import Any

from tollway.schemas import codec
from tollway.schemas.command import (
    HEADER_KEY,
    HEADER_SIGNATURE,
    SIGNED_WITHIN_S,
    CommandError,
    LogConfig,
    check_body,
    parse_body,
)
from tollway.schemas.lane import lane, partition
from tollway.schemas.topics import BROADCAST
from tollway.streams.batch import ACCEPTED, DUPLICATE, POISON, Batch, Records
from tollway.streams.directory import verified
from tollway.streams.state import PartitionState

COMMAND_IDS = frozenset(number for number, entry in codec.catalogue().items() if entry["record"] == "Command")
_HEADERS = frozenset(codec.header(number) for number in COMMAND_IDS)


def is_command(value: bytes | None) -> bool:
    """Whether a value's framing names a Command."""
    return value is not None and value[:5] in _HEADERS


def judge_command(state: PartitionState, batch: Batch) -> dict[str, Any] | None:
    """The command of a batch of one, checked; None where it is refused or known already (the batch says which)."""
    try:
        command = _checked_command(state, batch.records)
    except _CommandRefused as refusal:
        batch.reasons[0] = (refusal.reason, str(refusal)[:300])
        if refusal.reason == "undecodable":
            batch.kind[0] = POISON
        return None
    if command["command_id"] in state.directory.seen:
        batch.verdict[0] = DUPLICATE
        return None
    batch.verdict[0] = ACCEPTED
    return command


class _CommandRefused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _checked_command(state: PartitionState, records: Records) -> dict[str, Any]:
    value, key = records.values[0] or b"", records.keys[0] or b""
    try:
        _, command = codec.decode(value)
    except ValueError as error:
        raise _CommandRefused("undecodable", str(error)) from error
    account = command["account"]
    home = state.partition if account == BROADCAST else partition(lane(account), state.partitions)
    if key != account.encode() or home != state.partition:
        raise _CommandRefused("misrouted", f"key {key!r} for account {account!r} in partition {state.partition}")
    headers = dict(records.headers[0])
    kid = (headers.get(HEADER_KEY) or b"").decode("ascii", "replace")  # a header may be null
    signature = headers.get(HEADER_SIGNATURE) or b""
    opening = command["kind"] == "log.open" and not state.is_open
    if not opening and not state.is_open:
        raise _CommandRefused("not_open", "it stands before log.open")
    if opening:
        _check_opening(state, command, signature, value)
    elif not state.directory.signed_by(kid, signature, value):
        raise _CommandRefused("bad_signature", f"no valid signature by key {kid!r}")
    if abs(int(records.append_ms[0]) * 1000 - command["signed_at"]) > SIGNED_WITHIN_S * 1_000_000:
        raise _CommandRefused("stale_command", "appended more than 10 minutes from when it was signed: sign it again")
    try:
        body = parse_body(command["body"])
        check_body(command["kind"], account, body)
    except CommandError as error:
        raise _CommandRefused("bad_command", str(error)) from error
    if command["kind"] == "log.open" and not opening and command["command_id"] not in state.directory.seen:
        raise _CommandRefused("bad_command", "this log is open already")
    known = command["command_id"] in state.directory.seen
    if command["kind"] == "fold.change" and not known and (refusal := state.directory.fold_refusal(body)) is not None:
        raise _CommandRefused(*refusal)
    if account != BROADCAST and (refusal := state.directory.refusal(command["kind"], account, body)) is not None:
        raise _CommandRefused(*refusal)
    return {**command, "body": body, "kid": kid}


def _check_opening(state: PartitionState, command: dict[str, Any], signature: bytes, value: bytes) -> None:
    """`log.open` is signed by the key it names, and is of this log: whoever can name another key is stopped by settings."""
    try:
        body = parse_body(command["body"])
        check_body("log.open", BROADCAST, body)
    except CommandError as error:
        raise _CommandRefused("bad_command", str(error)) from error
    if not verified(body["public_key"], signature, value):
        raise _CommandRefused("bad_signature", "log.open is not signed by the key that it names")
    if state.directory.config is not None and (fault := _moved(state.directory.config, body)):
        raise _CommandRefused("bad_command", fault)
    if body["epoch"] != state.epoch:
        raise _CommandRefused("bad_command", f"log.open is of epoch {body['epoch']!r}, this log of {state.epoch!r}")


def _moved(before: LogConfig, body: dict[str, Any]) -> str | None:
    """Why a grown log cannot be opened so: its configuration is that of the log it has grown from."""
    wanted = {**before.body(), "epoch": body["epoch"], "origin": before.origin or before.epoch}
    wrong = [name for name, value in LogConfig(**body).body().items() if wanted[name] != value]
    return f"{wrong[0]} is {body.get(wrong[0])!r}, in the log it has grown from {wanted[wrong[0]]!r}" if wrong else None
