"""Judged batches made of usage records, for tests of the parts that come behind admission."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tollway.schemas import codec
from tollway.schemas.command import DEFAULT_POLICY
from tollway.schemas.usage import AHEAD_S, FIELDS, UNSEQUENCED_S
from tollway.streams.batch import ACCEPTED, REFUSED, USAGE, Batch, Records
from tollway.streams.decode import decode_usage
from tollway.streams.directory import Account, Directory
from tollway.streams.quota import Quota

NOW_S = 1_767_225_600  # 2026-01-01 00:00:00 UTC
METERS = ("calls", "tokens_in", "tokens_out", "gpu_ms", "bytes_out", "searches")


def usage(account: str = "acme", **fields: Any) -> dict[str, Any]:
    """A UsageEvent with every required field; `at_s` may stand for `occurred_at`."""
    at_s = fields.pop("at_s", NOW_S)
    event: dict[str, Any] = dict.fromkeys(FIELDS)
    event |= {
        "event_id": "0" * 32,
        "source": "1" * 32,
        "sequence": 1,
        "occurred_at": at_s * 1_000_000,
        "surface": "rest",
        "operation": "GET /v1/things",
        "account": account,
        "principal_kind": "user",
        "principal": "u1",
        "status": "ok",
        "latency_us": 1_000,
        "quantities": {"calls": 1},
    }
    return event | fields


def batch(
    events: Sequence[dict[str, Any]],
    *,
    append_s: int = NOW_S,
    partition: int = 0,
    offset: int = 0,
    step_s: int = 5,
    accepted: Iterable[bool] | None = None,
) -> Batch:
    """The events as one batch, appended in one second from `offset` on; times as admission computes them (design §4)."""
    n = len(events)
    append_ms = np.full(n, append_s * 1000, np.int64)
    values: list[bytes | None] = [codec.encode("UsageEvent", event) for event in events]
    ids = np.full(n, codec.schema_id("UsageEvent"), np.uint32)
    columns, row, poison = decode_usage(np.arange(n), ids, values)
    assert not poison
    taken = np.array(list(accepted) if accepted is not None else [True] * n, np.bool_)
    occurred = np.array([event["occurred_at"] for event in events], np.int64)
    append_us = append_ms * 1000
    billed = np.where(occurred > append_us + AHEAD_S * 1_000_000, append_us, occurred)
    held = np.array([event["hold"] is not None for event in events], np.bool_)
    counted = np.where(held, occurred, np.maximum(billed, append_us - UNSEQUENCED_S * 1_000_000))
    return Batch(
        partition=partition,
        step=append_s // step_s,
        log_time_ms=append_s * 1000,
        records=Records(
            np.arange(offset, offset + n), append_ms, [event["account"].encode() for event in events], values, [()] * n
        ),
        kind=np.full(n, USAGE, np.uint8),
        verdict=np.where(taken, ACCEPTED, REFUSED).astype(np.uint8),
        reasons={},
        usage=columns,
        row=row,
        accepted=taken,
        occurred_us=billed,
        window_us=counted,
        schema_ids=ids,
    )


def sliced(whole: Batch, start: int, stop: int) -> Batch:
    """The same records as a batch of their own."""
    part = slice(start, stop)
    records = whole.records
    return Batch(
        partition=whole.partition,
        step=whole.step,
        log_time_ms=whole.log_time_ms,
        records=Records(
            records.offsets[part],
            records.append_ms[part],
            records.keys[part],
            records.values[part],
            records.headers[part],
        ),
        kind=whole.kind[part],
        verdict=whole.verdict[part],
        reasons={},
        usage=pa.RecordBatch.from_arrays(
            [column.slice(start, stop - start) for column in whole.usage.columns], schema=whole.usage.schema
        ),
        row=np.arange(stop - start),
        accepted=whole.accepted[part],
        occurred_us=whole.occurred_us[part],
        window_us=whole.window_us[part],
        schema_ids=whole.schema_ids[part],
    )


def directory(policies: dict[str, dict[str, Any] | None], meters: Iterable[str] = METERS) -> Directory:
    """A directory of these accounts (None = default policy) and meters."""
    found = Directory()
    found.meters = dict.fromkeys(meters)
    for name, policy in policies.items():
        own = {**DEFAULT_POLICY, **policy} if policy is not None else None
        found.accounts[name] = Account(policy_own=own, policy_version=int(own is not None))
    return found


def counts(*rows: tuple[str | Sequence[str], str, str | Sequence[str]], limits: Sequence[Any] = ()) -> dict[str, Any]:
    """A policy from (meters, windows, scopes) rows, such as ("calls", "mh", "acct"), and (scope, meter, window, limit) ones."""

    def listed(texts: str | Sequence[str]) -> list[str]:
        return [texts] if isinstance(texts, str) else list(texts)

    return {
        "counts": [
            {"meter": meter, "windows": list(windows), "scopes": listed(scopes)}
            for meters, windows, scopes in rows
            for meter in listed(meters)
        ],
        "limits": [dict(zip(("scope", "meter", "window", "limit"), row, strict=True)) for row in limits],
    }


def folded(found: Directory, *batches: Batch, step_s: int = NOW_S) -> Quota:
    """A Quota that has seen these batches in the step that begins at `step_s`."""
    quota = Quota()
    quota.on_step(step_s)
    for each in batches:
        quota.fold(found, each)
    return quota
