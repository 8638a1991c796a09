"""What must hold, by name: after every step, at a script's answer, and at rest (gate-contract §5.1, gate-held)."""

from typing import TYPE_CHECKING, Any

from tests.simulation.gate_fold import ACCOUNT, truth
from tests.simulation.gate_gates import Call
from tests.simulation.gate_leases import Drawn
from tests.simulation.gate_model import DAY_MS, DAY_S, Lane

if TYPE_CHECKING:
    from tests.simulation.gate_world import World

TAKEN = ("H", "C")


class Violation(AssertionError):
    """`name` is the invariant's."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


def expect(holds: bool, name: str, detail: Any) -> None:
    if not holds:
        raise Violation(name, str(detail))


def gone(lane: Lane, scope: str, base: str) -> bool:
    """Whether a field's window ended a day ago, by the lane's own log time."""
    assert lane.m is not None
    stop = Lane._stop(scope, base, 0)
    window = base.partition(" ")[2][0]
    return window != "L" and stop is not None and stop * 1000 + DAY_MS <= lane.m.log


def represented(world: "World", call: Call) -> bool:
    """Whether Redis holds or counts a call's load."""
    lane = world.lane
    record = lane.h.get(call.hold)
    if record is not None and record.st in TAKEN:
        return True
    if call.offset is None or lane.m is None:
        return False
    return all((lane.used(*where) or 0) >= total or gone(lane, *where) for where, total in call.need.items() if total)


def open_sums(lane: Lane) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for record in lane.h.values():
        if record.st in TAKEN:
            for scope, base, units in record.fields:
                sums[scope, base] = sums.get((scope, base), 0) + units
    return sums


def always(world: "World") -> None:
    """After every step."""
    lane = world.lane
    if lane.m is None:
        return
    sums = open_sums(lane)
    for scope, fields in lane.s.items():
        for base, (_, held) in fields.items():
            if held is not None:
                expect(held == sums.get((scope, base), 0), "TIE", (scope, base, held, sums.get((scope, base))))
            window = base.partition(" ")[2][0]
            if window != "L" or scope.partition("~")[2].startswith("run"):
                expect(f"{scope} {base}" in lane.fx, "FX", (scope, base))
    for (scope, base), total in sums.items():
        if total and lane.held(scope, base) is None:
            expect(gone(lane, scope, base), "TIE", ("absent", scope, base, total))
    for call in world.calls.values():
        _cover(world, call)
    for call in {id(drawn.lease): drawn.lease for drawn in world.drawn}.values():
        _leased(world, call)


def _cover(world: "World", call: Call) -> None:
    if call.voided or call.void_late or call.expired or call.lost_usage:
        return
    if represented(world, call):
        call.uncovered = False
    else:
        expect(call.uncovered, "COVER", call)


def shown(world: "World", drawn: Drawn, where: tuple[str, str]) -> bool:
    """Whether Redis' totals contain usage that a lease has covered."""
    if drawn.lost_usage or drawn.offset is None:
        return drawn.lost_usage
    return (world.lane.used(*where) or 0) >= drawn.need.get(where, 0) or gone(world.lane, *where)


