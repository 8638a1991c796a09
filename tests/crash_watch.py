"""What must hold at every moment of a crash campaign, looked at again and again while processes die.

A sink is read first and the log after it: whatever the sink shows then has its record in the log by the time it is judged.
"""

import time
from collections import Counter
from itertools import islice
from typing import Any

import msgpack
import redis
from clickhouse_connect.driver.exceptions import ClickHouseError

from tests.crash_effects import ASK_S, Rail
from tests.crash_tills import limit_of, overspent, tills
from tests.oracle import DAY_S, Court
from tests.oracle_book import Book, Delta, Record, Total, window_end
from tests.oracle_sides import ClickHouse, dead_letters, redis_totals
from tests.oracle_wire import lane

BREACHES_SHOWN = 50
Fields = dict[str, dict[str, int]]
"""Key of a scope → its fields."""


def not_counted_yet(totals: dict[Total, int], book: Book) -> list[str]:
    """REDIS ≤ LOG: no total in Redis is above what the log has."""
    return [
        f"REDIS ABOVE LOG: {total} is {units}, the log has {book.used.get(total, 0)}"
        for total, units in totals.items()
        if units > book.used.get(total, 0)
    ]


def went_back(before: dict[Total, int], totals: dict[Total, int], now_s: int) -> list[str]:
    """REDIS MONOTONE: no total in Redis ever becomes smaller, or goes before a day after its window's end."""
    return [
        f"REDIS WENT BACK: {total} is {totals.get(total)}, was {units}"
        for total, units in before.items()
        if totals.get(total, -1) < units and not (total not in totals and _may_go(total, now_s))
    ]


def _may_go(total: Total, now_s: int) -> bool:
    end_s = window_end(total[3], total[4])
    return end_s is not None and end_s + DAY_S <= now_s


def over_limit(scopes: Fields) -> list[str]:
    """GATE ≤ LIMIT: used and held together are within each limit."""
    wrong = []
    for key, fields in scopes.items():
        scope = key.partition("~")[2]
        for name, used in fields.items():
            base, _, which = name.rpartition(" ")
            meter, _, window = base.partition(" ")
            most = limit_of(scope, meter, window.partition(":")[0])
            load = fields.get(f"{base} u", 0) + fields.get(f"{base} h", 0)
            if most is not None and load > most and (which == "u" or f"{base} u" not in fields):
                wrong.append(f"GATE ABOVE LIMIT: {key} {base} has {load} of {most} ({used} {which})")
    return wrong


def not_asked_for(events: list[dict[str, Any]], deltas: dict[str, Delta]) -> list[str]:
    """RAIL ≤ LOG: each meter event at the rail is a delta of the log, with its units."""
    wrong = []
    for event in events:
        delta = deltas.get(event["identifier"])
        if delta is None or delta.units != int(event["value"]) or delta.customer != event["customer"]:
            wrong.append(f"RAIL ABOVE LOG: {event['identifier']} is {event['value']}, the log has {delta}")
    return wrong


