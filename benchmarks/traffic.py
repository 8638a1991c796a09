"""Usage events for the benchmarks: encoded before they are needed, their sums known beforehand.

An event is a few bytes of its own (ids, sequence, time, trace) between bytes that were encoded once, by the codec: two
microseconds each, so that producers load the machine as little as librdkafka does.
"""

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

from tollway.schemas import codec
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane

TOPIC = "usage.events"
WINDOW_S = 60
METERS = ("calls", "tokens_in", "tokens_out")
MORE_METERS = (*METERS, "tool_calls", "vector_queries", "compute_ms")
SOURCES, ZIPF, VARIANTS = 20, 1.05, 2_000
BATCH_BYTES = 100_000
"""The topic takes batches of 128 KiB at most."""
OUTSTANDING_MAX = 200_000
"""Records that a producer has waiting at most."""

Made = tuple[bytes, bytes, int]
"""key, value, lane"""
Sums = dict[str, dict[str, int]]
"""principal → `<meter> m:<start of the window>` → units"""


@dataclass(frozen=True)
class Shape:
    """Who calls and what a call looks like.

    `each`: principals of an account; 0 = a principal is its own account. `even`: all call alike, in turn; else by Zipf's law.
    `meters`: 3 (2.25 quantities an event) or 6. `full`: all usual fields, 344 bytes; else those of a model's call, 205 bytes.
    """

    name: str
    principals: int = 5_000
    each: int = 0
    even: bool = False
    meters: int = 3
    full: bool = False
    variants: int = VARIANTS

    def principal(self, number: int) -> str:
        return f"{self.name}-{number:07d}"

    def account(self, number: int) -> str:
        return f"{self.name}-a{number // self.each:05d}" if self.each else self.principal(number)

    def accounts(self) -> list[str]:
        return list(dict.fromkeys(self.account(number) for number in range(self.principals)))


def text(value: str) -> bytes:
    """An Avro string."""
    data = value.encode()
    return varint(len(data)) + data


def varint(number: int) -> bytes:
    """An Avro long ≥ 0."""
    number <<= 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@dataclass
class Variant:
    """What surrounds an event's own bytes: before account and principal, behind them, and behind the trace id."""

    before: bytes
    behind: bytes
    end: bytes
    quantities: dict[str, int]


def variant(random: Random, shape: Shape) -> Variant:
    """One way a call goes."""
    some = (1.0, 0.625, 0.625) if shape.meters == 3 else (1.0,) * 6
    quantities = {
        meter: 1 if meter == "calls" else random.randrange(2_000)
        for meter, share in zip(MORE_METERS, some, strict=False)
        if random.random() < share
    }
    event: dict[str, Any] = {
        "event_id": "0" * 32, "source": "0" * 32, "sequence": 0, "occurred_at": 0,
        "surface": "llm", "operation": random.choice(("chat.complete", "embed", "rerank", "search.web")),
        "account": "a", "principal_kind": "user", "principal": "p",
        "status": "ok", "latency_us": random.randrange(200, 2_000_000), "quantities": quantities,
        "agent": "agent-1", "session": f"s-{random.randrange(100)}", "provider": "example", "model": "small-1",
        "trace_id": "f" * 32,
    }  # fmt: skip
    if shape.full:
        run = random.randrange(30_000)
        event |= {
            "operation": f"op-{random.randrange(50)}", "agent": f"agent-{random.randrange(20)}",
            "session": f"session-{random.randrange(20_000)}", "run": f"run-{run:05d}", "parent": f"run-{run // 8:05d}",
            "path": [f"run-{run // 8:05d}"], "cost_nano": random.randrange(10**7), "cost_asset": "USD",
            "revenue_nano": random.randrange(10**8), "revenue_asset": "USD", "model": f"model-{random.randrange(8)}",
            "attributes": {
                "team": random.choice(("blue", "red", "green")), "region": "eu-central-1", "client": "sdk-python/2.31.0",
            },
        }  # fmt: skip
    value = codec.encode("UsageEvent", event)
    own = 5 + 2 * 33 + 2  # header, event_id and source with their lengths, sequence and time
    before, _, rest = value[own:].partition(text("a") + text("user") + text("p"))
    behind, _, end = rest.partition(b"f" * 32)
    return Variant(before, behind, end, quantities)


