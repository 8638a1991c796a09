"""What Redis, ClickHouse, Stripe and the dead letters say, each in the words of the oracle's book."""

import io
import json
import urllib.request
from collections import defaultdict
from typing import Any

import clickhouse_connect
import fastavro
import redis

from tests.oracle_book import GROWN, Record, Row, Total, stripe_identifier
from tests.oracle_wire import METER_EVENT_ID, SCHEMA, lane

SCAN = 2_000
PIPELINE = 500
USAGE_VIEW = "usage"
NULLABLE = (
    "agent", "session", "run", "parent", "hold", "rail", "price_ref", "revenue_nano", "revenue_asset",
    "cost_nano", "cost_asset", "payment_ref", "provider", "model", "trace_id",
)  # fmt: skip
PLAIN = (
    "event_id", "source", "sequence", "surface", "operation", "account", "principal_kind", "principal", "status",
    "latency_us", "quantities",
)  # fmt: skip
TIMES = ("occurred_at", "billed_at", "counted_at")
TOTALS_SQL = f"""
SELECT account, scope, meter, span.1, span.2, sum(units) FROM (
    SELECT account, meter, units,
        arrayJoin([
            'acct',
            concat(multiIf(principal_kind = 'anonymous', 'anon', principal_kind), ':', principal),
            if(empty(agent), '', concat('agent:', agent)),
            if(empty(session), '', concat('sess:', session)),
            if(empty(run), '', concat('run:', run))
        ]) AS scope,
        arrayJoin([
            ('m', toUnixTimestamp(toStartOfMinute(counted_at))),
            ('h', toUnixTimestamp(toStartOfHour(counted_at))),
            ('d', toUnixTimestamp(toStartOfDay(counted_at))),
            ('M', toUnixTimestamp(toDateTime(toStartOfMonth(counted_at), 'UTC')))
        ]) AS span
    FROM {USAGE_VIEW} ARRAY JOIN mapKeys(quantities) AS meter, mapValues(quantities) AS units
    WHERE status IN ('ok', 'error') AND kafka_partition = %(partition)d AND startsWith(epoch, '%(growth)d-')
) WHERE scope != '' GROUP BY account, scope, meter, span"""


def redis_totals(url: str) -> tuple[dict[Total, int], list[str]]:
    """Every ` u` field of every `s:` hash, and what is wrong with their keys."""
    client = redis.Redis.from_url(url, decode_responses=True)
    found: dict[Total, int] = {}
    wrong: list[str] = []
    keys = list(client.scan_iter("tw:{*}:s:*", count=SCAN))
    for start in range(0, len(keys), PIPELINE):
        pipe = client.pipeline(transaction=False)
        stretch = keys[start : start + PIPELINE]
        for key in stretch:
            pipe.hgetall(key)
        for key, fields in zip(stretch, pipe.execute(), strict=True):
            account, scope = key.split(":s:", 1)[1].split("~", 1)
            if not key.startswith(f"tw:{{{lane(account):03d}}}:"):
                wrong.append(f"redis: {key} is not in the lane of its account")
            for name, text in fields.items():
                if name.endswith(" u"):
                    meter, window = name[:-2].split(" ")
                    kind, start_s = window.split(":")
                    found[account, scope, meter, kind, int(start_s)] = int(text)
    client.close()
    return found, wrong


