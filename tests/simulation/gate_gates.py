"""Gates with memory, spools and sources: authorize, emit, then capture; re-assert what Redis has forgotten (gate-contract §2.1)."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation import gate_leases
from tests.simulation.gate_fold import ACCOUNT, Entry
from tests.simulation.gate_leases import Drawn
from tollway.connectors.gate_policy import Outages

if TYPE_CHECKING:
    from tests.simulation.gate_world import World

GRACE_MS = 900_000


@dataclass
class Call:
    """One granted call, as the world knows it. `causes`: why it may be uncovered (§4)."""

    id: str
    hold: str
    gate: str
    scopes: tuple[str, ...]
    at_us: int
    grants: dict[str, int]
    fields: list[tuple[str, str, int]]
    exp: int
    used: dict[str, int] | None = None
    src: str = ""
    seq: int = 0
    offset: int | None = None
    need: dict[tuple[str, str], int] = field(default_factory=dict)
    """What a field's total must have reached to contain this call."""
    voided: bool = False
    void_late: bool = False
    expired: bool = False
    lost: bool = False
    """A loss of data has uncovered it at some time."""
    uncovered: bool = False
    """It is uncovered just now, by a loss of data."""
    lost_usage: bool = False
    lease: bool = False
    """No call, but a lease: what is drawn on it is usage of its own."""

    def load(self, where: tuple[str, str]) -> int:
        """What it really uses of a field; nothing where it was not executed."""
        if (self.voided and not self.void_late) or self.lost_usage or self.lease:
            return 0
        meter = where[1].partition(" ")[0]
        if not any((scope, base) == where for scope, base, _ in self.fields):
            return 0
        return self.used.get(meter, 0) if self.used is not None else self.grants.get(meter, 0)

    def overrun(self, where: tuple[str, str]) -> int:
        meter = where[1].partition(" ")[0]
        return max(0, self.load(where) - self.grants.get(meter, 0))


@dataclass
class Mine:
    """A gate's memory of one hold."""

    call: Call
    fields: list[tuple[str, str, int]]
    exp: int
    told: bool = False
    """Its capture was answered."""
    captured: bool = False
    voided: bool = False
    lease: bool = False