def _leased(world: "World", call: Call) -> None:
    """A lease holds what was drawn on it until it is counted, or log time has expired it."""
    if call.expired or call.lost:
        return
    record = world.lane.h.get(call.hold)
    held = {(row[0], row[1]): row[2] for row in record.fields} if record is not None and record.st == "H" else {}
    owed: dict[tuple[str, str], int] = {}
    for drawn in world.drawn:
        if drawn.lease is call:
            expect(drawn.at_us // 1000 < call.exp, "LEASE", ("drawn after its end", drawn))
            for where in drawn.units:
                if not shown(world, drawn, where):
                    owed[where] = owed.get(where, 0) + drawn.covered(where)
    short = {where: units for where, units in owed.items() if units > held.get(where, 0)}
    expect(not short, "LEASE", (short, record, call))


def before(world: "World", kind: str, arguments: tuple[Any, ...]) -> Any:
    """What a check after the script compares with."""
    lane = world.lane
    if kind == "authorize":
        return lane.copy()
    if kind in ("capture", "void"):
        record = lane.h.get(arguments[1 if kind == "capture" else 0])
        return None if record is None else record.st
    if kind == "apply":
        return {(s, b): used for s, fields in lane.s.items() for b, (used, _) in fields.items() if used is not None}
    if kind == "sweep":
        return (
            {hold: (record.st, lane.hx.get(hold, 0)) for hold, record in lane.h.items()},
            lane.m.log if lane.m else 0,
        )
    return None


def after(world: "World", kind: str, arguments: tuple[Any, ...], reply: Any, found: Any) -> None:
    """At a script's answer."""
    if kind == "authorize":
        _authorized(world, arguments, reply, found)
    elif kind == "capture" and reply[0] in ("OK", "LATE"):
        record, used = world.lane.h[arguments[1]], arguments[2]
        right = all(units == used.get(base.partition(" ")[0], 0) for _, base, units in record.fields)
        expect(record.st == "C" and right, "CAPTURED", (record, used))
        expect(found != "C", "CAPTURED", ("twice", record))
    elif kind == "void" and reply[0] == "OK":
        expect(found == "H", "CAPTURED", ("void of", found, arguments))
    elif kind == "apply":
        for (scope, base), used in found.items():
            now = world.lane.used(scope, base)
            expect(now is not None and now >= used, "MONOTONE", (scope, base, used, now))
    elif kind == "end" and reply[0] == "OK":
        _ready(world)
    elif kind == "sweep" and reply[0] == "OK":
        records, log = found
        for hold in reply[1]:
            state, due = records[hold]
            expect(state == "H" and due <= log, "EXPIRY", (hold, state, due, log))
            call = world.calls[hold]
            if call.offset is not None and world.log[call.offset].append_ms < log and not call.lost:
                expect(represented(world, call), "EXPIRY", ("its usage is read, not shown", call))
            for drawn in world.drawn if call.lease and not call.lost else ():
                if drawn.lease is call and drawn.offset is not None and world.log[drawn.offset].append_ms < log:
                    missing = [where for where in drawn.units if not shown(world, drawn, where)]
                    expect(not missing, "EXPIRY", ("what was drawn is read, not shown", missing, call))


def _ready(world: "World") -> None:
    """READY never before all totals of the offset that Redis says it is complete up to."""
    lane = world.lane
    assert lane.m is not None
    expect(lane.m.off >= 0, "READY", lane.m)
    for (scope, base), total in truth(world.log, lane.m.off).items():
        stop = Lane._stop(scope, base, 0)
        ended = not base.endswith(" L:0") and stop is not None and (stop + DAY_S) * 1000 <= lane.m.log
        expect(not total or ended or (lane.used(scope, base) or 0) >= total, "READY", (scope, base, total))


def _authorized(world: "World", arguments: tuple[Any, ...], reply: Any, found: Lane) -> None:
    lane, word, gate_id, gen = world.lane, reply[0], arguments[9], arguments[10]
    if word != "OK":
        here, there = lane.content(), found.content()
        del here["m"], there["m"]
        expect(here == there, "REFUSAL", (word, arguments))
        if word == "DUP":
            call, record = world.calls[reply[8]], lane.h.get(reply[8])
            alive = record.st in TAKEN if record is not None else call.offset is not None
            expect(alive, "CALLID", ("names a hold that is void or expired", call))
        return
    assert lane.m is not None
    assert found.m is not None
    expect(lane.m.state == "READY", "COLDGRANT", lane.m)
    expect(gen is None or gen == found.m.gen, "OLDGEN", (gen, found.m.gen))
    if not world.stats["failovers"] + world.stats["flushes"]:
        same = [h for h, record in found.h.items() if record.call == arguments[3] and record.st in TAKEN]
        twice = [hold for hold in same if not world.calls[hold].expired]  # expired, tried again, then captured late
        expect(not twice, "IDEMPOTENT", ("a second hold of one call", arguments[3]))
    sums, policy = open_sums(lane), lane.p[ACCOUNT]
    for scope, base, _ in lane.h[reply[8]].fields:
        limit = Lane._limit(policy, scope.partition("~")[2], base)
        if limit is not None:
            load = (lane.used(scope, base) or 0) + sums[scope, base]
            expect(load <= limit, "OVERGRANT", (scope, base, load, limit))
    _heal(world, gate_id)
    _attributed(world, reply[8])


def _heal(world: "World", gate_id: str) -> None:
    """After a grant no acknowledged live hold of that very gate is missing."""
    lane = world.lane
    assert lane.m is not None
    gate = next((gate for gate in world.gates if gate.id == gate_id), None)
    for hold, mine in gate.holds.items() if gate is not None else ():
        call, record = mine.call, lane.h.get(hold)
        if mine.voided or call.void_late or call.expired or (record is not None and record.st == "X"):
            continue
        if record is not None and record.st in TAKEN:
            if record.st == "H" and not mine.captured:
                amounts = {(scope, base): units for scope, base, units in record.fields}
                short = [f for f in mine.fields if amounts.get((f[0], f[1]), f[2]) < f[2]]
                expect(not short, "HEAL", ("too little", short, record))
            continue
        late = mine.exp + 900_000 <= lane.m.log
        expect(late or represented(world, call), "HEAL", ("missing", call))


def _attributed(world: "World", hold: str) -> None:
    """Load beyond a limit has named causes; in clean worlds it is 0, or `expired` alone."""
    if world.policy_changed:
        return
    for scope, base, _ in world.calls[hold].fields:
        where = (scope, base)
        limit = Lane._limit(world.policy, scope.partition("~")[2], base)
        loads = [(call, call.load(where)) for call in world.calls.values()]
        excess = sum(load for _, load in loads) + world.metering.get(where, 0) + _drawn(world, where) - (limit or 0)
        if limit is None or excess <= 0:
            continue
        expired = sum(load for call, load in loads if call.expired)
        expired += _drawn(world, where, uncovered=True)
        causes = expired + world.metering.get(where, 0)
        causes += sum(call.overrun(where) for call, _ in loads)
        causes += sum(load for call, load in loads if (call.lost or call.void_late) and not call.expired)
        world.stats["over a limit, attributed"] += 1
        if world.profile.clean and not world.profile.void_late:
            expect(excess <= expired, "OVERSPEND", (where, excess, expired))
        expect(excess <= causes, "ATTRIBUTION", (where, excess, causes))


def _drawn(world: "World", where: tuple[str, str], uncovered: bool = False) -> int:
    """Units of a field drawn on leases; uncovered: on those that have expired or were lost, or in a window that they do not hold."""
    found = [drawn for drawn in world.drawn if not drawn.lost_usage]
    if uncovered:
        found = [each for each in found if each.lease.expired or each.lease.lost or not each.covered(where)]
    return sum(each.units.get(where, 0) for each in found)


def idempotent(world: "World", kind: str, arguments: tuple[Any, ...], copy: Lane) -> None:
    """A script run twice = once, write counters apart."""
    getattr(copy, kind)(*arguments)
    once = copy.content(counters=False)
    once = {name: repr(part) for name, part in once.items()}
    getattr(copy, kind)(*arguments)
    again = {name: repr(part) for name, part in copy.content(counters=False).items()}
    if kind == "sweep":  # what is due later stays due later; a second sweep takes the next ones
        return
    expect(once == again, "IDEMPOTENT", (kind, arguments))


def at_rest(world: "World") -> None:
    """Faults have stopped, all that was owed is done, and nothing is open."""
    lane, fold = world.lane, world.fold
    expect(lane.m is not None and lane.m.state == "READY", "Q.READY", lane.m)
    expect(not any(record.st in TAKEN for record in lane.h.values()), "Q.PHANTOM", lane.h)
    whole = truth(world.log, len(world.log))
    expect(fold.totals == whole, "Q.FOLD", "the fold is not its log")
    assert lane.m is not None
    for (scope, base), total in whole.items():
        found = lane.used(scope, base)
        if found is None:
            expect(gone(lane, scope, base), "Q.MISSING", (scope, base, total))
        else:
            expect(found == total, "Q.EQUAL", (scope, base, found, total))
    for scope, fields in lane.s.items():
        for base, (_, held) in fields.items():
            expect(not held, "Q.HELD", (scope, base, held))
            expect(not gone(lane, scope, base), "Q.LEAK", (scope, base))
