"""Raw log records for tests of the judge: usage and commands as the broker would give them."""

import random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tollway.connectors.control import Signer, signed_record
from tollway.schemas import codec
from tollway.schemas.command import LogConfig
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.lane import lane
from tollway.streams.batch import Records
from tollway.streams.state import PartitionState

NOW_MS = 1_790_000_000_000
PARTITIONS = 4
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), "first")
CONFIG = LogConfig(epoch="0-test", deployment="test", kid="first", public_key=SIGNER.public_key, step_s=5)

Raw = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...], int]
"""key, value, headers, append ms"""


def account_of(partition: int, number: int = 0) -> str:
    """The number-th account whose lane lies in a partition."""
    found = [name for name in (f"acct-{i}" for i in range(400)) if lane(name) % PARTITIONS == partition]
    return found[number]


def source(seed: int, born_ms: int = NOW_MS) -> str:
    """A source id, the same for the same seed."""
    return uuid7_hex(born_ms, random.Random(seed).getrandbits(74))


def usage(partition: int = 0, at_ms: int = NOW_MS, **fields: Any) -> dict[str, Any]:
    """A usage record that is accepted as it is, changed by `fields`."""
    return {
        "event_id": source(fields.get("sequence", 1) + 1_000_000, at_ms),
        "source": source(1),
        "sequence": 1,
        "occurred_at": at_ms * 1000,
        "surface": "rest",
        "operation": "GET /things",
        "account": account_of(partition),
        "principal_kind": "user",
        "principal": "alice",
        "status": "ok",
        "latency_us": 1200,
        "quantities": {"calls": 1},
        **fields,
    }


def raw(event: dict[str, Any], append_ms: int = NOW_MS) -> Raw:
    """The record of a usage event."""
    return event["account"].encode(), codec.encode("UsageEvent", event), (), append_ms


def command(
    account: str, kind: str, body: dict[str, Any], append_ms: int = NOW_MS, *, number: int = 0, signer: Signer = SIGNER
) -> Raw:
    """The record of a signed command."""
    key, value, headers = signed_record(
        signer, f"cmd-{kind}-{account}-{number}".replace("*", "all"), account, kind, body, append_ms * 1000
    )
    return key, value, tuple(headers), append_ms


def records(raws: list[Raw], first: int = 0) -> Records:
    """Columns of consecutive offsets."""
    return Records(
        offsets=np.arange(first, first + len(raws), dtype=np.int64),
        append_ms=np.array([item[3] for item in raws], np.int64),
        keys=[item[0] for item in raws],
        values=[item[1] for item in raws],
        headers=[item[2] for item in raws],
    )


def opened(partition: int = 0, *accounts: str) -> PartitionState:
    """A state behind log.open, with meters `calls` and `tokens` and the partition's first account open."""
    state = PartitionState(partition, PARTITIONS, CONFIG.epoch)
    state.directory.config = CONFIG
    state.directory.keys[CONFIG.kid] = CONFIG.public_key
    state.directory.meters = {"calls": None, "tokens": "tokens"}
    for name in accounts or (account_of(partition),):
        state.directory.apply(
            {"command_id": f"open-{name}", "kind": "account.open", "account": name, "body": {}}, NOW_MS, 0
        )
    state.log_time_ms = NOW_MS - 1
    state.step = state.step_of(NOW_MS - 1)
    return state
