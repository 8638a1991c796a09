"""Audit blocks are cut by the log: the same blocks however the records were fetched."""

from hypothesis import given
from hypothesis import strategies as st

from tollway.streams.cutter import BLOCK_BYTES_MAX, BLOCK_OFFSETS, BlockCutter

Row = tuple[int, int, int, bool]


def test_a_block_ends_before_a_new_step_once_it_holds_more_than_ticks() -> None:
    """Ticks alone never end a block; the first step change after usage does."""
    rows: list[Row] = [
        (0, 0, 0, True),
        (1, 5_000, 0, True),
        (2, 5_001, 9, False),
        (3, 5_002, 9, False),
        (4, 10_000, 9, False),
    ]
    assert BlockCutter(0, 5_000).feed(rows) == [4]


def test_a_block_ends_at_its_offset_and_byte_bounds() -> None:
    """After offset 16,383, and after 16 MiB of values."""
    assert BlockCutter(0, 5_000).feed([(BLOCK_OFFSETS - 2, 0, 1, False), (BLOCK_OFFSETS - 1, 0, 1, False)]) == [2]
    assert BlockCutter(0, 5_000).feed([(0, 0, BLOCK_BYTES_MAX - 1, False), (1, 0, 1, False), (2, 0, 1, False)]) == [2]


@given(
    st.lists(st.tuples(st.integers(-2_000, 4_000), st.integers(0, 9_000_000), st.booleans()), max_size=60),
    st.integers(1, 20),
)
def test_cuts_do_not_depend_on_fetches(steps: list[tuple[int, int, bool]], size: int) -> None:
    """Fed at once or in pieces, and with a restart at any block's end: the same lengths."""
    rows: list[Row] = []
    at_ms = 0
    for offset, (gap, length, tick) in enumerate(steps):
        at_ms += gap
        rows.append((offset, at_ms, 0 if tick else length, tick))
    whole = BlockCutter(0, 5_000).feed(rows)
    cutter, pieces = BlockCutter(0, 5_000), []
    for start in range(0, len(rows), size):
        pieces += cutter.feed(rows[start : start + size])
    assert pieces == whole
    if whole:
        log_ms = max([0, *(row[1] for row in rows[: whole[0]])])
        assert BlockCutter(log_ms, 5_000).feed(rows[whole[0] :]) == whole[1:]
