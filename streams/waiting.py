"""How long a fold has waited for its effects to be acknowledged, and why: what health shows of a sink that is away."""

import time
from collections.abc import Callable
from typing import Any

SENT = "sent, not acknowledged yet"
SHOWN_S = 1.0
"""Every turn waits for a moment; what is longer is told."""


class Waiting:
    """From the first sending of a turn's effects until a turn has gone through. A sink that hangs waits as one that refuses."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._reason = ""

    def sent(self) -> None:
        """Effects are under way."""
        if self._since is None:
            self._since, self._reason = self._clock(), SENT

    def failed(self, reason: str) -> None:
        """They were not taken, and are tried again."""
        self.sent()
        self._reason = reason

    def over(self) -> None:
        """All that was sent is acknowledged."""
        self._since = None

    def shown(self, now_ms: int) -> dict[str, Any] | None:
        """`since_ms` (of the clock that says `now_ms`), `for_s` and `reason`; None where nothing waits."""
        if self._since is None or (for_s := self._clock() - self._since) < SHOWN_S:
            return None
        return {"since_ms": now_ms - int(for_s * 1000), "for_s": int(for_s), "reason": self._reason}
