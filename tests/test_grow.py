"""What `topics grow` refuses, and what fits through a log that is closing."""

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from tollway.connectors.kafka import CurrentLog
from tollway.schemas import codec
from tollway.streams.grow import NOTHING, PROBE_BYTES, TICKS_ONLY, counts_fault


@pytest.mark.parametrize(
    ("counts", "there", "said"),
    [
        ((8, 32), None, None),
        ((8, 32), 32, None),
        ((4, 8), None, None),
        ((8, 32), 64, "growing to 64 is under way, finish it: tollway topics grow 8 64"),
        ((8, 24), None, "TO is 24: give a power of two"),
        ((8, 8), None, "TO is 8: a log only grows"),
        ((8, 512), None, "give a power of two of at most 256"),
        ((16, 32), None, "FROM is 16: the log has 8 partitions"),
    ],
)
def test_a_growth_that_is_under_way_is_finished_as_it_was_begun(
    counts: tuple[int, int], there: int | None, said: str | None
) -> None:
    """The successor's count is the intent; `FROM TO` of a log that has TO already is no fault."""
    found = counts_fault(CurrentLog("usage.events", 0, 8, "0-a", "0-a", 8), *counts, there)
    assert found is None if said is None else said in (found or "")


SMALLEST = {
    "event_id": "0" * 32, "source": "0" * 32, "sequence": 0, "occurred_at": 0, "surface": "rest", "operation": "a",
    "account": "a", "principal_kind": "user", "principal": "a", "status": "ok", "latency_us": 0, "quantities": {"calls": 0},
}  # fmt: skip
COMMAND = {"command_id": "a", "account": "a", "kind": "run.close", "body": "{}", "signed_at": 0}


def batch_bytes(value: bytes | None, compression: int, headers: list[tuple[str, bytes]]) -> int:
    """What a broker compares with `max.message.bytes`: one record in a batch of its own."""
    batch = DefaultRecordBatchBuilder(2, compression, 0, -1, -1, -1, 1 << 20)
    batch.append(0, timestamp=0, key=b"a" if value else b"tick", value=value, headers=headers)
    return len(batch.build())


@pytest.mark.parametrize("compression", range(2))
def test_only_a_tick_fits_through_a_log_that_is_closing(compression: int) -> None:
    """The least that usage or a command can be, of equal bytes and compressed by gzip too, is too large; a tick is not."""
    signed = [("sig", bytes(64)), ("kid", b"a")]
    assert batch_bytes(codec.encode("UsageEvent", SMALLEST), compression, []) > TICKS_ONLY
    assert batch_bytes(codec.encode("Command", COMMAND), compression, signed) > TICKS_ONLY
    assert NOTHING < batch_bytes(None, 0, []) <= TICKS_ONLY
    assert batch_bytes(None, 0, [("grow", b"\0" * PROBE_BYTES)]) > TICKS_ONLY