class ClickHouse:
    """The analyst's view."""

    def __init__(self, endpoints: dict[str, Any]) -> None:
        self.client = clickhouse_connect.get_client(
            host=endpoints["clickhouse_host"],
            port=endpoints["clickhouse_port"],
            username=endpoints["clickhouse_user"],
            password=endpoints["clickhouse_password"],
            database=endpoints["clickhouse_database"],
            autogenerate_session_id=False,
        )

    def count(self) -> int:
        return int(self.client.query(f"SELECT count() FROM {USAGE_VIEW}").result_rows[0][0])

    def rows(self, partition: int) -> dict[tuple[int, int], dict[str, Any]]:
        """(partition, offset) → the event as the view has it; an empty text stands for null there."""
        columns = [*PLAIN, *NULLABLE, "path", "attributes"]
        times = ", ".join(f"toUnixTimestamp64Micro({name})" for name in TIMES)
        answer = self.client.query(
            f"SELECT kafka_offset, {times}, {', '.join(columns)} FROM {USAGE_VIEW}"
            f" WHERE kafka_partition = {partition % GROWN:d} AND startsWith(epoch, '{partition // GROWN:d}-')"
        )
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for offset, *values in answer.result_rows:
            if (partition, offset) in found:
                raise AssertionError(f"view {USAGE_VIEW} shows {partition}/{offset} twice")
            found[partition, offset] = dict(zip([*TIMES, *columns], values, strict=True))
        return found

    def totals(self, partition: int) -> dict[Total, int]:
        """Σ units of what counts, by account, scope, meter and every window of counted_at, added up by the engine."""
        answer = self.client.query(TOTALS_SQL % {"partition": partition % GROWN, "growth": partition // GROWN})
        return {
            (account, of, meter, window, start): int(units)
            for account, of, meter, window, start, units in answer.result_rows
        }

    def close(self) -> None:
        self.client.close()


def as_the_view(row: Row, event: dict[str, Any]) -> dict[str, Any]:
    """A row as the view shows it: null texts are empty, null collections too."""
    shown = {"billed_at": row.billed_us, "counted_at": row.counted_us}
    shown |= {name: event[name] for name in ("occurred_at", *PLAIN)}
    for name in NULLABLE:
        shown[name] = "" if event[name] is None and not name.endswith("_nano") else event[name]
    return {**shown, "path": event["path"] or [], "attributes": event["attributes"] or {}}


def stripe_events(url: str) -> list[dict[str, Any]]:
    """Meter events that the rail counts: identifier, customer, event_name, value, timestamp."""
    with urllib.request.urlopen(f"{url}/_admin/events", timeout=30) as response:
        found = json.load(response)
    return [
        {**event, "value": int(event["value"]), "timestamp": int(event["timestamp"])}
        for event in found["data"]
        if not event["error"] and not event["cancelled"]
    ]


def dead_letters(records: list[Record], epochs: set[str]) -> tuple[dict[tuple[int, int], tuple[str, bytes]], list[str]]:
    """(partition, offset) → (reason, original bytes). Two copies of one letter must be equal."""
    found: dict[tuple[int, int], tuple[str, bytes]] = {}
    wrong: list[str] = []
    for record in records:
        letter_epoch, partition, offset = (record.key or b"").decode().rsplit("|", 2)
        at = (int(letter_epoch.partition("-")[0]) * GROWN + int(partition), int(offset))
        letter = (dict(record.headers)["reason"].decode(), record.value or b"")
        if letter_epoch not in epochs:
            wrong.append(f"dead letter {at} is of epoch {letter_epoch}, the log of {sorted(epochs)}")
        if found.setdefault(at, letter) != letter:
            wrong.append(f"dead letter {at} is {letter[0]} and {found[at][0]}")
    return found, wrong


def meter_events(records: list[Record]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Identifier → the MeterEvent in Kafka. n must be gapless an account; a second copy must be equal."""
    found: dict[str, dict[str, Any]] = {}
    numbered: dict[str, dict[int, str]] = defaultdict(dict)
    wrong: list[str] = []
    for record in records:
        event: dict[str, Any] = fastavro.schemaless_reader(
            io.BytesIO((record.value or b"")[5:]), SCHEMA[METER_EVENT_ID], None
        )
        names = ("account", "customer", "meter", "price_ref", "window_start_s")
        key = tuple(event[name] or "" if name == "price_ref" else event[name] for name in names)
        identifier = stripe_identifier(event["deployment"], key, event["flush"], event["part"])
        if found.setdefault(identifier, event) != event:
            wrong.append(f"meter event {identifier} stands twice with different content")
        if numbered[event["account"]].setdefault(event["n"], identifier) != identifier:
            wrong.append(f"meter event {event['account']} n={event['n']} names two deltas")
    for account, numbers in numbered.items():
        if sorted(numbers) != list(range(1, len(numbers) + 1)):
            wrong.append(f"meter events of {account}: n has gaps")
    return found, wrong
