"""A block holds every record, raw and as columns; its hashes are functions of the log alone."""

import struct
from hashlib import sha256
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audit_batches import EPOCH, T0_MS, Log, judge_block, varied
from tollway.schemas import codec
from tollway.schemas.usage import FIELDS
from tollway.streams.audit import CHAIN_START, Audit, Block, record_hashes, records_of, unpack_headers
from tollway.streams.batch import Batch, Records
from tollway.streams.state import PartitionState

EMPTY = {"quantities": [], "path": [], "attributes": [], "revenue_nano": None, "cost_nano": None}
BYTES = st.none() | st.binary(max_size=40)
HEADERS = st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3).map(tuple)


def expected_hash(offset: int, append_ms: int, key: bytes | None, headers: Any, value: bytes | None) -> bytes:
    """The record hash as the module's first lines state it."""
    packed = msgpack.packb(headers) if headers else b""
    lengths = (-1 if key is None else len(key), len(packed), -1 if value is None else len(value))
    return sha256(struct.pack("<qqiii", offset, append_ms, *lengths) + (key or b"") + packed + (value or b"")).digest()


def records(rows: list[tuple[bytes | None, bytes | None, Any]]) -> Records:
    return Records(
        offsets=np.arange(5, 5 + len(rows), dtype=np.int64),
        append_ms=np.arange(len(rows), dtype=np.int64) * 7 + T0_MS,
        keys=[row[0] for row in rows],
        values=[row[1] for row in rows],
        headers=[row[2] for row in rows],
    )


def judged(given: Records) -> list[Batch]:
    state = PartitionState(0, 1, EPOCH)
    state.next_offset = int(given.offsets[0])
    return judge_block(state, given)


def events_of(block: Block) -> list[dict[str, Any]]:
    table = pa.Table.from_batches([block.events])
    at = table.schema.get_field_index("occurred_at")
    rows: list[dict[str, Any]] = table.set_column(at, "occurred_at", table["occurred_at"].cast(pa.int64())).to_pylist()
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(BYTES, BYTES, HEADERS), min_size=1, max_size=8))
def test_block_hash_is_over_all_that_the_broker_gave(rows: list[Any]) -> None:
    """A block's hash is SHA-256 over the SHA-256 of each record's offset, time, key, headers and value, with lengths."""
    given = records(rows)
    block = Audit().block(judged(given), EPOCH)
    hashes = [
        expected_hash(int(offset), int(at), key, headers, value)
        for offset, at, (key, value, headers) in zip(given.offsets, given.append_ms, rows, strict=True)
    ]
    assert block.hash == sha256(b"".join(hashes)).digest()
    assert block.manifest["chain_hash"] == sha256(CHAIN_START + block.hash).digest()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(BYTES, BYTES, HEADERS), min_size=1, max_size=8))
def test_log_rows_give_the_records_back(rows: list[Any]) -> None:
    """A row of usage_log is its record: null, empty, bytes and headers are told apart."""
    given = records(rows)
    back = records_of(pa.Table.from_batches([Audit().block(judged(given), EPOCH).log]))
    assert (back.keys, back.values, back.headers) == (given.keys, given.values, given.headers)
    assert back.offsets.tolist() == given.offsets.tolist()
    assert back.append_ms.tolist() == given.append_ms.tolist()


def test_each_byte_of_a_record_changes_its_hash() -> None:
    """Moving a byte between key, headers and value, or from null to empty, makes another record hash."""
    variants = [
        (b"ab", b"c", ()), (b"a", b"bc", ()), (b"abc", None, ()), (None, b"abc", ()), (b"", b"abc", ()), (b"abc", b"", ()),
        (b"a", b"c", (("b", b""),)), (b"a", b"c", (("b", None),)), (b"a", b"c", (("", b"b"),)),
    ]  # fmt: skip
    seen = {record_hashes(records([row]), [msgpack.packb(row[2]) if row[2] else b""]) for row in variants}
    assert len(seen) == len(variants)


def test_columns_are_what_was_sent() -> None:
    """Every field of an accepted event stands in its column; null is '' or [], a nano amount stays null."""
    log = Log()
    sent = varied(log, 200)
    (block,) = log.blocks()
    rows = events_of(block)[2:]
    assert len(rows) == 200
    for row, event in zip(rows, sent, strict=True):
        assert row["verdict"] == "accepted"
        assert row["record_key"] == event["account"].encode()
        for name in FIELDS:
            value = event.get(name)
            if isinstance(value, dict):
                value = list(value.items())
            assert row[name] == (EMPTY.get(name, "") if value is None else value), name