@dataclass
class Traffic:
    """An endless stream of one shape, sequenced per (source, lane) as emitters do; each event within the last minute."""

    shape: Shape
    seed: int = 1
    spread_us: int = 60_000_000
    one_in: int = 1
    """Of so many principals one's sums are known."""
    sums: Sums = field(default_factory=dict)
    """What a reader of everything made so far must show."""

    def __post_init__(self) -> None:
        shape, random = self.shape, Random(self.seed)
        self._draws = np.random.default_rng(self.seed)
        self._variants = [variant(random, shape) for _ in range(shape.variants)]
        self._units = np.array([[v.quantities.get(meter, -1) for meter in MORE_METERS] for v in self._variants])
        self._who: dict[int, tuple[bytes, bytes, int]] = {}
        self._weights: npt.NDArray[np.float64] | None = None
        if not shape.even:
            weights = 1 / np.arange(1, shape.principals + 1) ** ZIPF
            self._weights = weights / weights.sum()
        self._next = 0
        self.quantities = 0
        ids = [uuid7_hex(time.time_ns() // 1_000_000, secrets.randbits(74)) for _ in range(SOURCES)]
        self._sources = [text(source) for source in ids]
        self._sequences = [[0] * 256 for _ in range(SOURCES)]

    def _caller(self, number: int) -> tuple[bytes, bytes, int]:
        """key, Avro bytes of account, kind and principal, lane."""
        account = self.shape.account(number)
        made = account.encode(), text(account) + text("user") + text(self.shape.principal(number)), lane(account)
        if len(self._who) < 100_000:
            self._who[number] = made
        return made

    def _callers(self, count: int) -> npt.NDArray[np.int64]:
        principals = self.shape.principals
        if self._weights is not None:
            return self._draws.choice(principals, count, p=self._weights)
        first, self._next = self._next, self._next + count
        # A step that shares no factor with the number of principals: all call, in no order that anybody could use.
        return (np.arange(first, first + count) * 7_368_787) % principals

    def events(self, count: int, *, summed: bool = True) -> list[Made]:
        """The next `count` events; their sums are added to `sums` unless not wanted."""
        who = self._callers(count)
        which = self._draws.integers(0, len(self._variants), count)
        at_us = time.time_ns() // 1000 - self._draws.integers(0, self.spread_us, count)
        self.quantities += int((self._units[which] >= 0).sum())
        if summed:
            self._count(who, which, at_us)
        return list(self._made(who.tolist(), which.tolist(), at_us.tolist()))

    def _made(self, who: list[int], which: list[int], at_us: list[int]) -> Iterator[Made]:
        known, variants, header = self._who, self._variants, codec.header(codec.schema_id("UsageEvent"))
        random = os.urandom(32 * len(who)).hex().encode()
        length = varint(32)
        for number, (caller, form, at) in enumerate(zip(who, which, at_us, strict=True)):
            key, about, in_lane = known.get(caller) or self._caller(caller)
            chosen, source = variants[form], number % SOURCES
            sequences = self._sequences[source]
            sequences[in_lane] = sequence = sequences[in_lane] + 1
            at_byte = number * 64
            value = b"".join((
                header, length, random[at_byte : at_byte + 32], self._sources[source], varint(sequence), varint(at),
                chosen.before, about, chosen.behind, random[at_byte + 32 : at_byte + 64], chosen.end,
            ))  # fmt: skip
            yield key, value, in_lane

    def _count(self, who: npt.NDArray[np.int64], which: npt.NDArray[np.int64], at_us: npt.NDArray[np.int64]) -> None:
        if self.one_in > 1:
            known = who % self.one_in == 0
            who, which, at_us = who[known], which[known], at_us[known]
        start_s = at_us // 1_000_000 // WINDOW_S * WINDOW_S
        first = int(start_s.min())
        pairs, place = np.unique(who * 64 + (start_s - first) // WINDOW_S, return_inverse=True)
        units = self._units[which]
        totals = np.zeros((len(pairs), len(MORE_METERS)), np.int64)
        seen = np.zeros_like(totals)
        np.add.at(totals, place, np.maximum(units, 0))
        np.add.at(seen, place, units >= 0)
        for pair, row, any_ in zip(pairs.tolist(), totals.tolist(), seen.tolist(), strict=True):
            fields = self.sums.setdefault(self.shape.principal(pair // 64), {})
            for meter, total, some in zip(MORE_METERS, row, any_, strict=True):
                if some:
                    name = f"{meter} m:{first + pair % 64 * WINDOW_S}"
                    fields[name] = fields.get(name, 0) + total


def producer(bootstrap: str, linger_ms: int = 50) -> Producer:
    """librdkafka, idempotent."""
    return Producer(
        {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "linger.ms": linger_ms,
            "batch.size": BATCH_BYTES,
            "queue.buffering.max.messages": OUTSTANDING_MAX,
            "log_level": 2,
        }
    )


def produce(bootstrap: str, partitions: int, made: Iterable[Made]) -> None:
    """Append them, each to its own partition, in order. Raises TimeoutError where the broker does not take them."""
    sender, every = producer(bootstrap), list(made)
    bounds = [*range(0, len(every), OUTSTANDING_MAX // 4), len(every)]
    for first, last in pairwise(bounds):
        for key, value, of in every[first:last]:
            sender.produce(TOPIC, value=value, key=key, partition=of % partitions)
        if sender.flush(60):
            raise TimeoutError("the broker did not take the benchmark's events within 60 s")
