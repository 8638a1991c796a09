"""Records → a judged batch: cut, decode, admit, de-duplicate. Both groups run it on the same log and so agree (design §3).

`cut` says where a batch ends, `judge` folds it into the state. Refusals come in one fixed order of checks; the reason is the
dead letter's name.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tollway.connectors.errors import Fatal
from tollway.schemas import codec
from tollway.schemas.ids import born_ms
from tollway.schemas.lane import lane
from tollway.schemas.topics import TICK_KEY
from tollway.schemas.usage import AHEAD_S, LATE_S, SOURCE_AHEAD_S, SOURCE_LIFE_S, UNSEQUENCED_S
from tollway.streams import bounds
from tollway.streams.batch import (
    ACCEPTED,
    COMMAND,
    POISON,
    RECORDS_MAX,
    REFUSED,
    TICK,
    USAGE,
    Batch,
    Records,
)
from tollway.streams.columns import encoded, same_texts
from tollway.streams.decode import decode_usage, usage_ids
from tollway.streams.judge_command import COMMAND_IDS, is_command, judge_command
from tollway.streams.state import PartitionState

_USAGE_IDS = frozenset(usage_ids())

Reasons = dict[int, tuple[str, str]]


def log_times(state: PartitionState, records: Records) -> npt.NDArray[np.int64]:
    """[n] log time after each record: the running maximum of append time over the partition."""
    return np.maximum(np.maximum.accumulate(records.append_ms), state.log_time_ms)


def cut(state: PartitionState, records: Records) -> int:
    """Length of the next batch: up to a step change, a command (alone in its batch) or RECORDS_MAX."""
    times = log_times(state, records)[:RECORDS_MAX]
    steps = times // (state.step_s * 1000)
    end = int(np.searchsorted(steps, steps[0], side="right"))
    commands = _named(records.schema_ids[:end], COMMAND_IDS)
    first = int(commands.argmax())
    return max(1, first) if commands[first] else end


def judge(state: PartitionState, records: Records) -> Batch:
    """Fold one cut batch into directory and de-duplication; the caller has entered its step.

    Raises Fatal where a schema id is ours but unknown: workers are deployed before emitters.
    """
    times = log_times(state, records)
    n = len(records)
    ids = records.schema_ids
    kind = np.full(n, POISON, np.uint8)
    reasons: Reasons = {}
    command = None
    usage_rows = _sort_out(records, ids, kind, reasons)
    usage, row, poison = decode_usage(usage_rows, ids[usage_rows], records.values)
    reasons.update(poison)
    kind[list(poison)] = POISON
    verdict = np.full(n, REFUSED, np.uint8)
    verdict[kind == TICK] = ACCEPTED
    batch = Batch(
        partition=state.partition,
        step=state.step_of(int(times[-1])),
        log_time_ms=int(times[-1]),
        records=records,
        kind=kind,
        verdict=verdict,
        reasons=reasons,
        usage=usage,
        row=row,
        accepted=np.zeros(len(row), np.bool_),
        occurred_us=np.zeros(len(row), np.int64),
        window_us=np.zeros(len(row), np.int64),
        schema_ids=ids,
    )
    if kind[0] == COMMAND:
        command = judge_command(state, batch)
    elif len(row):
        _admit(state, batch, times)
    state.log_time_ms, state.next_offset = batch.log_time_ms, int(records.offsets[-1]) + 1
    for reason, _ in reasons.values():
        state.refused[reason] = state.refused.get(reason, 0) + 1
    for meter, count in batch.undeclared.items():
        state.undeclared[meter] = state.undeclared.get(meter, 0) + count
    if command is not None:
        batch.command = command
        state.directory.apply(command, int(records.append_ms[0]), int(records.offsets[0]))
    return batch


def _named(ids: npt.NDArray[np.uint32], wanted: frozenset[int]) -> npt.NDArray[np.bool_]:
    """[n] True where an id is one of the few `wanted`."""
    mask = np.zeros(len(ids), np.bool_)
    for number in wanted:
        mask |= ids == number
    return mask


def judge_block(state: PartitionState, records: Records) -> list[Batch]:
    """Cut and judge records in order, entering each step: as both groups do."""
    batches, start = [], 0
    while start < len(records):
        rest = records.part(start, len(records))
        end = cut(state, rest)
        step = state.step_of(int(log_times(state, rest)[0]))
        if step != state.step:
            state.enter(step)
        batches.append(judge(state, rest.part(0, end)))
        start += end
    return batches


def _sort_out(
    records: Records, ids: npt.NDArray[np.uint32], kind: npt.NDArray[np.uint8], reasons: Reasons
) -> npt.NDArray[np.int64]:
    """Set the kind of every record and the reason of what cannot be decoded at all; returns the usage rows."""
    plain = _named(ids, _USAGE_IDS) & (records.lengths <= codec.VALUE_BYTES_MAX)
    kind[plain] = USAGE
    for row in np.flatnonzero(~plain).tolist():
        value, key = records.values[row], records.keys[row]
        if value is None and key == TICK_KEY:
            kind[row] = TICK
        elif not value:
            reasons[row] = ("empty", "the record has no value")
        elif len(value) > codec.VALUE_BYTES_MAX:
            reasons[row] = ("oversized", f"{len(value)} bytes, at most {codec.VALUE_BYTES_MAX}")
        elif is_command(value):
            kind[row] = COMMAND
        else:
            reasons[row] = _foreign(value)
    return np.flatnonzero(plain)


def _foreign(value: bytes) -> tuple[str, str]:
    number = codec.header_id(value)
    if number is None:
        return "bad_framing", f"starts with {value[:5].hex()}: give 0x00 and a four-byte schema id"
    entry = codec.catalogue().get(number)
    if entry is None and codec.ID_FIRST <= number <= codec.ID_LAST:
        raise Fatal(f"schema id {number} is not known to this worker: deploy workers before emitters, or void the id")
    return "unknown_schema", f"schema id {number} has no place in this topic"


def _admit(state: PartitionState, batch: Batch, times: npt.NDArray[np.int64]) -> None:
    """Admission and de-duplication of the usage rows, in the design's order; fills verdicts and times."""
    usage, row, records = batch.usage, batch.row, batch.records
    append_ms, log_ms = records.append_ms[row], times[row]
    refused: Reasons = {}
    suspect = bounds.suspects(usage, batch.quantities)
    faults = {at: bounds.fault(usage, at) for at in np.flatnonzero(suspect).tolist()}
    codes, names = batch.accounts
    lanes = np.array([lane(name) for name in names], np.int64)[codes]
    misrouted = _misrouted(state, batch, lanes)
    occurred = bounds.longs(usage.column("occurred_at"))
    for at, found in faults.items():
        if found and found[0] == "duplicate_key":
            refused[at] = found
    _refuse(
        refused, misrouted, "misrouted", lambda at: f"key {records.keys[int(row[at])]!r} in partition {batch.partition}"
    )
    if not state.is_open:
        _refuse(refused, np.ones(len(row), np.bool_), "not_open", lambda _: "it stands before log.open")
    for at, found in faults.items():
        if found:
            refused.setdefault(at, found)
    append_us = append_ms * 1000
    _refuse(
        refused,
        occurred < append_us - LATE_S * 1_000_000,
        "too_late",
        lambda at: f"occurred {int(append_us[at] - occurred[at])} us before append, at most 34 days",
    )
    sources, source_names = encoded(usage.column("source"))
    born = np.array([_born(name) for name in source_names], np.int64)[sources]
    _refuse(
        refused,
        log_ms > born + SOURCE_LIFE_S * 1000,
        "source_expired",
        lambda at: "the source was born more than 5 days ago",
    )
    _refuse(
        refused,
        born > log_ms + SOURCE_AHEAD_S * 1000,
        "source_ahead",
        lambda at: "the source is born more than a day ahead",
    )
    closed = _closed(state, codes[~_mask(refused, len(row))], names)
    _refuse(
        refused,
        closed[codes],
        "unknown_account",
        lambda at: f"{names[int(codes[at])]!r} is not open: tollway account open",
    )
    _prices(state, usage, refused)
    sequence = bounds.longs(usage.column("sequence"))
    unsequenced = sequence == 0
    outside = (occurred <= (log_ms - UNSEQUENCED_S * 1000) * 1000) | (occurred > (log_ms + AHEAD_S * 1000) * 1000)
    _refuse(
        refused,
        unsequenced & outside,
        "unsequenced_age",
        lambda at: "unsequenced usage is taken within an hour of its call",
    )
    verdicts = np.zeros(len(row), np.uint8)
    verdicts[list(refused)] = REFUSED
    _deduplicate(state, batch, verdicts, refused, sequence, sources, source_names, lanes, append_ms)
    batch.accepted[:] = verdicts == ACCEPTED
    batch.verdict[row] = verdicts
    for at, found in refused.items():
        batch.reasons[int(row[at])] = found
    ahead = occurred > append_us + AHEAD_S * 1_000_000
    batch.occurred_us[:] = np.where(ahead, append_us, occurred)
    batch.window_us[:] = np.maximum(batch.occurred_us, append_us - UNSEQUENCED_S * 1_000_000)
    if usage.column("hold").null_count != len(row):
        held = usage.column("hold").is_valid().to_numpy(zero_copy_only=False)
        batch.window_us[held] = occurred[held]
    _undeclared(state, batch)