@dataclass
class SimGate:
    """One process life."""

    id: str
    src: str
    gen: int | None = None
    floor: int = 0
    holds: dict[str, Mine] = field(default_factory=dict)
    pending: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """call id → ask, of calls whose answer never came."""
    seq: int = 0
    spool: deque[tuple[Entry, Call | Drawn | None]] = field(default_factory=deque)
    acked: dict[int, int] = field(default_factory=dict)
    blocked_until_us: int = 0
    outages: Outages = field(default_factory=lambda: Outages("lease"))

    def remember(self, call: Call) -> Mine:
        """A hold that was granted."""
        mine = self.holds[call.hold] = Mine(call, list(call.fields), call.exp)
        return mine

    def learn(self, reply: tuple[Any, ...]) -> bool:
        """False = re-assert first."""
        gen, count = reply[1], reply[3]
        if gen is None:
            return True
        if gen == self.gen:
            self.floor = max(self.floor, count)
            return True
        if self.gen is not None and gen < self.gen:
            return True
        if self.gen is not None and self.holds:
            return False
        self.gen, self.floor = gen, count
        return True

    def reassert(self, world: "World") -> None:
        """All open holds; what fails leaves the old generation, so that it is done again."""
        if "gates_do_not_reassert" in world.bugs:
            self.gen = None
            return
        last = None
        for hold, mine in list(self.holds.items()):
            if mine.voided or (mine.lease and "leases_are_not_reasserted" in world.bugs):
                continue
            used = mine.call.used if mine.captured else None
            fields = mine.fields
            if used is not None:
                fields = [(scope, base, used.get(base.partition(" ")[0], 0)) for scope, base, _ in mine.fields]
            state, src, seq = ("C", mine.call.src, mine.call.seq) if used is not None else ("H", "", 0)
            told = (hold, ACCOUNT, mine.call.id, state, mine.exp, GRACE_MS, src, seq, self.id, fields)
            reply = world.deliver("reassert", world.now_us, *told)
            if reply is None or reply[0] == "COLD" or (last is not None and last[1] != reply[1]):
                return
            last = reply
        if last is None:
            last = world.meta(self.id)
        if last is not None and last[1] is not None:
            self.gen, self.floor = last[1], last[3]

    def authorize(self, world: "World", ask: tuple[Any, ...], call: str) -> None:
        scopes, triples, ttl_ms = ask
        for _ in range(2):
            hold = world.name("h")
            arguments = (ACCOUNT, scopes, call, f"f{call}", hold, triples, ttl_ms, GRACE_MS, self.id, self.gen)
            reply = world.deliver("authorize", world.now_us, *arguments, self.floor, gate=self, ask=ask)
            if reply is None:
                if world.profile.leases and gate_leases.draw(self, world, ask, call):
                    self.pending.pop(call, None)
                    self._orphan(world, hold)
                else:
                    self.pending[call] = ask
                return
            current = self.learn(reply)
            if not current:
                self.reassert(world)
            if reply[0] != "GEN":
                break
        self.pending.pop(call, None)
        if reply[0] not in ("OK", "DUP"):
            return
        found = world.calls[reply[8]]
        if (
            found.gate != self.id
            or found.voided
            or found.used is not None
            or any(mine.call is found for mine in self.holds.values())
        ):
            return
        self.remember(found)

    def _orphan(self, world: "World", hold: str) -> None:
        """Redis may have granted what was executed on a lease."""
        if (found := world.calls.get(hold)) is not None:
            self.void(world, self.remember(found))

    def execute(self, world: "World", mine: Mine) -> None:
        """The call is made: its usage goes into the spool, then its hold is captured."""
        call, dice = mine.call, world.dice
        used = {meter: dice.randint(0, units) for meter, units in call.grants.items()}
        if world.profile.overruns and dice.random() < 0.1:
            used = {meter: units + dice.randint(0, 3) for meter, units in used.items()}
        if "calls" in used:
            used["calls"] = call.grants["calls"]
        self.seq += 1
        call.used, call.src, call.seq = used, self.src, self.seq
        entry = Entry(0, "usage", self.src, self.seq, call.hold, call.at_us, call.scopes, tuple(sorted(used.items())))
        self.spool.append((entry, call))
        mine.captured = True
        self.capture(world, mine)

    def capture(self, world: "World", mine: Mine) -> None:
        call = mine.call
        assert call.used is not None
        told = (call.hold, call.used, call.src, call.seq, self.id, self.gen, self.floor)
        reply = world.deliver("capture", world.now_us, *told)
        if reply is None:
            return
        mine.told = True
        current = self.learn(reply)
        if not current:
            self.reassert(world)
        if reply[0] == "GONE" and current and reply[1] == self.gen:
            self.holds.pop(call.hold, None)

    def void(self, world: "World", mine: Mine) -> None:
        mine.voided, mine.call.voided = True, True
        reply = world.deliver("void", mine.call.hold)
        if reply is not None:
            self.holds.pop(mine.call.hold, None)

    def extend(self, world: "World", mine: Mine) -> None:
        call = mine.call
        totals = {meter: units + world.dice.choice([0, 1, 5]) for meter, units in call.grants.items()}
        told = (totals, 120_000, GRACE_MS, ACCOUNT, self.id, self.gen, self.floor)
        reply = world.deliver("extend", world.now_us, call.hold, *told, call=call)
        if reply is None:
            return
        if not self.learn(reply):
            self.reassert(world)
        if reply[0] == "OK":
            flat = reply[5]
            mine.fields = [(flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3)]
            mine.exp = reply[4]

    def poll(self, world: "World") -> None:
        """Where the lane stands; forget what is settled; tell what Redis has not answered."""
        reply = world.meta(self.id)
        if reply is None:
            return
        if not self.learn(reply):
            self.reassert(world)
        gate_leases.end(self, world)
        for hold, mine in list(self.holds.items()):
            if mine.voided:
                self.void(world, mine)
            elif mine.captured and not mine.told:
                self.capture(world, mine)
            elif mine.captured:
                offset = self.acked.get(mine.call.seq)
                if offset is not None and reply[1] == self.gen and reply[2] > offset:
                    self.holds.pop(hold, None)
            elif world.now_us // 1000 > mine.exp + 10 * GRACE_MS:
                self.holds.pop(hold, None)
