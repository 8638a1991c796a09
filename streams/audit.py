"""Judged batches → a block of the audit log: every record raw and as columns, its hash, the chain. Pure (design §7, Audit).

Record hash = SHA-256 over what the broker gave, lengths first, so that SQL rebuilds it from a row of `usage_log`:

    offset i64 | append time in ms i64 | key length i32 | headers length i32 | value length i32 | key | headers | value

little-endian; a length of −1 is a null, which a row shows as NULL. Headers are msgpack of [[name, value], …], none is no
bytes. Block = SHA-256(record hashes in offset order), chain = SHA-256(chain before ‖ block), starting from 32 zero bytes.
"""

import builtins
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tollway.schemas.command import body_text
from tollway.schemas.usage import FIELDS
from tollway.streams.batch import KINDS, VERDICTS, Batch, Records
from tollway.streams.decode import usage_schema

CHAIN_START = bytes(32)

Headers = tuple[tuple[str, bytes | None], ...]

_HEAD = np.dtype([("offset", "<i8"), ("append", "<i8"), ("key", "<i4"), ("headers", "<i4"), ("value", "<i4")])
_WORD = pa.dictionary(pa.int8(), pa.string())
_MS, _US = pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC")
_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("sequence", "occurred_at", "latency_us"), 0),
    **{name: [] for name in ("quantities", "path", "attributes")},
}
_NULLABLE = ("revenue_nano", "cost_nano")

_PLACE = [("epoch", _WORD), ("kafka_partition", pa.uint16()), ("kafka_offset", pa.uint64()), ("append_time", _MS)]
LOG_SCHEMA = pa.schema(
    [*_PLACE, ("kind", _WORD), ("record_key", pa.binary()), ("schema_id", pa.uint32()), ("headers", pa.binary()),
     ("raw", pa.binary())]
)  # fmt: skip
"""Columns of `usage_log`. `record_key` and `raw` are null where the broker's were."""
EVENTS_SCHEMA = pa.schema(
    [*_PLACE, ("kind", _WORD), ("record_key", pa.binary()), ("schema_id", pa.uint32()), ("verdict", _WORD),
     ("reason", pa.string()), ("clock_ahead", pa.bool_()), ("command", pa.string()),
     *((item.name, _US if item.name == "occurred_at" else item.type) for item in usage_schema())]
)  # fmt: skip
"""Columns of `usage_events`. What is null or could not be decoded is '', 0, 1970, [] or {}; nano amounts stay null."""


@dataclass(frozen=True)
class Block:
    """Consecutive records of one partition, ready for ClickHouse: offsets `first` … `last`, `bytes` of values."""

    epoch: str
    partition: int
    first: int
    last: int
    count: int
    bytes: int
    hash: builtins.bytes
    log: pa.RecordBatch
    events: pa.RecordBatch
    manifest: dict[str, Any]
    """The block's row in `audit_manifest`: first_append and last_append are its least and greatest append time, in ms."""


class Audit:
    """State of one partition: the chain hash behind its newest block, and how many blocks there were."""

    def __init__(self, chain: bytes = CHAIN_START, blocks: int = 0) -> None:
        self.chain = chain
        self.blocks = blocks

    def block(self, batches: list[Batch], epoch: str) -> Block:
        """The records of consecutive batches of one partition as one block; advances the chain.

        Raises ValueError where there is no batch, or they do not follow each other.
        """
        if not batches or len({batch.partition for batch in batches}) > 1:
            raise ValueError("a block takes one batch or more, all of one partition")
        records = _joined([batch.records for batch in batches])
        first, last = int(records.offsets[0]), int(records.offsets[-1])
        if last - first + 1 != len(records):
            raise ValueError(
                f"offsets {first} to {last} are not the {len(records)} records' own: batches do not follow"
            )
        headers = [pack_headers(each) for each in records.headers]
        block_hash = sha256(record_hashes(records, headers)).digest()
        self.chain = next_chain(self.chain, block_hash)
        self.blocks += 1
        log = _log(batches, records, headers, epoch)
        return Block(
            epoch=epoch,
            partition=batches[0].partition,
            first=first,
            last=last,
            count=len(records),
            bytes=sum([len(value) for value in records.values if value]),
            hash=block_hash,
            log=log,
            events=_events(batches, log),
            manifest={
                "epoch": epoch,
                "kafka_partition": batches[0].partition,
                "first_offset": first,
                "last_offset": last,
                "records": len(records),
                "block_hash": block_hash,
                "chain_hash": self.chain,
                "first_append": int(records.append_ms.min()),
                "last_append": int(records.append_ms.max()),
            },
        )

    def dump(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"chain": self.chain, "blocks": self.blocks}

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Audit":
        """The inverse of `dump`."""
        return cls(state["chain"], state["blocks"])


def next_chain(before: bytes, block_hash: bytes) -> bytes:
    """Chain value behind a block."""
    return sha256(before + block_hash).digest()


