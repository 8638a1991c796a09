"""A gate's memory of what it holds, lane by lane: what Redis must be told again when it has forgotten (gate-contract §2.1)."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tollway.connectors.gate_calls import Me, Standing
from tollway.connectors.gate_decision import Hold
from tollway.schemas.lane import lane

HOLDS_MAX = 100_000
"""Open holds remembered; while there are as many, nothing new is granted (`busy`)."""
CAPTURED_KEEP_S = 600.0
"""A captured hold whose usage the emitter does not know (or no longer) is remembered this long."""


@dataclass
class Open:
    """One hold that Redis may forget. `used` None = not captured yet. Times `_at` are the caller's monotonic seconds."""

    hold: Hold
    since_at: float
    ends_at: float
    """An uncaptured one is forgotten then: Redis has expired it."""
    used: Mapping[str, int] | None = None
    source: str = ""
    sequence: int = 0
    told: bool = False
    """The capture has been answered."""
    voided: bool = False


@dataclass
class LaneMemory:
    """What Redis last said of one lane, and the holds taken in it."""

    number: int
    gen: str = ""
    floor: int = 0
    off: int = -1
    holds: dict[str, Open] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One re-assertion at a time; who waits for it then asks again."""

    def me(self, gate: str, grace_ms: int) -> Me:
        return Me(gate, self.gen, self.floor, grace_ms)

    def learn(self, found: Standing) -> bool:
        """Take an answer in. False = Redis has another generation than this gate's holds: re-assert them first."""
        if not found.gen:
            return True
        if found.gen == self.gen:
            self.floor, self.off = max(self.floor, found.count), max(self.off, found.off)
            return True
        if self.gen and int(found.gen) < int(self.gen):
            return True  # an answer from before
        if self.gen and self.holds:
            return False
        self.gen, self.floor, self.off = found.gen, found.count, found.off
        return True


class Memory:
    """All lanes of one gate."""

    def __init__(self, gate: str, holds_max: int = HOLDS_MAX) -> None:
        self.gate, self._max = gate, holds_max
        self.lanes: dict[int, LaneMemory] = {}
        self.open = 0

    def lane(self, account: str) -> LaneMemory:
        number = lane(account)
        found = self.lanes.get(number)
        if found is None:
            found = self.lanes[number] = LaneMemory(number)
        return found

    @property
    def full(self) -> bool:
        return self.open >= self._max

    def take(self, hold: Hold, now: float, ends_at: float) -> Open:
        """Remember a hold; known ones stay as they are."""
        holds = self.lane(hold.account).holds
        found = holds.get(hold.id)
        if found is None:
            found = holds[hold.id] = Open(hold, now, ends_at)
            self.open += 1
        return found

    def find(self, hold: Hold) -> Open | None:
        return self.lane(hold.account).holds.get(hold.id)

    def drop(self, hold: Hold) -> None:
        if self.lane(hold.account).holds.pop(hold.id, None) is not None:
            self.open -= 1

    def all(self) -> Iterator[tuple[LaneMemory, Open]]:
        for found in list(self.lanes.values()):
            for each in list(found.holds.values()):
                yield found, each
