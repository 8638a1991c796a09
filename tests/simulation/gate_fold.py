"""A fold that owns a lane: totals, closes, batches in parts, refresh, rewrite, sweep; and the log it reads (gate-contract §2.2)."""

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation.gate_model import DAY_S, Lane, Policy, span

if TYPE_CHECKING:
    from tests.simulation.gate_world import World

ACCOUNT, EPOCH = "a", "0-log"
COUNTED = {"calls": "hd", "usd": "dL"}
"""meter → windows that the fold counts."""
HOUR_S = 3_600
SOURCE_LIFE_MS = 5 * DAY_S * 1000

Field = tuple[str, str]
"""account~scope, base"""


@dataclass(frozen=True)
class Entry:
    """A record of the log: usage, a policy, or a tick."""

    append_ms: int
    kind: str
    src: str = ""
    seq: int = 0
    hold: str = ""
    at_us: int = 0
    scopes: tuple[str, ...] = ()
    used: tuple[tuple[str, int], ...] = ()
    policy: Policy | None = None


def counted(entry: Entry, log_ms: int, bugs: frozenset[str]) -> list[tuple[Field, int | None, int]]:
    """(field, window end, units) of one usage record."""
    at = entry.at_us // 1_000_000
    if not entry.hold:
        at = max(at, entry.append_ms // 1000 - HOUR_S)
    if "fold_counts_in_window_of_arrival" in bugs:
        at = entry.append_ms // 1000
    found = []
    for scope in entry.scopes:
        kind = scope.partition(":")[0]
        for meter, units in entry.used:
            for window in COUNTED[meter]:
                start, stop = span(window, at, kind)
                if window == "L":
                    stop = log_ms // 1000 + 35 * DAY_S if kind in ("run", "sess") else None
                found.append(((f"{ACCOUNT}~{scope}", f"{meter} {window}:{start}"), stop, units))
    return found


@dataclass
class Flight:
    """A batch under way: its parts as they stood at `off`."""

    off: int
    log_ms: int
    tok: str
    expect: int | None
    parts: list[tuple[list[tuple[str, str, int]], dict[str, int], dict[str, Policy], list[str]]]
    whole: bool
    keys: list[Field]
    told: bool
    """Its totals carry their ends."""
    next: int = 0


@dataclass
class Fold:
    """One instance. `name` is in its tokens."""

    name: str
    bugs: frozenset[str]
    pos: int = 0
    log_ms: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)
    totals: dict[Field, int] = field(default_factory=dict)
    ends: dict[Field, int] = field(default_factory=dict)
    policy: Policy | None = None
    dirty: set[Field] = field(default_factory=set)
    known: set[Field] = field(default_factory=set)
    closes: list[str] = field(default_factory=list)
    policy_due: bool = False
    phase: str = "refresh"
    expect: int | None = None
    begun: int = -1
    gen: int = -1
    told_log_ms: int = -1
    end_at_ms: int = 0
    flights: int = 0
    flight: Flight | None = None

    def checkpoint(self) -> "Fold":
        """The state alone: what Redis was told is not in it."""
        found = Fold(self.name, self.bugs, self.pos, self.log_ms, set(self.seen), dict(self.totals), dict(self.ends))
        found.policy = self.policy
        return found

    def twin(self) -> "Fold":
        return copy.deepcopy(self)

    def fold(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.pos += 1
            self.log_ms = max(self.log_ms, entry.append_ms)
            if entry.policy is not None:
                self.policy, self.policy_due = entry.policy, True
            if entry.kind != "usage":
                continue
            if (entry.src, entry.seq) in self.seen and "fold_counts_duplicates" not in self.bugs:
                continue
            self.seen.add((entry.src, entry.seq))
            for where, stop, units in counted(entry, self.log_ms, self.bugs):
                self.totals[where] = self.totals.get(where, 0) + units
                self.dirty.add(where)
                if stop is not None:
                    self.ends[where] = stop
            if entry.hold:
                self.closes.append(entry.hold)

    @property
    def clean(self) -> bool:
        told = not (self.dirty or self.closes or self.policy_due or self.flight)
        return told and self.phase == "live" and self.pos >= self.begun

    def _build(self, world: "World") -> Flight | None:
        whole = self.phase in ("refresh", "fill")
        keys = sorted(self.totals if whole else self.dirty)
        if "ended_totals_are_sent" not in self.bugs:
            keys = [k for k in keys if k not in self.ends or (self.ends[k] + DAY_S) * 1000 > self.log_ms]
        late = self.log_ms > self.told_log_ms
        if not (whole or keys or self.closes or self.policy_due or late):
            return None
        all_ends = whole or self.expect is None
        if "refresh_without_ends" in self.bugs and whole:
            all_ends = False
        if "unexpected_batch_without_ends" in self.bugs and not whole:
            all_ends = False
        rows = [(scope, base, self.totals[scope, base]) for scope, base in keys]
        told = {
            f"{k[0]} {k[1]}": self.ends[k]
            for k in keys
            if k in self.ends and (all_ends or k not in self.known or k[1].endswith(" L:0"))
        }
        size = world.dice.choice([1, 2, 3, 50])
        chunks = [rows[at : at + size] for at in range(0, len(rows), size)] or [[]]
        policies = {ACCOUNT: self.policy} if self.policy is not None and (whole or self.policy_due) else {}
        parts: list[Any] = [
            (chunk, {f"{s} {b}": told[f"{s} {b}"] for s, b, _ in chunk if f"{s} {b}" in told}, {}, [])
            for chunk in chunks
        ]
        parts[0] = (parts[0][0], parts[0][1], policies, [])
        place = 0 if "closes_in_the_first_part" in self.bugs else -1
        parts[place] = (*parts[place][:3], list(self.closes))
        self.dirty, self.closes, self.policy_due = set() if whole else self.dirty - set(keys), [], False
        if not whole:
            self.dirty = set()
        if "ends_are_sent_once" in self.bugs:
            self.known.update(keys)
        self.flights += 1
        expect = self.expect
        return Flight(self.pos, self.log_ms, f"{self.name}-{self.flights}", expect, parts, whole, keys, all_ends)

    def write(self, world: "World") -> None:
        """The next call that is due, over a network that loses requests and replies."""
        if self.pos < self.begun:
            return
        if self.phase == "begin":
            self._begin(world)
            return
        if self.phase == "gates" and world.now_us // 1000 >= self.end_at_ms and self.flight is None:
            self._end(world)
            return
        if self.flight is None:
            self.flight = self._build(world)
            if self.flight is None:
                return
        self._send(world, self.flight)

    def _send(self, world: "World", flight: Flight) -> None:
        totals, ends, policies, closes = flight.parts[flight.next]
        more = flight.next < len(flight.parts) - 1
        arguments = (EPOCH, flight.off, flight.tok, flight.next, more, flight.expect, flight.log_ms)
        reply = world.deliver("apply", *arguments, totals, ends, policies, closes)
        if reply is None:
            self._abandon(flight)
            return
        word, _, state, _, begun = reply
        if word == "OK" and more:
            flight.next += 1
            return
        self.flight = None
        if word != "OK":
            self._give_back(flight)
            if word == "OLD":
                self.begun = begun
                self.phase = "refresh" if self.phase == "fill" else self.phase
                if "dirty_dropped_on_old" in self.bugs:
                    self.dirty, self.closes = set(), []
            elif word in ("LOST", "EPOCH"):
                self.phase = "begin"
            return
        self.expect, self.told_log_ms = flight.off, flight.log_ms
        self.known.update(flight.keys)
        if self.phase == "fill":
            self.phase, self.end_at_ms = "gates", world.now_us // 1000 + 2_000
        elif self.phase != "gates":
            self.phase = "live" if state == "READY" else "begin"

    def _abandon(self, flight: Flight) -> None:
        self.flight = None
        self._give_back(flight)

    def _give_back(self, flight: Flight) -> None:
        if not flight.whole:
            self.dirty.update(flight.keys)
        if any(part[2] for part in flight.parts):
            self.policy_due = True
        self.closes = [hold for part in flight.parts for hold in part[3]] + self.closes

    def _begin(self, world: "World") -> None:
        reply = world.deliver("begin", EPOCH, self.pos, world.now_us)
        self.expect, self.flight = None, None
        if reply is None:
            return
        word, _, _, gen, begun, _ = reply
        if word == "OK":
            self.phase, self.gen = "fill", gen
            if "ready_early" in self.bugs:
                self.phase, self.end_at_ms = "gates", 0
        elif word == "OLD":
            self.phase, self.begun = "refresh", begun

    def _end(self, world: "World") -> None:
        if "ready_early" not in self.bugs and self.expect is None:
            return
        reply = world.deliver("end", EPOCH, self.gen, self.expect if self.expect is not None else -1)
        if reply is None:
            return
        if reply[0] == "OK":
            self.phase = "live"
        elif reply[0] == "EPOCH":
            self.phase = "live" if "given_up_rewrite_is_not_refreshed" in self.bugs else "refresh"
            self.expect = None
        else:
            self.phase = "begin"

    def sweep(self, world: "World", limit: int) -> bool:
        """Whether there is more."""
        if self.phase != "live":
            return False
        reply = world.deliver("sweep", limit, self.log_ms)
        if reply is None or reply[0] != "OK":
            return False
        for hold, src, seq in reply[2]:
            if "sweep_does_not_ask" in self.bugs:
                continue
            call, expired = world.calls[hold], world.born_ms[src] + SOURCE_LIFE_MS < self.log_ms
            if (src, seq) in self.seen or expired:
                self.closes.append(hold)
                call.lost_usage |= call.offset is None
        return bool(reply[4])


def truth(log: list[Entry], upto: int) -> dict[Field, int]:
    """Totals of the first `upto` records, by other code than the fold's."""
    totals: dict[Field, int] = {}
    seen: set[tuple[str, int]] = set()
    for entry in log[:upto]:
        if entry.kind == "usage" and (entry.src, entry.seq) not in seen:
            seen.add((entry.src, entry.seq))
            for where, _, units in counted(entry, 0, frozenset()):
                totals[where] = totals.get(where, 0) + units
    return totals


__all__ = ["ACCOUNT", "COUNTED", "EPOCH", "Entry", "Fold", "Lane", "counted", "truth"]
