"""Events for the fold's benchmark: principals who are their own accounts, drawn by Zipf, encoded and in the topic."""

import secrets
import time
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from confluent_kafka import Producer

from tollway.schemas import codec
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane

BATCH_BYTES = 100_000
"""The topic takes batches of 128 KiB at most."""
PRINCIPALS, SOURCES, ZIPF = 5_000, 20, 1.05
QUANTITIES = {
    3: [("calls", 1.0), ("tokens_in", 0.625), ("tokens_out", 0.625)],
    6: [(name, 1.0) for name in ("calls", "tokens_in", "tokens_out", "tool_calls", "vector_queries", "compute_ms")],
}
"""meters → (name, share of the events that have it): 2.25 quantities an event, or all six."""


def accounts() -> list[str]:
    return [f"acct-{number:05d}" for number in range(PRINCIPALS)]


class Traffic:
    """Usage events, sequenced per (source, lane) as an emitter does, spread over the last minute."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.draws = np.random.default_rng(seed)
        weights = 1 / np.arange(1, PRINCIPALS + 1) ** ZIPF
        self.weights = weights / weights.sum()
        self.names = accounts()
        self.sources = [uuid7_hex(time.time_ns() // 1_000_000, secrets.randbits(74)) for _ in range(SOURCES)]
        self.sequences: dict[tuple[str, int], int] = {}

    def events(self, count: int, meters: int) -> list[tuple[bytes, bytes, int]]:
        """(key, value, lane) of `count` events."""
        who = self.draws.choice(PRINCIPALS, count, p=self.weights).tolist()
        now_us, made = time.time_ns() // 1000, []
        for number, index in enumerate(who):
            name = self.names[index]
            made.append(
                (name.encode(), codec.encode("UsageEvent", self._event(name, number, now_us, meters)), lane(name))
            )
        return made

    def _event(self, name: str, number: int, now_us: int, meters: int) -> dict[str, Any]:
        source, random = self.sources[number % SOURCES], self.random
        pair = (source, lane(name))
        self.sequences[pair] = sequence = self.sequences.get(pair, 0) + 1
        quantities = {
            meter: 1 if meter == "calls" else random.randrange(2_000)
            for meter, share in QUANTITIES[meters]
            if share == 1.0 or random.random() < share
        }
        return {
            "event_id": f"{random.getrandbits(128):032x}",
            "source": source,
            "sequence": sequence,
            "occurred_at": now_us - random.randrange(60_000_000),
            "surface": "llm",
            "operation": "chat.complete",
            "account": name,
            "principal_kind": "user",
            "principal": name,
            "status": "ok",
            "latency_us": random.randrange(200, 2_000_000),
            "quantities": quantities,
            "agent": "agent-1",
            "session": f"s-{index_of(name) % 100}",
            "run": None,
            "model": "small-1",
            "provider": "example",
            "trace_id": f"{random.getrandbits(128):032x}",
        }


def index_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def produce(bootstrap: str, partitions: int, made: list[tuple[bytes, bytes, int]]) -> None:
    """Append them, each to its own partition, in order."""
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "linger.ms": 50,
            "batch.size": BATCH_BYTES,
            "queue.buffering.max.messages": 200_000,
            "log_level": 2,
        }
    )
    bounds = [*range(0, len(made), 50_000), len(made)]
    for first, last in pairwise(bounds):
        for key, value, of in made[first:last]:
            producer.produce("usage.events", value=value, key=key, partition=of % partitions)
        if producer.flush(60):
            raise TimeoutError("the broker did not take the benchmark's events within 60 s")
