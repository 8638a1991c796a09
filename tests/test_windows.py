"""Windows: starts, ends, what is still counted."""

import calendar
from datetime import UTC, datetime

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tollway.schemas.command import WINDOWS
from tollway.streams.windows import FINEST_FIRST, KEEP_S, end_s, oldest_start_s, start_s, starts_s

SECONDS = st.integers(0, 4_102_444_800)  # up to the year 2100
ENDING = st.sampled_from(["m", "h", "d", "M"])


def by_calendar(window: str, at: int) -> tuple[int, int]:
    """The same window by the standard library's calendar."""
    t = datetime.fromtimestamp(at, UTC)
    if window == "M":
        days = calendar.monthrange(t.year, t.month)[1]
        start = int(datetime(t.year, t.month, 1, tzinfo=UTC).timestamp())
        return start, start + days * 86_400
    kept = {"m": t.replace(second=0), "h": t.replace(minute=0, second=0), "d": t.replace(hour=0, minute=0, second=0)}
    start = int(kept[window].timestamp())
    return start, start + {"m": 60, "h": 3_600, "d": 86_400}[window]


@given(ENDING, SECONDS)
def test_windows_are_those_of_the_calendar(window: str, at: int) -> None:
    """Start and end of every window agree with the standard library's UTC calendar, leap years included."""
    start = start_s(window, at)
    assert (start, end_s(window, start)) == by_calendar(window, at)


@given(ENDING, SECONDS)
def test_a_window_is_half_open(window: str, at: int) -> None:
    """The last second before the end is inside; the end itself starts the next window."""
    end = end_s(window, start_s(window, at))
    assert end is not None
    assert start_s(window, end - 1) == start_s(window, at)
    assert start_s(window, end) == end


@given(st.lists(SECONDS, min_size=1), st.sampled_from(WINDOWS), st.sampled_from(WINDOWS))
def test_coarser_windows_follow_from_finer_starts(times: list[int], fine: str, coarse: str) -> None:
    """A coarser window's start computed from a finer window's start is that of the time itself: groups can be folded up."""
    if FINEST_FIRST[fine] > FINEST_FIRST[coarse]:
        fine, coarse = coarse, fine
    at = np.array(times, np.int64)
    assert starts_s(coarse, starts_s(fine, at)).tolist() == starts_s(coarse, at).tolist()


@given(ENDING, SECONDS)
def test_oldest_counted_window(window: str, step_time: int) -> None:
    """A window is counted exactly while its end plus its keep lies behind the step time."""
    oldest = oldest_start_s(window, step_time)
    end = end_s(window, oldest)
    assert end is not None
    assert end + KEEP_S[window] > step_time
    if oldest > 0:
        assert oldest + KEEP_S[window] <= step_time  # the window before ends where this one starts


@given(ENDING, SECONDS)
def test_counting_ends_on_the_second(window: str, at: int) -> None:
    """At end + keep − 1 a window is the oldest that is counted; at end + keep the next one is."""
    start = start_s(window, at)
    end = end_s(window, start)
    assert end is not None
    assert oldest_start_s(window, end + KEEP_S[window] - 1) == start
    assert oldest_start_s(window, end + KEEP_S[window]) == end


def test_life_never_ends() -> None:
    """`L` is one window from 0 on, and nothing is too old for it."""
    assert (start_s("L", 1_700_000_000), end_s("L", 0), oldest_start_s("L", 1_700_000_000)) == (0, None, 0)
