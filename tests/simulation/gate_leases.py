"""Leases in a world: taken while Redis answers, drawn on while it is away, by the gate's own code for outages (design §6)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation.gate_fold import ACCOUNT, Entry, Field, counted
from tollway.connectors.gate_decision import Ask, Hold
from tollway.connectors.gate_policy import LEASE_S, Lease, key_of

if TYPE_CHECKING:
    from tests.simulation.gate_gates import Call, Mine, SimGate
    from tests.simulation.gate_world import World


@dataclass
class Drawn:
    """Usage that was covered by a lease, as the world knows it."""

    lease: "Call"
    at_us: int
    units: dict[Field, int]
    """By the window in which it is counted."""
    offset: int | None = None
    need: dict[Field, int] = field(default_factory=dict)
    """What a field's total must have reached to contain it."""
    lost_usage: bool = False

    def covered(self, where: Field) -> int:
        """Units of a field that the lease has to hold until they are counted."""
        return self.units.get(where, 0) if where in {(scope, base) for scope, base, _ in self.lease.fields} else 0


def asked(ask: tuple[Any, ...], call: str) -> Ask:
    """A world's ask as a gate knows it."""
    scopes, triples, _ = ask
    return Ask(ACCOUNT, scopes, {meter: (most, least) for meter, most, least in triples}, call=call)


def take(gate: "SimGate", world: "World", ask: tuple[Any, ...]) -> None:
    """As the keeper does: give back the former one if nothing was drawn, then hold a little for five minutes."""
    scopes, triples, _ = ask
    call, hold = world.name("c"), world.name("h")
    key = key_of(asked(ask, call))
    former = gate.outages.leases.pop(key, None)
    if former is not None:
        _give_back(gate, world, former)
    shares = tuple((meter, world.dice.randint(1, 8), 1) for meter, _, _ in triples)
    arguments = (ACCOUNT, scopes, call, f"f{call}", hold, shares, LEASE_S * 1000)
    reply = world.deliver("authorize", world.now_us, *arguments, world.grace_ms, gate.id, gate.gen, gate.floor)
    if reply is None or not gate.learn(reply) or reply[0] != "OK":
        return
    found = world.calls[reply[8]]
    found.lease = True
    gate.remember(found).lease = True
    held = Hold(found.hold, ACCOUNT, call, found.at_us, found.exp, tuple(found.fields))
    gate.outages.leases[key] = Lease(held, found.exp / 1000, dict(found.grants))


def draw(gate: "SimGate", world: "World", ask: tuple[Any, ...], call: str) -> bool:
    """No answer came: what the gate's outage code says. Whether the call was executed on a lease."""
    now_s = world.now_us / 1e6
    about = asked(ask, call)
    lease = gate.outages.leases.get(key_of(about))
    if lease is not None and "lease_drawn_after_its_end" in world.bugs:
        lease.ends_at = now_s + 1
    decision = gate.outages.answer(about, "away", now_s)
    if not decision.allowed:
        return False
    assert lease is not None
    if "lease_overdrawn" in world.bugs:
        lease.left = {meter: units + decision.up_to.get(meter, 0) for meter, units in lease.left.items()}
    used = tuple((meter, world.dice.randint(1, units)) for meter, units in sorted(decision.up_to.items()))
    gate.seq += 1
    named = lease.hold.id if "lease_usage_names_the_hold" in world.bugs else ""
    entry = Entry(0, "usage", gate.src, gate.seq, named, world.now_us, about.scopes, used)
    units = {where: units for where, _, units in counted(entry, 0, frozenset())}
    drawn = Drawn(world.calls[lease.hold.id], world.now_us, units)
    world.drawn.append(drawn)
    gate.spool.append((entry, drawn))
    world.stats["drawn"] += 1
    return True


def end(gate: "SimGate", world: "World") -> None:
    """Leases whose time is over: nothing is drawn any more; an unused one is given back, a drawn one waits for log time."""
    for key, lease in list(gate.outages.leases.items()):
        if lease.ends_at <= world.now_us / 1e6:
            del gate.outages.leases[key]
            _give_back(gate, world, lease)


def _give_back(gate: "SimGate", world: "World", lease: Lease) -> None:
    mine: Mine | None = gate.holds.get(lease.hold.id)
    if mine is not None and (not lease.drawn or "drawn_lease_is_voided" in world.bugs):
        gate.void(world, mine)
