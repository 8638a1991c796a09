"""What the commands that look print: read from Redis, Kafka and Stripe, never written."""

import time
from typing import Any

from tollway.connectors.errors import Refused
from tollway.connectors.kafka import current_log, log_partitions, read_newest
from tollway.connectors.meter_events import meter_events_since
from tollway.connectors.redis import read_quota
from tollway.schemas import codec
from tollway.schemas.lane import lane, partition
from tollway.schemas.meter_event import MeterEvent, identifier
from tollway.schemas.topics import DEAD_LETTERS
from tollway.schemas.usage import ID
from tollway.streams.dead_letters import parse_letter
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin, redis_client, stripe_port

HOUR_S = 3_600


async def quota_of(settings: Settings, account: str) -> dict[str, Any]:
    """Redis' totals of an account, with the state of its lane."""
    check_account(account)
    redis = redis_client(settings)
    try:
        return await read_quota(redis, account)
    finally:
        await redis.aclose()


async def letters_of(settings: Settings) -> list[dict[str, Any]]:
    """Every dead letter that the topic holds, oldest first; a re-sent one counts once."""
    partitions = await log_partitions(kafka_admin(settings))
    found = await read_newest(
        settings.kafka_bootstrap, settings.kafka_security(), DEAD_LETTERS.name, range(partitions), None
    )
    newest = {record.key: record for records in found.values() for record in records if record.key}
    letters = [parse_letter(record.key, record.value or b"", record.headers) for record in newest.values()]
    return sorted(letters, key=lambda letter: (letter["append_ms"], letter["partition"], letter["offset"]))


async def dead_letters(settings: Settings, limit: int) -> dict[str, Any]:
    """`total`, `by_reason` and the newest `limit` letters without their bytes."""
    letters = await letters_of(settings)
    by_reason: dict[str, int] = {}
    for letter in letters:
        by_reason[letter["reason"]] = by_reason.get(letter["reason"], 0) + 1
    shown = [{name: value for name, value in letter.items() if name != "value_hex"} for letter in letters[-limit:]]
    return {"total": len(letters), "by_reason": dict(sorted(by_reason.items())), "letters": shown}


async def dead_letter_at(settings: Settings, number: int, offset: int) -> dict[str, Any]:
    """One letter whole, decoded where its bytes decode. Raises Refused where there is none."""
    for letter in await letters_of(settings):
        if (letter["partition"], letter["offset"]) == (number, offset):
            try:
                letter["record"] = codec.decode(bytes.fromhex(letter["value_hex"]))[1]
            except ValueError as error:
                letter["record"], letter["undecodable"] = None, str(error)
            return letter
    raise Refused(f"no dead letter for partition {number}, offset {offset}: see `tollway dlq list`")


async def meter_events_of(settings: Settings, account: str) -> dict[str, Any]:
    """Ours beside Stripe's: units by customer, meter and hour of usage."""
    check_account(account)
    home = partition(lane(account), (await current_log(kafka_admin(settings))).billing_partitions)
    found = await meter_events_since(settings.kafka_bootstrap, settings.kafka_security(), home, account, 0)
    by_n = {event["n"]: event for event in found}
    events = [by_n[n] for n in sorted(by_n)]
    hours: dict[tuple[str, str, int], list[MeterEvent]] = {}
    for event in events:
        # Stripe files a meter event under its timestamp, which lies in the usage window.
        hour_s = event["last_occurred_at"] // 1_000_000 // HOUR_S * HOUR_S
        hours.setdefault((event["customer"], event["event_name"], hour_s), []).append(event)
    port = stripe_port(settings)
    rows = []
    try:
        for (customer, name, hour_s), ours in sorted(hours.items()):
            theirs = await port.summary(name, customer, hour_s)
            units = sum(event["units"] for event in ours)
            rows.append(
                {
                    "customer": customer,
                    "meter": name,
                    "hour": time.strftime("%Y-%m-%dT%H:00Z", time.gmtime(hour_s)),
                    "events": len(ours),
                    "units": units,
                    "stripe_units": theirs,
                    "agree": units == theirs,
                }
            )
    finally:
        await port.close()
    return {
        "account": account,
        "customer": events[-1]["customer"] if events else None,
        "rows": rows,
        "events": [{**event, "identifier": identifier(event)} for event in events],
    }


async def ensure_meter(settings: Settings, event_name: str) -> str:
    """Id of Stripe's active meter of an event name; created with formula sum where there is none."""
    port = stripe_port(settings)
    try:
        return await port.ensure_meter(event_name)
    finally:
        await port.close()


async def customer_of(settings: Settings, account: str, customer: str | None) -> str:
    """The customer to bind: the given one, if Stripe has it; without one, the customer made for this account."""
    port = stripe_port(settings)
    try:
        if customer is None:
            return await port.ensure_customer(account)
        await port.check_customer(customer)
        return customer
    finally:
        await port.close()


def check_account(account: str) -> None:
    """Raises Refused where the text is no account's name."""
    if not ID.fullmatch(account):
        raise Refused(f"account is {account!r}: ids match {ID.pattern}")