class Watch:
    """Counts looks and breaches. What is away is not looked at this time."""

    def __init__(self, court: Court, rail: Rail, seed: int) -> None:
        self.court, self.rail, self.seed = court, rail, seed
        self.breaches: list[str] = []
        self.looks: Counter[str] = Counter()
        self._redis = redis.Redis.from_url(
            court.endpoints["redis_url"], decode_responses=True, socket_timeout=ASK_S, socket_connect_timeout=ASK_S
        )
        self._view = ClickHouse(court.endpoints)
        self._totals: dict[Total, int] = {}
        self._rows = self._judged = self._letters = 0
        self._at_rail: Counter[str] = Counter()

    def look(self) -> list[Record]:
        """Everything once; returns what the log has grown by. Raises KafkaException and TimeoutError while the broker is away."""
        book = self.court.book
        totals, rows, events = self._read_totals(), self._read_rows(), self.rail.events[self._judged :]
        self._read_letters()
        records: list[Record] = self.court.follow()
        if totals is not None:
            self._note("redis", [*not_counted_yet(totals, book), *went_back(self._totals, totals, int(time.time()))])
            self._totals = totals
        if rows is not None:
            found = [f"CLICKHOUSE ABOVE LOG: {rows} rows, {len(book.rows)} accepted"] * (rows > len(book.rows))
            found += [f"CLICKHOUSE WENT BACK: {rows} rows, were {self._rows}"] * (rows < self._rows)
            self._note("clickhouse", found)
            self._rows = rows
        self._note("dead letters", self._judge_letters())
        self._note("rail", self._judge_rail(events))
        self._note("gate", [*self._over_limits(), *(f"OVERSPENT: {row}" for row in overspent(book, self.seed).items())])
        return records

    def _note(self, side: str, wrong: list[str]) -> None:
        self.looks[side] += 1
        self.breaches += wrong[: BREACHES_SHOWN - len(self.breaches)]

    def _read_totals(self) -> dict[Total, int] | None:
        try:
            return redis_totals(self.court.endpoints["redis_url"] + "?socket_timeout=5&socket_connect_timeout=2")[0]
        except redis.RedisError:
            return None

    def _read_rows(self) -> int | None:
        try:
            return self._view.count()
        except (ClickHouseError, OSError):
            return None

    def _read_letters(self) -> None:
        self.court.letter_records += self.court.letters.read()

    def _judge_letters(self) -> list[str]:
        """The newest ones: only what the log's own fold refuses, for the same reason."""
        book, records = self.court.book, self.court.letter_records
        found, wrong = dead_letters(records[self._letters :], book.config["epoch"])
        self._letters = len(records)
        return wrong + [
            f"DEAD LETTER {at}: {reason}, must be {book.dead.get(at)}"
            for at, (reason, _) in found.items()
            if reason != book.dead.get(at)
        ]

    def _judge_rail(self, events: list[dict[str, Any]]) -> list[str]:
        self._judged += len(events)
        counted = [event for event in events if not event["error"] and not event["cancelled"]]
        self._at_rail.update(event["identifier"] for event in counted)
        twice = [f"RAIL TWICE: {name} stands {count} times" for name, count in self._at_rail.items() if count > 1]
        return twice + not_asked_for(counted, self.court.book.deltas)

    def _over_limits(self) -> list[str]:
        """Between the parts of one apply a call stands in both for a moment: the gate is stricter then, and is not judged."""
        found: Fields = {}
        for account in tills(self.seed):
            prefix = f"tw:{{{lane(account):03d}}}:"
            try:
                keys = list(self._redis.scan_iter(f"{prefix}s:{account}~*", count=1_000))
                pipe = self._redis.pipeline(transaction=True)
                pipe.hmget(f"{prefix}m", "begun", "off")
                for key in keys:
                    pipe.hgetall(key)
                (begun, off), *scopes = pipe.execute()
            except redis.RedisError:
                continue
            if begun == off:
                self.looks["gate scopes"] += len(keys)
                found |= {
                    key: {name: int(units) for name, units in fields.items()}
                    for key, fields in zip(keys, scopes, strict=True)
                }
        return over_limit(found)

    def close(self) -> None:
        self._redis.close()
        self._view.close()


def due_by_partition(book: Book, known: int, due: Counter[int], partitions: int) -> int:
    """Add the deltas behind the first `known` ones; returns how many there are now."""
    for delta in islice(book.deltas.values(), known, None):
        due[lane(delta.account) % partitions] += bool(delta.units)
    return len(book.deltas)


def held_apart(url: str, seed: int) -> tuple[int, list[str]]:
    """How many holds of the tills are open, and where a scope's ` h` is not the sum of its open holds (TIE)."""
    client = redis.Redis.from_url(url, socket_timeout=ASK_S)
    open_holds, wrong = 0, list[str]()
    for number in sorted({lane(account) for account in tills(seed)}):
        prefix = f"tw:{{{number:03d}}}:"
        keys = [key for kind in ("s", "h") for key in client.scan_iter(f"{prefix}{kind}:*", count=1_000)]
        pipe = client.pipeline(transaction=True)
        for key in keys:
            pipe.hgetall(key)
        shown: Counter[tuple[str, str]] = Counter()
        due: Counter[tuple[str, str]] = Counter()
        for key, fields in zip((key.decode() for key in keys), pipe.execute(), strict=True):
            if key.startswith(f"{prefix}s:"):
                scope = key.removeprefix(f"{prefix}s:")
                shown.update({(scope, n.decode()[:-2]): int(v) for n, v in fields.items() if n.endswith(b" h")})
            elif fields.get(b"st") in (b"H", b"C"):
                open_holds += 1
                record = [text.decode() for text in msgpack.unpackb(fields[b"r"], raw=True)]
                for scope, base, units in zip(record[2::3], record[3::3], record[4::3], strict=True):
                    due[scope, base] += int(units)
        wrong += [
            f"HELD: {at} is {shown[at]}, its open holds are {due[at]}"
            for at in shown.keys() | due.keys()
            if shown[at] != due[at]
        ]
    client.close()
    return open_holds, wrong
