"""What the control plane's commands do: read their arguments, check, sign, append."""

import json
import sys
from pathlib import Path
from typing import Any

from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import CurrentLog, current_log, read_newest, started_producer
from tollway.schemas import codec
from tollway.schemas.command import DEFAULT_POLICY, CommandError, check_body, parse_body
from tollway.streams.bootstrap import new_command_id
from tollway.streams.directory import Directory
from tollway.streams.judge_command import is_command
from tollway.streams.settings import Settings
from tollway.streams.status import checkpoints_of
from tollway.streams.wiring import kafka_admin


async def append_command(settings: Settings, account: str, kind: str, body: dict[str, Any]) -> dict[int, int]:
    """Check, sign and append; returns partition → offset. Raises Refused before anything is written."""
    try:
        check_body(kind, account, body)
    except CommandError as error:
        raise Refused(str(error)) from error
    signer = Signer.read(settings.data / "control.key")
    log = await current_log(kafka_admin(settings))
    if kind == "customer.bind":
        await _refuse_second_bind(settings, log, account, body["customer"])
    producer = await started_producer(settings.kafka_bootstrap, settings.kafka_security())
    try:
        return await Control(producer, signer, log.partitions, new_command_id, topic=log.topic).send(
            account, kind, body
        )
    finally:
        await producer.stop()


async def _refuse_second_bind(settings: Settings, log: CurrentLog, account: str, customer: str) -> None:
    """A Stripe customer belongs to one account: two would share its meters, and no one could tell them apart."""
    for name, bound in (await customers(settings, log)).items():
        if bound == customer and name != account:
            raise Refused(f"customer {customer} is bound to account {name}: give each account a customer of its own")


async def customers(settings: Settings, log: CurrentLog) -> dict[str, str]:
    """account → Stripe customer: of the newest checkpoints, and of the binds in the log behind them."""
    found = await checkpoints_of(settings, log.epoch, log.partitions, ["accounts"])
    bound: dict[str, str] = {}
    for loaded in found.values():
        accounts = Directory.load(loaded.state["directory"]).accounts
        bound |= {name: account.customer for name, account in accounts.items() if account.customer}
    starts = {number: loaded.next_offset for (_, number), loaded in found.items()}
    behind = await read_newest(
        settings.kafka_bootstrap,
        settings.kafka_security(),
        log.topic,
        range(log.partitions),
        None,
        starts=starts,
        keep=lambda record: is_command(record.value),
    )
    for record in (record for records in behind.values() for record in records):
        try:
            command = codec.decode(record.value)[1]
        except ValueError:
            continue  # the fold dead-letters it
        if command["kind"] == "customer.bind":
            bound[command["account"]] = str(parse_body(command["body"]).get("customer"))
    return bound


def policy_body(file: Path | None, counts: list[str], limits: list[str]) -> dict[str, Any]:
    """The body of `policy.set` from a file, or from `meter:windows:scopes` and `scope=meter=window=limit`."""
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
            body = json.loads(text)
        except (OSError, ValueError) as error:
            raise Refused(f"--file {file} is no JSON that can be read: {error}") from error
        if not isinstance(body, dict):
            raise Refused(f"--file {file} holds {type(body).__name__}: give a JSON object with `counts`")
        return body
    rows = []
    for text in counts:
        parts = text.split(":")
        if len(parts) != 3:
            raise Refused(f"--count is {text!r}: give meter:windows:scopes, such as calls:m,h,d,M:acct,principal")
        rows.append({"meter": parts[0], "windows": parts[1].split(","), "scopes": parts[2].split(",")})
    return {"counts": rows or DEFAULT_POLICY["counts"], "limits": [_limit(text) for text in limits]}


def _limit(text: str) -> dict[str, Any]:
    parts = text.split("=")
    if len(parts) != 4 or not _whole(parts[3]):
        raise Refused(f"--limit is {text!r}: give scope=meter=window=limit, such as acct=calls=d=1000")
    return {"scope": parts[0], "meter": parts[1], "window": parts[2], "limit": int(parts[3])}


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def price_body(price_ref: str, asset: str, unit_nano: list[str]) -> dict[str, Any]:
    """The body of `price.add` from `meter=nano` arguments."""
    units: dict[str, int] = {}
    for text in unit_nano:
        meter, _, nano = text.partition("=")
        if not _whole(nano):
            raise Refused(f"--unit-nano is {text!r}: give meter=nano units a unit, such as tokens_in=3000")
        units[meter] = int(nano)
    return {"price_ref": price_ref, "asset": asset, "unit_nano": units}