def _born(source: str) -> int:
    """Birth of a source; 0 where the text is no UUID (refused as `bad_id` before this matters)."""
    try:
        return born_ms(source)
    except ValueError:
        return 0


def _mask(refused: Reasons, m: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(m, np.bool_)
    mask[list(refused)] = True
    return mask


def _refuse(refused: Reasons, mask: npt.NDArray[np.bool_], reason: str, detail: Any) -> None:
    """The first reason wins."""
    for at in np.flatnonzero(mask).tolist():
        refused.setdefault(at, (reason, detail(at)))


def _misrouted(state: PartitionState, batch: Batch, lanes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Key is not the account, or the account's lane is not this partition's."""
    keys, (codes, names) = batch.records.keys, batch.accounts
    if len(batch.row) < len(keys):
        keys = [keys[at] for at in batch.row.tolist()]
    misrouted: npt.NDArray[np.bool_] = lanes % state.partitions != state.partition
    if not same_texts(batch.usage.column("account"), keys):
        known = {name.encode(): code for code, name in enumerate(names)}
        misrouted |= np.array([known.get(key or b"", -1) for key in keys], np.int64) != codes
    return misrouted


def _closed(state: PartitionState, codes: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.bool_]:
    """[names] True where an account that admissible usage (`codes`) names is not open."""
    closed = np.zeros(len(names), np.bool_)
    for code in np.flatnonzero(np.bincount(codes, minlength=len(names))).tolist():
        closed[code] = state.directory.account(names[code]) is None
    return closed


def _prices(state: PartitionState, usage: pa.RecordBatch, refused: Reasons) -> None:
    """`unknown_price`, and `price_mismatch` where the fold's own sum is not the event's revenue."""
    column = usage.column("price_ref")
    if column.null_count == len(column):
        return
    for at in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)).tolist():
        if at in refused:
            continue
        price = state.directory.prices.get(column[at].as_py())
        if price is None:
            refused[at] = ("unknown_price", f"{column[at].as_py()!r} is not in the price book: tollway price add")
            continue
        due = sum(units * price["unit_nano"].get(meter, 0) for meter, units in usage.column("quantities")[at].as_py())
        stamped = usage.column("revenue_nano")[at].as_py(), usage.column("revenue_asset")[at].as_py()
        if stamped != (due, price["asset"]):
            refused[at] = ("price_mismatch", f"stamped {stamped[0]} nano {stamped[1]}, due {due} nano {price['asset']}")


def _deduplicate(
    state: PartitionState, batch: Batch, verdicts: npt.NDArray[np.uint8], refused: Reasons, sequence: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64], source_names: list[str], lanes: npt.NDArray[np.int64], append_ms: npt.NDArray[np.int64],
) -> None:  # fmt: skip
    admitted = verdicts == ACCEPTED
    numbered = admitted & (sequence > 0)
    if numbered.all():
        verdicts[:] = state.dedupe.sequenced(source_names, sources, lanes, sequence)
    else:
        verdicts[numbered] = state.dedupe.sequenced(
            source_names, sources[numbered], lanes[numbered], sequence[numbered]
        )
    for at in np.flatnonzero(numbered & (verdicts == REFUSED)).tolist():
        refused[at] = ("hole_closed", f"sequence {int(sequence[at])} lies below a hole that had to be closed")
    for at in np.flatnonzero(admitted & (sequence == 0)).tolist():
        event_id = batch.usage.column("event_id")[at].as_py()
        verdicts[at] = state.dedupe.unsequenced(event_id, int(append_ms[at]), int(lanes[at]))


def _undeclared(state: PartitionState, batch: Batch) -> None:
    """Meters nobody declared: stored, not counted, alarmed."""
    found = batch.quantities
    for code, name in enumerate(found.meters):
        if name not in state.directory.meters:
            count = int(np.count_nonzero(batch.accepted[found.row[found.meter == code]]))
            if count:
                batch.undeclared[name] = batch.undeclared.get(name, 0) + count