def mixed() -> Log:
    """One of each: open, meter, usage, its copy, too much, poison, empty, tick, ahead of its time, usage."""
    log = Log()
    log.usage(operation="first")
    key, value = log.records[-1][1:3]
    log.append(key, value)
    log.usage(quantities={"calls": -1})
    log.append(b"acme", codec.header(codec.schema_id("UsageEvent")) + b"\xff\xff\xff")
    log.append(b"acme", b"")
    log.tick()
    log.usage(occurred_at=(log.now_ms + 3_600_000) * 1000, operation="ahead")
    log.usage(operation="last")
    return log


def test_every_record_has_a_row_and_its_verdict() -> None:
    """Commands, ticks, duplicates, refused and undecodable records stand in both tables, with verdict and reason."""
    (block,) = mixed().blocks()
    rows = events_of(block)
    assert [(row["kind"], row["verdict"], row["reason"]) for row in rows] == [
        ("command", "accepted", ""),
        ("command", "accepted", ""),
        ("usage", "accepted", ""),
        ("usage", "duplicate", ""),
        ("usage", "refused", "negative"),
        ("poison", "refused", "undecodable"),
        ("poison", "refused", "empty"),
        ("tick", "accepted", ""),
        ("usage", "accepted", ""),
        ("usage", "accepted", ""),
    ]
    assert [row["operation"] for row in rows] == ["", "", "first", "first", "GET /things", "", "", "", "ahead", "last"]
    assert [row["clock_ahead"] for row in rows] == [False] * 8 + [True, False]
    assert rows[4]["quantities"] == [("calls", -1)]
    assert [bool(row["command"]) for row in rows] == [True, True] + [False] * 8
    assert '"meter":"calls"' in rows[1]["command"]
    log = block.log.to_pylist()
    assert [(row["kind"], row["raw"]) for row in log[6:8]] == [("poison", b""), ("tick", None)]
    assert [name for name, _ in unpack_headers(log[0]["headers"])] == ["kid", "sig"]


def test_a_block_does_not_depend_on_how_its_records_were_batched() -> None:
    """The same records judged in other batches make the same block, row for row and hash for hash."""
    log = mixed()
    varied(log, 50)
    whole = Audit().block(log.batches(), EPOCH)
    state, batches = PartitionState(0, 1, EPOCH), []
    for at in range(len(log.records)):
        batches += judge_block(state, log.all().part(at, at + 1))
    single = Audit().block(batches, EPOCH)
    assert single.manifest == whole.manifest
    assert single.log.equals(whole.log)
    assert single.events.equals(whole.events)


def test_chain_goes_on_from_its_dump() -> None:
    """An Audit loaded from its dump chains the next block as if it had never stopped."""
    log = Log()
    varied(log, 30)
    first, second = log.blocks(20)
    assert second.manifest["chain_hash"] == sha256(first.manifest["chain_hash"] + second.hash).digest()
    state, audit = PartitionState(0, 1, EPOCH), Audit()
    audit.block(judge_block(state, log.all().part(0, 20)), EPOCH)
    loaded = Audit.load(msgpack.unpackb(msgpack.packb(audit.dump())))
    assert loaded.block(judge_block(state, log.all().part(20, 32)), EPOCH).manifest == second.manifest
    assert loaded.blocks == 2


def test_manifest_bounds_are_least_and_greatest_append_time() -> None:
    """Where the broker's clock went back inside a block, its bounds still hold every record."""
    log = Log()
    log.usage()
    log.now_ms -= 500
    log.usage()
    (block,) = log.blocks()
    assert block.manifest["first_append"] == log.records[-1][0]
    assert block.manifest["last_append"] == log.records[-2][0]


def test_batches_that_do_not_follow_are_refused() -> None:
    """A block with a gap, or of two partitions, is a fault of the caller and says so."""
    log, other = Log(), Log(partition=1)
    for each in (log, other):
        varied(each, 3)
    first, *rest = log.batches()
    with pytest.raises(ValueError, match="do not follow"):
        Audit().block([first, *rest[1:]], EPOCH)
    with pytest.raises(ValueError, match="one partition"):
        Audit().block([first, other.batches()[0]], EPOCH)
