"""What each side of the demo holds, by account and meter, read from the sides themselves; and where they disagree.

`counted` are units of calls that count (status ok or error), `billable` those that are invoiced (status ok, no other rail).
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aiokafka import ConsumerRecord

from tollway.connectors.kafka import read_newest
from tollway.connectors.stripe import StripePort
from tollway.schemas import codec
from tollway.schemas.lane import lane, tag
from tollway.schemas.topics import DEAD_LETTERS, USAGE
from tollway.schemas.usage import BILLED_STATUS, COUNTED_STATUSES
from tollway.streams.demo_service import ACCOUNTS, METERS
from tollway.streams.settings import Settings
from tollway.streams.wiring import audit_store, redis_client

Units = Counter[tuple[str, str]]
"""(account, meter) → units."""
HOUR_S = 3_600

USAGE_SQL = """
SELECT account, meter, sumIf(units, status IN ('ok', 'error')) AS counted, sumIf(units, status = 'ok' AND rail = '') AS billable
FROM usage ARRAY JOIN mapKeys(quantities) AS meter, mapValues(quantities) AS units
GROUP BY account, meter
"""


@dataclass
class Book:
    """One side. None where the side does not keep that figure."""

    name: str
    events: int | None = None
    counted: Units | None = None
    billable: Units | None = None
    dead_letters: int | None = None


@dataclass
class Difference:
    """Where two sides disagree."""

    what: str
    side: str
    found: int
    expected: int

    def __str__(self) -> str:
        return f"{self.what}: {self.side} has {self.found:,}, the services emitted {self.expected:,}"


@dataclass
class Books:
    """All sides, the services first: what they emitted is what the others must hold."""

    sides: list[Book] = field(default_factory=list)

    def side(self, name: str) -> Book:
        """The side of that name."""
        return next(book for book in self.sides if book.name == name)


def units_of(rows: Iterable[tuple[str, str, str, int]]) -> tuple[Units, Units]:
    """(account, meter, status, units) → counted, billable; all of it is invoiced, no other rail is used."""
    counted, billable = Units(), Units()
    for account, meter, status, units in rows:
        if status in COUNTED_STATUSES:
            counted[account, meter] += units
        if status == BILLED_STATUS:
            billable[account, meter] += units
    return counted, billable


def services_book(reports: list[dict[str, Any]], written: int) -> Book:
    """What the services say they emitted, and how many broken records were written beside them."""
    counted, billable = units_of(tuple(row) for report in reports for row in report["units"])
    return Book("services", sum(report["events"] for report in reports), counted, billable, written)


def kafka_book(records: Iterable[ConsumerRecord], letters: set[tuple[int, int]]) -> Book:
    """The log itself: each sequence once, dead letters left out."""
    seen: set[tuple[str, int, int]] = set()
    rows: list[tuple[str, str, str, int]] = []
    for record in records:
        if record.value is None or (record.partition, record.offset) in letters:
            continue
        try:
            number, event = codec.decode(record.value)
        except ValueError:
            continue  # broken, and not dead-lettered yet: until it is, the sides do not agree
        if codec.catalogue()[number]["record"] != "UsageEvent":
            continue
        identity = (event["source"], lane(event["account"]), event["sequence"])
        if identity not in seen:
            seen.add(identity)
            rows += [(event["account"], meter, event["status"], units) for meter, units in event["quantities"].items()]
    return Book("Kafka", len(seen), *units_of(rows), len(letters))


async def read_kafka(settings: Settings, partitions: int) -> Book:
    """From the first record to the last."""
    where = (settings.kafka_bootstrap, settings.kafka_security())
    log = await read_newest(*where, USAGE.name, range(partitions), None)
    found = await read_newest(*where, DEAD_LETTERS.name, range(partitions), None)
    letters = {letter_place(record.key) for records in found.values() for record in records}
    return kafka_book((record for records in log.values() for record in records), letters)


def letter_place(key: bytes) -> tuple[int, int]:
    """`epoch|partition|offset` → (partition, offset)."""
    _, partition, offset = key.decode().rsplit("|", 2)
    return int(partition), int(offset)


async def read_clickhouse(settings: Settings) -> Book:
    """The analyst's view."""
    store = audit_store(settings)
    try:
        rows = await asyncio.to_thread(store.rows, USAGE_SQL)
        events = await asyncio.to_thread(store.rows, "SELECT count() AS events FROM usage")
        sql = "SELECT count() AS letters FROM usage_events FINAL WHERE verdict = 'refused'"
        letters = await asyncio.to_thread(store.rows, sql)
    finally:
        store.close()
    counted = Units({(row["account"], row["meter"]): int(row["counted"]) for row in rows})
    billable = Units({(row["account"], row["meter"]): int(row["billable"]) for row in rows})
    return Book("ClickHouse", int(events[0]["events"]), counted, billable, int(letters[0]["letters"]))


async def read_redis(settings: Settings) -> Book:
    """Used at scope acct, window month: what a gate reads."""
    client, counted = redis_client(settings), Units()
    try:
        for account in ACCOUNTS:
            fields = await client.hgetall(f"{tag(lane(account))}s:{account}~acct")
            for name, text in fields.items():
                meter, window, kind = _word(name).split(" ")
                if kind == "u" and window.startswith("M:"):
                    counted[account, meter] += int(_word(text))
    finally:
        await client.aclose()
    return Book("Redis", counted=counted)


def _word(text: bytes | str) -> str:
    return text.decode() if isinstance(text, bytes) else text


async def read_stripe(port: StripePort, customers: dict[str, str], since_s: int, until_s: int) -> Book:
    """Stripe's own summaries, hour by hour, of every customer and meter."""
    billable = Units()
    first_s, last_s = since_s // HOUR_S * HOUR_S, -(-until_s // HOUR_S) * HOUR_S
    for account, customer in customers.items():
        for meter in METERS:
            hours = await port.summaries(event_name(meter), customer, first_s, last_s)
            billable[account, meter] += sum(hours.values())
    return Book("Stripe", billable=billable)


def event_name(meter: str) -> str:
    """Stripe's event name of a meter of the demo."""
    return f"tollway_{meter}"


def differences(books: Books) -> list[Difference]:
    """Every figure of every side against what the services emitted, account by account."""
    truth, found = books.sides[0], []
    for book in books.sides[1:]:
        for what, expected, held in (
            ("events", truth.events, book.events),
            ("dead letters", truth.dead_letters, book.dead_letters),
        ):
            if held is not None and expected is not None and held != expected:
                found.append(Difference(what, book.name, held, expected))
        for what, wanted, units in (
            ("counted", truth.counted, book.counted),
            ("billable", truth.billable, book.billable),
        ):
            if units is None or wanted is None:
                continue
            found += [
                Difference(f"{account}, {meter}, {what}", book.name, units[account, meter], wanted[account, meter])
                for account, meter in sorted(units.keys() | wanted.keys())
                if units[account, meter] != wanted[account, meter]
            ]
    return found
