"""A seeded world round one lane: gates, a log, folds and zombies, a network that loses, a Redis that forgets."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.simulation import gate_invariants as invariants
from tests.simulation import gate_leases
from tests.simulation.gate_fold import EPOCH, SOURCE_LIFE_MS, Entry, Field, Fold, counted
from tests.simulation.gate_gates import GRACE_MS, Call, SimGate
from tests.simulation.gate_leases import Drawn
from tests.simulation.gate_model import Lane, Policy

START_US = 1_767_311_700_000_000  # 2026-01-01 23:55 UTC: a day ends in five minutes
USERS = ("user:u1", "user:u2")
GATES_ASK = frozenset({"authorize", "capture", "void", "extend", "reassert", "meta"})


@dataclass(frozen=True)
class Profile:
    """What may happen in a world, in parts of a thousand a step or as flags."""

    steps: int
    lose: int
    failover: int
    flush: int
    crash: int
    death: int
    metering: bool
    overruns: bool
    policies: bool
    void_late: bool
    blocked: bool
    """Spools stop, sometimes for longer than holds last."""
    jumps: bool
    """Time jumps over hours and days."""
    leases: bool = False
    """Redis is away from gates for a while, and they have leases."""

    @classmethod
    def of(cls, seed: int, dice: random.Random, kind: str = "mixed") -> "Profile":
        """mixed: a quarter is clean (a bad network alone), an eighth storms. storm: failovers at 8 % of the steps, days that
        end. days: time jumps over windows' ends. leases: outages, half of them with failovers and deaths."""
        if kind == "leases":
            harsh = seed % 2
            return cls(120, 30, 20 * harsh, 0, 25, 10 * harsh, False, False, False, False, seed % 4 > 1, False, True)
        if kind == "storm":
            return cls(120, 60, 80, 5, 40, 15, False, False, False, False, False, True)
        if kind == "days":
            return cls(110, 80, dice.choice([0, 15]), 5, 60, 5, False, False, False, False, False, True)
        if seed % 4 == 0:
            return cls(100, 60, 0, 0, 20, 0, False, False, False, False, seed % 8 == 0, seed % 16 == 4)
        storm = seed % 8 == 1
        flags = [dice.random() < 0.5 for _ in range(6)]
        return cls(110, 60, 80 if storm else dice.choice([0, 15]), dice.choice([0, 5]), 25, 15, *flags)

    @property
    def clean(self) -> bool:
        return not (self.failover or self.flush or self.death or self.metering or self.overruns or self.policies)


