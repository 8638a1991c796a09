"""What the fold knows of one lane in Redis, and what each answer of a script makes of it (gate-contract §2.2).

refresh → live on an assignment; cold, lost or foreign lanes go begin → fill → gates → live, a *rewrite*. Nothing here waits
or connects.
"""

from dataclasses import dataclass
from enum import StrEnum

from tollway.connectors.redis import Answer
from tollway.schemas.ids import born_ms
from tollway.schemas.usage import SOURCE_LIFE_S
from tollway.streams.dedupe import Dedupe

GATES_WAIT_S = 2.0
"""A rewrite gives gates this long to re-assert their holds, where gates have ever acknowledged a write."""
BEGIN_AGAIN_S = 1.0
"""Shortest time between two begins of one lane: two folds that rewrite each other's lane do not spin."""
HALTED_S = 2.0
"""A lane that belongs to another log is looked at again this often."""


class Phase(StrEnum):
    """Where a lane stands."""

    REFRESH = "refresh"
    """Ours since a moment ago: all totals are due, without COLD."""
    LIVE = "live"
    BEGIN = "begin"
    """Cold, lost, or of an earlier log: a rewrite is due."""
    FILL = "fill"
    """COLD by our rewrite: all totals are due."""
    GATES = "gates"
    """All totals are written; gates re-assert until `end_at`, then the rewrite ends. Ordinary applies go on."""
    HALTED = "halted"
    """The lane belongs to another log of the same growth step, or to a later one."""


WHOLE = (Phase.REFRESH, Phase.FILL)


@dataclass
class LaneView:
    """One lane. Times `_at` are seconds of the caller's monotonic clock."""

    number: int
    phase: Phase = Phase.REFRESH
    expect: int | None = None
    """Offset up to which Redis was last said to be complete; None = not known, so every window's end is told."""
    begun: int = -1
    """Redis refuses what is older: wait until the log is read up to here."""
    log_ms: int = -1
    """Log time that Redis was last told."""
    gen: int = -1
    gates: int = 0
    end_at: float = 0.0
    begin_at: float = 0.0
    sweep_at: float = 0.0

    def waits(self, off: int, now: float) -> bool:
        """Whether nothing can be sent at offset `off`."""
        return off < self.begun or (self.phase in (Phase.BEGIN, Phase.HALTED) and now < self.begin_at)

    def applied(self, answer: Answer, off: int, log_ms: int, now: float) -> bool:
        """A whole batch was answered. True = Redis has it complete."""
        if answer.word == "OK":
            self.expect, self.log_ms = off, log_ms
            if self.phase is Phase.FILL:
                self.phase, self.end_at = Phase.GATES, now + (GATES_WAIT_S if self.gates else 0.0)
            elif self.phase is not Phase.GATES:
                self.phase = Phase.LIVE if answer.state == "READY" else Phase.BEGIN
            return True
        if answer.word == "OLD":
            self.begun = answer.begun
            self.phase = Phase.REFRESH if self.phase is Phase.FILL else self.phase
        elif answer.word in ("LOST", "EPOCH"):
            self.phase = Phase.BEGIN
        return False  # BROKEN: the same again from its first part

    def rewrite_begun(self, answer: Answer, now: float) -> None:
        """A begin was answered."""
        self.expect = None
        if answer.word == "OK":
            self.phase, self.gen, self.gates = Phase.FILL, answer.gen, answer.gates
            self.begin_at = now + BEGIN_AGAIN_S
        elif answer.word == "OLD":
            self.phase, self.begun = Phase.REFRESH, answer.begun
        else:
            self.phase, self.begin_at = Phase.HALTED, now + HALTED_S

    def rewrite_ended(self, answer: Answer) -> bool:
        """An end was answered. True = the lane is READY by our rewrite."""
        if answer.word == "OK":
            self.phase = Phase.LIVE
            return True
        if answer.word == "EPOCH":
            # Another rewrite has begun, or an older copy came back. Begin again only when an apply says COLD; all totals
            # are due, for what Redis has is not known: a batch of dirty ones alone would move its offset over a gap.
            self.phase, self.expect = Phase.REFRESH, None
        else:
            self.phase = Phase.BEGIN
        return False


def settlement(dedupe: Dedupe, lane: int, source: str, sequence: int, log_ms: int) -> str:
    """What became of the usage that a captured hold waits for: "folded", "lost" (its source has expired) or "open"."""
    seen = dedupe.sources.get(source, {}).get(lane)
    if seen is not None and sequence <= seen.high and not any(a <= sequence <= b for a, b in seen.holes):
        return "folded"
    if born_ms(source) + SOURCE_LIFE_S * 1000 < log_ms:
        return "lost"
    return "open"