def record_hashes(records: Records, headers: list[bytes]) -> bytes:
    """32 bytes a record, in order."""
    n = len(records)
    heads = np.empty(n, _HEAD)
    heads["offset"], heads["append"] = records.offsets, records.append_ms
    heads["key"] = [-1 if key is None else len(key) for key in records.keys]
    heads["headers"] = [len(each) for each in headers]
    heads["value"] = [-1 if value is None else len(value) for value in records.values]
    raw, width = heads.tobytes(), _HEAD.itemsize
    starts = range(0, n * width, width)
    return b"".join(
        [
            sha256(b"".join((raw[at : at + width], key or b"", head, value or b""))).digest()
            for at, key, head, value in zip(starts, records.keys, headers, records.values, strict=True)
        ]
    )


def pack_headers(headers: Headers) -> bytes:
    """Headers as `usage_log` keeps them."""
    packed: bytes = msgpack.packb(headers) if headers else b""
    return packed


def unpack_headers(packed: bytes) -> Headers:
    """The inverse of `pack_headers`."""
    return tuple((name, value) for name, value in msgpack.unpackb(packed)) if packed else ()


def records_of(log: pa.Table) -> Records:
    """Rows of `usage_log`, in offset order, as the broker gave them: for verify and for replay."""
    return Records(
        offsets=log.column("kafka_offset").to_numpy().astype(np.int64),
        append_ms=log.column("append_time").cast(pa.int64()).to_numpy(),
        keys=log.column("record_key").cast(pa.binary()).to_pylist(),
        values=log.column("raw").cast(pa.binary()).to_pylist(),
        headers=[unpack_headers(each) for each in log.column("headers").cast(pa.binary()).to_pylist()],  # type: ignore[misc]
    )


def _joined(parts: list[Records]) -> Records:
    if len(parts) == 1:
        return parts[0]
    return Records(
        offsets=np.concatenate([part.offsets for part in parts]),
        append_ms=np.concatenate([part.append_ms for part in parts]),
        keys=[key for part in parts for key in part.keys],
        values=[value for part in parts for value in part.values],
        headers=[each for part in parts for each in part.headers],
    )


def _log(batches: list[Batch], records: Records, headers: list[bytes], epoch: str) -> pa.RecordBatch:
    n = len(records)
    columns = {
        "epoch": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int8)), [epoch]),
        "kafka_partition": pa.array(np.full(n, batches[0].partition, np.uint16)),
        "kafka_offset": pa.array(records.offsets.astype(np.uint64)),
        "append_time": pa.array(records.append_ms).view(_MS),
        "kind": _words([batch.kind for batch in batches], KINDS),
        "record_key": pa.array(records.keys, pa.binary()),
        "schema_id": pa.array(np.concatenate([batch.schema_ids for batch in batches])),
        "headers": pa.array(headers, pa.binary()),
        "raw": pa.array(records.values, pa.binary()),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in LOG_SCHEMA.names], schema=LOG_SCHEMA)


def _events(batches: list[Batch], log: pa.RecordBatch) -> pa.RecordBatch:
    n = len(log)
    bases = np.cumsum([0, *[len(batch) for batch in batches[:-1]]])
    rows = np.concatenate([batch.row + base for batch, base in zip(batches, bases, strict=True)])
    reasons, commands = [""] * n, [""] * n
    for batch, base in zip(batches, bases.tolist(), strict=True):
        for row, (reason, _) in batch.reasons.items():
            reasons[base + row] = reason
        if batch.command is not None:
            commands[base] = body_text(batch.command)
    usage, ahead = _decoded(batches, rows, n)
    columns = {
        **{name: log.column(name) for name in LOG_SCHEMA.names},
        "record_key": pc.fill_null(log.column("record_key"), b""),
        "verdict": _words([batch.verdict for batch in batches], VERDICTS),
        "reason": pa.array(reasons, pa.string()),
        "clock_ahead": ahead,
        "command": pa.array(commands, pa.string()),
        **usage,
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in EVENTS_SCHEMA.names], schema=EVENTS_SCHEMA)


def _decoded(batches: list[Batch], rows: npt.NDArray[np.int64], n: int) -> tuple[dict[str, pa.Array], pa.Array]:
    """Columns of usage.avsc and `clock_ahead`, for all n records."""
    usage = pa.Table.from_batches([batch.usage for batch in batches])
    occurred_us = np.concatenate([batch.occurred_us for batch in batches])
    ahead = np.zeros(n, np.bool_)
    sent_us = usage.column("occurred_at").cast(pa.int64()).to_numpy()
    ahead[rows] = occurred_us != sent_us  # the judge's clamp is the only thing that makes them differ
    if len(rows) != n:
        source = np.full(n, -1, np.int64)
        source[rows] = np.arange(len(rows))
        usage = usage.take(pa.array(source, mask=source < 0))
    usage = usage.combine_chunks()
    return {name: _filled(usage.column(name), name) for name in FIELDS}, pa.array(ahead)


def _filled(column: pa.ChunkedArray, name: str) -> pa.Array:
    """One column as its table takes it: no nulls, but for the nano amounts'."""
    array, kind = column.combine_chunks(), EVENTS_SCHEMA.field(name).type
    if array.null_count and name not in _NULLABLE:
        array = pc.fill_null(array, pa.scalar(_EMPTY.get(name, ""), array.type))
    return array.view(kind) if name == "occurred_at" else array


def _words(codes: list[npt.NDArray[np.uint8]], words: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.concatenate(codes).astype(np.int8)), pa.array(words))