class World:
    """`bugs` are planted faults (`gate_mutants`)."""

    def __init__(self, seed: int, bugs: frozenset[str] = frozenset(), kind: str = "mixed") -> None:
        self.seed, self.bugs, self.dice = seed, bugs, random.Random(seed)
        self.profile = Profile.of(seed, self.dice, kind)
        self.now_us, self.names = START_US, 0
        self.lane = Lane(bugs)
        self.snapshots: list[Lane] = []
        self.log: list[Entry] = []
        self.totals: dict[Field, int] = {}
        self.seen: set[tuple[str, int]] = set()
        self.calls: dict[str, Call] = {}
        self.asks: dict[str, tuple[Any, ...]] = {}
        self.metering: dict[Field, int] = {}
        self.drawn: list[Drawn] = []
        self.grace_ms, self.away_until_us = GRACE_MS, 0
        self.born_ms: dict[str, int] = {}
        self.stats: Counter[str] = Counter()
        self.policy = Policy(1, self._limits(), max_staleness_s=self.dice.choice([30, *[10**7] * 9]))
        self.policy_changed = self.faults = False
        self.dead: list[SimGate] = []
        self.gates = [self._gate() for _ in range(self.dice.choice([1, 2, 3]))]
        self.fold, self.zombies = Fold("f0", bugs), list[Fold]()
        self.saved = self.fold.checkpoint()
        self.log.append(Entry(self.now_us // 1000, "policy", policy=self.policy))
        self._open()
        self.faults = True

    def _limits(self) -> dict[str, int]:
        dice = self.dice
        limits = {
            "acct|calls|d": dice.randint(4, 16),
            "user|calls|h": dice.randint(2, 8),
            "acct|usd|L": dice.randint(20, 120),
            "user|usd|d": dice.randint(15, 60),
            "run|usd|L": dice.randint(10, 50),
        }
        room = 4 if self.profile.leases else 1  # for a lease beside the calls
        return {name: room * limit for name, limit in limits.items()}

    def _gate(self) -> SimGate:
        gate = SimGate(self.name("g"), self.name("s"))
        self.born_ms[gate.src] = self.now_us // 1000
        return gate

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def _open(self) -> None:
        """The lane's first rewrite."""
        while not self.fold.clean:
            self.fold.fold(self.log[self.fold.pos :])
            self.fold.write(self)
            self.now_us += 1_000_000

    # The network, and the scripts behind it.

    def deliver(self, kind: str, *arguments: Any, **about: Any) -> Any:
        """One script call; None = no answer came. What Redis did is judged whether or not it came."""
        if self.away(kind):
            return None
        lost = self.dice.random() * 1000 < self.profile.lose if self.faults else False
        if lost and self.dice.random() < 0.5:
            return None
        reply = self.run(kind, *arguments, **about)
        return None if lost else reply

    def run(self, kind: str, *arguments: Any, **about: Any) -> Any:
        """The script, and what must hold after it."""
        before = invariants.before(self, kind, arguments)
        twice = self.faults and kind != "begin" and self.dice.random() < 0.15
        copy = self.lane.copy() if twice else None
        reply = getattr(self.lane, kind)(*arguments)
        self.stats[f"{kind} {reply[0]}"] += 1
        self._learn(kind, arguments, reply, about, before)
        invariants.after(self, kind, arguments, reply, before)
        if copy is not None:
            invariants.idempotent(self, kind, arguments, copy)
        return reply

    def away(self, kind: str) -> bool:
        """Whether gates cannot reach Redis just now; the fold can."""
        return self.faults and kind in GATES_ASK and self.now_us < self.away_until_us

    def meta(self, gate: str) -> tuple[Any, ...] | None:
        """HMGET m, as a gate reads it."""
        m = self.lane.m
        return None if m is None or self.away("meta") else ("META", m.gen, m.off, self.lane.g.get(gate, 0))

    def _learn(self, kind: str, arguments: tuple[Any, ...], reply: Any, about: dict[str, Any], before: Any) -> None:
        """What the world now knows to be true, whoever was told."""
        if kind == "authorize" and reply[0] == "OK":
            scopes, call = arguments[2], arguments[3]
            _, hold, at_us, exp, grants, _ = reply[7:]
            fields = [(row[0], row[1], row[2]) for row in self.lane.h[hold].fields]
            self.calls[hold] = Call(call, hold, arguments[9], scopes, at_us, dict(grants), fields, exp)
        elif kind == "extend" and reply[0] == "OK":
            call, totals = about["call"], arguments[2]
            call.grants = {meter: max(units, totals.get(meter, 0)) for meter, units in call.grants.items()}
            call.fields = [(row[0], row[1], row[2]) for row in self.lane.h[call.hold].fields]
            call.exp = reply[4]
        elif kind == "void" and reply[0] == "OK" and self.calls[arguments[0]].used is not None and before == "H":
            self.calls[arguments[0]].void_late = True
        elif kind == "capture" and reply[0] in ("OK", "LATE") and arguments[4] > 1_000:
            self.calls[arguments[1]].lost = True  # a stray capture was first: the cause `second_usage`
        elif kind == "sweep" and reply[0] == "OK":
            for hold in reply[1]:
                self.calls[hold].expired = True

    # What happens, one thing a step.

    def step(self) -> None:
        dice, profile = self.dice, self.profile
        self._time()
        chance = dice.random() * 1000
        for weight, happen in (
            (profile.failover, self._failover),
            (profile.flush, self._flush),
            (profile.crash, self._crash),
            (profile.death, self._death),
            (25 if profile.policies else 0, self._policy),
            (20 if profile.void_late else 0, self._void_late),
            (80 if profile.leases else 0, self._away),
        ):
            if chance < weight:
                happen()
                return
            chance -= weight
        kinds = [self._ask, self._execute, self._poll, self._send, self._fold, self._write, self._sweep]
        kinds += [self._void, self._extend, self._save, self._zombie, self._meter]
        weights = [26, 16, 7, 14, 14, 22, 5, 3, 5, 4, 4, 3]
        if profile.leases:
            kinds, weights = [*kinds, self._lease], [*weights, 22]
        dice.choices(kinds, weights)[0]()

    def _time(self) -> None:
        dice = self.dice
        step_us = dice.choice([1_000, 100_000, 2_000_000, 20_000_000])
        if dice.random() < 0.05:
            step_us = dice.choice([120, 600, 1_200]) * 1_000_000
        if self.profile.jumps and dice.random() < 0.04:
            step_us = dice.choice([3_600, 12 * 3_600, 26 * 3_600]) * 1_000_000
        self.now_us += step_us

    def _failover(self) -> None:
        """One of four older copies becomes Redis; what followed it is gone, and does not come back."""
        if self.snapshots:
            place, before = self.dice.randrange(len(self.snapshots)), self.lane
            self.lane = self.snapshots[place].copy()
            for hold, record in before.h.items():
                if hold in self.lane.h and sum(f[2] for f in self.lane.h[hold].fields) < sum(
                    f[2] for f in record.fields
                ):
                    self.calls[hold].lost = True  # it is there, and holds less: an extension is gone
            self.snapshots = self.snapshots[: place + 1]
            self.stats["failovers"] += 1
            self._lost_data()

    def _away(self) -> None:
        """Gates do not reach Redis for a while."""
        self.away_until_us = self.now_us + self.dice.choice([2, 30, 120, 600]) * 1_000_000

    def _lease(self) -> None:
        gate_leases.take(self._pick(), self, self._an_ask())

    def _flush(self) -> None:
        self.lane, self.snapshots = Lane(self.bugs), []
        self.stats["flushes"] += 1
        self._lost_data()

    def _lost_data(self) -> None:
        for call in self.calls.values():
            if not invariants.represented(self, call):
                call.lost = call.uncovered = True

    def _crash(self) -> None:
        """The fold starts anew from its checkpoint; the old one may live on."""
        if self.dice.random() < 0.6:
            self.zombies = [*self.zombies[-1:], self.fold]
        self.fold = self.saved.checkpoint()
        self.fold.name = self.name("f")
        if "no_refresh_on_assignment" in self.bugs:
            self.fold.phase = "live"
        self.stats["crashes"] += 1

    def _death(self) -> None:
        """A gate dies; a successor sends what its spool has left, or its disk is lost too."""
        gate = self.gates.pop(self.dice.randrange(len(self.gates)))
        if self.dice.random() < 0.7:
            self.dead.append(gate)
        else:
            for _, call in gate.spool:
                if call is not None and call.offset is None:
                    call.lost_usage = True
        self.gates.append(self._gate())
        self.stats["deaths"] += 1

    def _policy(self) -> None:
        limits = self._limits()
        stale_s = self.policy.max_staleness_s
        self.policy = Policy(self.policy.version + 1, limits, self.dice.random() < 0.2, max_staleness_s=stale_s)
        self.log.append(Entry(self.now_us // 1000, "policy", policy=self.policy))
        self.policy_changed = True

    def _some(self, gate: SimGate, captured: bool = False) -> Any:
        open_ones = [m for m in gate.holds.values() if not m.voided and m.captured == captured and not m.lease]
        return self.dice.choice(open_ones) if open_ones else None

    def _pick(self) -> SimGate:
        return self.dice.choice(self.gates)

    def _ask(self) -> None:
        gate, dice = self._pick(), self.dice
        ended = [call for call in self.calls.values() if (call.voided or call.expired) and call.id in self.asks]
        if ended and dice.random() < 0.1:  # the caller tries again what was given up
            call = dice.choice(ended).id
            gate.authorize(self, self.asks[call], call)
            return
        if gate.pending and dice.random() < 0.5:
            call = dice.choice(sorted(gate.pending))
            gate.authorize(self, gate.pending[call], call)
            return
        ask, call = self._an_ask(), self.name("c")
        self.asks[call] = ask
        gate.authorize(self, ask, call)

    def _an_ask(self) -> tuple[Any, ...]:
        dice = self.dice
        if self.profile.leases and dice.random() < 0.8:  # whom a lease is for
            most = dice.randint(1, 6)
            return ("acct", USERS[0]), (("calls", 1, 1), ("usd", most, dice.randint(1, most))), 20_000
        scopes = ("acct", dice.choice(USERS), *(("run:r1",) if dice.random() < 0.4 else ()))
        triples: list[tuple[str, int, int]] = [("calls", 1, 1)] if dice.random() < 0.8 else []
        if dice.random() < 0.6 or not triples:
            most = dice.randint(1, 20)
            triples.append(("usd", most, dice.randint(1, most)))
        return scopes, tuple(triples), dice.choice([20_000, 300_000])

    def _execute(self) -> None:
        gate = self._pick()
        if (mine := self._some(gate)) is not None:
            gate.execute(self, mine)

    def _void(self) -> None:
        gate = self._pick()
        if (mine := self._some(gate)) is not None:
            gate.void(self, mine)

    def _void_late(self) -> None:
        """A stray void of a call that was executed: refused where it is captured, else a bug of the service."""
        gate = self._pick()
        if (mine := self._some(gate, captured=True)) is not None:
            self.deliver("void", mine.call.hold)

    def _extend(self) -> None:
        gate = self._pick()
        if (mine := self._some(gate)) is not None:
            gate.extend(self, mine)

    def _poll(self) -> None:
        gate = self._pick()
        if self.dice.random() < 0.1 and (mine := self._some(gate, captured=True)) is not None:
            other = (mine.call.hold, {"calls": 9, "usd": 9}, mine.call.src, mine.call.seq + 1_000, gate.id, None, 0)
            self.deliver("capture", self.now_us, *other)  # stray: captured for other usage
        gate.poll(self)

    def _meter(self) -> None:
        """Usage without a hold."""
        if not self.profile.metering:
            return
        gate = self._pick()
        gate.seq += 1
        scopes = ("acct", self.dice.choice(USERS))
        entry = Entry(0, "usage", gate.src, gate.seq, "", self.now_us, scopes, (("calls", 1), ("usd", 3)))
        gate.spool.append((entry, None))
        for where, _, units in counted(entry, 0, frozenset()):
            self.metering[where] = self.metering.get(where, 0) + units

    def _send(self) -> None:
        gate = self.dice.choice([*self.gates, *self.dead])
        if self.profile.blocked and self.dice.random() < 0.05:
            gate.blocked_until_us = self.now_us + self.dice.choice([60, 2_400, 7_200]) * 1_000_000
        if gate.blocked_until_us > self.now_us:
            return
        for _ in range(min(len(gate.spool), self.dice.choice([1, 3]))):
            self.append(gate)

    def append(self, gate: SimGate) -> None:
        """The spool's first event comes to the log, sometimes twice."""
        entry, call = gate.spool.popleft()
        if self.now_us // 1000 > self.born_ms[entry.src] + SOURCE_LIFE_MS:
            if call is not None:
                call.lost_usage = True  # dead-lettered: its source has expired
            return
        twice = self.faults and self.dice.random() < 0.15
        offset = len(self.log)
        for _ in range(2 if twice else 1):
            self.log.append(Entry(self.now_us // 1000, *list(vars(entry).values())[1:]))
        gate.acked[entry.seq] = offset
        self.seen.add((entry.src, entry.seq))
        for where, _, units in counted(self.log[offset], 0, frozenset()):
            self.totals[where] = self.totals.get(where, 0) + units
        if call is not None:
            call.offset = offset
            if isinstance(call, Drawn):
                call.units = {where: units for where, _, units in counted(self.log[offset], 0, frozenset())}
            call.need = {where: self.totals[where] for where, _, _ in counted(self.log[offset], 0, frozenset())}

    def _fold(self) -> None:
        if self.dice.random() < 0.3:
            self.log.append(Entry(self.now_us // 1000, "tick"))
        self.fold.fold(self.log[self.fold.pos : self.fold.pos + self.dice.choice([1, 5, 50])])

    def _write(self) -> None:
        if self.dice.random() < 0.3:
            self.snapshots = [*self.snapshots[-3:], self.lane.copy()]
        for _ in range(self.dice.choice([1, 1, 3])):
            self.fold.write(self)

    def _sweep(self) -> None:
        self.fold.sweep(self, 3)

    def _save(self) -> None:
        self.saved = self.fold.checkpoint()

    def _zombie(self) -> None:
        """An old instance goes on: it reads, writes and sweeps."""
        if self.zombies:
            zombie = self.dice.choice(self.zombies)
            zombie.fold(self.log[zombie.pos : zombie.pos + 2])
            zombie.write(self)
            if self.dice.random() < 0.2:
                zombie.sweep(self, 3)

    # The end: faults stop, everything that is owed is done.

    def settle(self) -> None:
        """No more faults; each side does what it owes; time goes on until nothing is open."""
        self.faults, self.zombies = False, []
        for gate in [*self.gates, *self.dead]:
            while gate.spool:
                self.append(gate)
        waits_s = [1] * 8 + [61] * 4 + [1_300] * 3 + [61] * 2 + [3_600] * 2 + [5 * 86_400, 3_600, 61, 86_400, 61, 61]
        for wait_s in waits_s:
            self.now_us += wait_s * 1_000_000
            self.log.append(Entry(self.now_us // 1000, "tick"))
            self.fold.fold(self.log[self.fold.pos :])
            for gate in self.gates:
                gate.poll(self)
            for _ in range(200):
                if self.fold.clean and self.fold.told_log_ms >= self.fold.log_ms:
                    break
                self.fold.write(self)
                self.now_us += 100_000
            while self.fold.sweep(self, 50):
                pass
            while not self.fold.clean and self.fold.phase == "live":
                self.fold.write(self)
        invariants.at_rest(self)


def play(seed: int, bugs: frozenset[str] = frozenset(), kind: str = "mixed") -> World:
    """One world from start to rest. Raises invariants.Violation."""
    world = World(seed, bugs, kind)
    for _ in range(world.profile.steps):
        world.step()
        invariants.always(world)
    world.settle()
    return world


__all__ = ["EPOCH", "GRACE_MS", "Profile", "World", "play"]
