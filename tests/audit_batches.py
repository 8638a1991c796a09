"""Small logs for the audit tests: a partition's records as the broker would give them, and their judged batches."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.schemas import codec
from tollway.schemas.command import HEADER_KEY, HEADER_SIGNATURE, LogConfig, body_text
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.topics import BROADCAST, TICK_KEY
from tollway.streams.audit import Audit, Block
from tollway.streams.batch import Batch, Records
from tollway.streams.judge import judge_block
from tollway.streams.state import PartitionState

EPOCH = "0:AAAAAAAAAAAAAAAAAAAAAA"
T0_MS = 1_780_000_000_000
"""Append time of the first record: 2026-05-28 20:26:40 UTC."""
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw().hex()
SOURCE = uuid7_hex(T0_MS - 1000, 7)

Record = tuple[int, bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]


def event(account: str = "acme", **fields: Any) -> dict[str, Any]:
    """A usage event with what is required; `fields` replace or add."""
    return {
        "event_id": f"{fields.get('sequence', 1):032x}",
        "source": SOURCE,
        "sequence": 1,
        "occurred_at": T0_MS * 1000,
        "surface": "rest",
        "operation": "GET /things",
        "account": account,
        "principal_kind": "user",
        "principal": "ann",
        "status": "ok",
        "latency_us": 1500,
        "quantities": {"calls": 1},
        **fields,
    }


@dataclass
class Log:
    """One partition of one (the only) partition's topic. Opened by its first record; `accepted` are the usage events to be."""

    partition: int = 0
    epoch: str = EPOCH
    now_ms: int = T0_MS
    records: list[Record] = field(default_factory=list)
    sequence: int = 0

    def __post_init__(self) -> None:
        config = LogConfig(epoch=self.epoch, deployment="test", kid="k1", public_key=PUBLIC, auto_open=True)
        self.command("log.open", config.body())
        self.command("meter.add", {"meter": "calls"})

    def append(self, key: bytes | None, value: bytes | None, headers: tuple[tuple[str, bytes], ...] = ()) -> None:
        """Any record; a millisecond passes."""
        self.now_ms += 1
        self.records.append((self.now_ms, key, value, headers))

    def command(self, kind: str, body: dict[str, Any], account: str = BROADCAST) -> None:
        """A signed command."""
        command_id = f"{self.partition}-{len(self.records)}"
        fields = {"command_id": command_id, "account": account, "kind": kind, "body": body_text(body)}
        value = codec.encode("Command", {**fields, "signed_at": self.now_ms * 1000})
        self.append(account.encode(), value, ((HEADER_KEY, b"k1"), (HEADER_SIGNATURE, KEY.sign(value))))

    def usage(self, account: str = "acme", **fields: Any) -> dict[str, Any]:
        """A usage record in sequence; returns the event."""
        self.sequence += 1
        made = event(account, **{"sequence": self.sequence, "occurred_at": self.now_ms * 1000, **fields})
        self.append(account.encode(), codec.encode("UsageEvent", made))
        return made

    def tick(self) -> None:
        self.append(TICK_KEY, None)

    def all(self) -> Records:
        """Every record of the partition."""
        return Records(
            offsets=np.arange(len(self.records), dtype=np.int64),
            append_ms=np.array([each[0] for each in self.records], np.int64),
            keys=[each[1] for each in self.records],
            values=[each[2] for each in self.records],
            headers=[each[3] for each in self.records],
        )

    def batches(self) -> list[Batch]:
        """Judged from an empty state."""
        return judge_block(PartitionState(self.partition, 1, self.epoch), self.all())

    def blocks(self, *lengths: int) -> Iterator[Block]:
        """Blocks of these lengths, the last one of what is left."""
        state, audit, records, at = PartitionState(self.partition, 1, self.epoch), Audit(), self.all(), 0
        for length in (*lengths, len(records)):
            part = records.part(at, min(at + length, len(records)))
            if len(part):
                yield audit.block(judge_block(state, part), self.epoch)
            at += length


def varied(log: Log, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Usage of a few accounts, principals, runs and models, with every optional field somewhere; returns the events."""
    chance = random.Random(seed)
    events = []
    for _ in range(count):
        run = chance.choice((None, "r1", "r1.a", "r1.a.x", "r2"))
        optional: dict[str, Any] = {
            "agent": chance.choice((None, "scout", "writer")),
            "session": chance.choice((None, "s1", "s2", "s3")),
            "run": run,
            "path": {"r1.a": ["r1"], "r1.a.x": ["r1", "r1.a"]}.get(run or ""),
            "parent": {"r1.a": "r1", "r1.a.x": "r1.a"}.get(run or ""),
            "rail": chance.choice((None, None, "x402", "credit")),
            "hold": chance.choice((None, "h1")),
            "provider": "openai",
            "model": chance.choice((None, "small", "large")),
            "trace_id": f"{chance.getrandbits(128):032x}",
            "attributes": chance.choice((None, {}, {"region": "eu", "tier": "ä"})),
        }
        if chance.random() < 0.8:
            optional |= {"revenue_nano": chance.randrange(10**9), "revenue_asset": chance.choice(("USD", "EUR"))}
        if chance.random() < 0.7:
            optional |= {"cost_nano": chance.randrange(10**8), "cost_asset": "USD"}
        events.append(
            log.usage(
                chance.choice(("acme", "blue", "coral")),
                principal_kind=chance.choice(("user", "client")),
                principal=chance.choice(("ann", "bob", "cy")),
                operation=chance.choice(("GET /things", "POST /things", "search")),
                status=chance.choice(("ok", "ok", "ok", "error", "denied")),
                latency_us=chance.randrange(1, 10**6),
                quantities={"calls": 1, "tokens": chance.randrange(1000)} if chance.random() < 0.5 else {"calls": 1},
                **optional,
            )
        )
        log.now_ms += chance.randrange(200)
    return events


def store_of(server: ClickHouseServer, database: str) -> AuditStore:
    """A store on the shared server, in a database of its own."""
    return AuditStore(server.host, server.port, server.user, server.password, database)
