"""Windows: half-open [start, end) in UTC and whole seconds; `m`inute, `h`our, `d`ay, calendar `M`onth, `L`ife (design §5)."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tollway.schemas.command import WINDOWS

Seconds = npt.NDArray[np.int64]

DAY_S = 86_400
LENGTH_S = {"m": 60, "h": 3_600, "d": DAY_S}
KEEP_S = {"m": 2 * 3_600, "h": 2 * DAY_S, "d": 3 * DAY_S, "M": 35 * DAY_S}
"""How long after its end the fold still counts into a window; later usage is billed, not counted."""
IDLE_KEEP_S = 35 * DAY_S
"""A run's or session's life total is kept this long after its last usage; others' for ever."""
SHOWN_S = DAY_S
"""Redis shows a window's totals until this long after its end."""
AHEAD_S = DAY_S
"""Usage whose window starts further ahead of log time is not counted: only a hold's `at` from a broken clock gets there."""

FINEST_FIRST = {window: place for place, window in enumerate(WINDOWS)}


def start_s(window: str, at_s: int) -> int:
    """First second of the window that `at_s` lies in."""
    return int(starts_s(window, np.array([at_s], np.int64))[0])


def starts_s(window: str, at_s: Seconds) -> Seconds:
    """First seconds of the windows that `at_s` lie in. A window's start may be given for a coarser window's."""
    if window == "L":
        return np.zeros_like(at_s)
    if window == "M":
        return at_s.astype("datetime64[s]").astype("datetime64[M]").astype("datetime64[s]").astype(np.int64)
    return at_s - at_s % LENGTH_S[window]


def end_s(window: str, start: int) -> int | None:
    """First second behind the window that starts at `start`; None = it never ends."""
    if window == "L":
        return None
    if window == "M":
        month = np.datetime64(start, "s").astype("datetime64[M]") + 1
        return int(month.astype("datetime64[s]").astype(np.int64))
    return start + LENGTH_S[window]


@lru_cache(64)
def oldest_start_s(window: str, step_time_s: int) -> int:
    """Start of the oldest window that is still counted at a step: the first with end + keep > step time."""
    if window == "L":
        return 0
    return start_s(window, max(0, step_time_s - KEEP_S[window]))
