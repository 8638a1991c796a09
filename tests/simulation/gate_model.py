"""One lane of Redis as dictionaries, and what every script of the gate contract does to it: the oracle for connectors/lua.

Amounts are ints. `bugs` plants faults: each name is one line written wrong, as in `gate_mutants`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

DAY_S, DAY_MS = 86_400, 86_400_000
IDLE_S = 35 * DAY_S
LENGTH_S = {"m": 60, "h": 3_600, "d": DAY_S}
OTHER = "other~"
NO_BUGS: frozenset[str] = frozenset()

Reply = tuple[Any, ...]
Triple = tuple[str, int, int]
"""meter, ask, least"""


@lru_cache(4_096)
def span(window: str, at: int, kind: str) -> tuple[int, int | None]:
    """Start and end in seconds; the life of a run or session ends 35 days after `at`."""
    if window in LENGTH_S:
        start = at - at % LENGTH_S[window]
        return start, start + LENGTH_S[window]
    if window == "L":
        return 0, at + IDLE_S if kind in ("run", "sess") else None
    day = datetime.fromtimestamp(at, UTC)
    first = datetime(day.year, day.month, 1, tzinfo=UTC)
    after = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC)
    return int(first.timestamp()), int(after.timestamp())


@dataclass(frozen=True)
class Policy:
    """p:<account>, read."""

    version: int
    limits: dict[str, int]
    """`<scope or kind>|<meter>|<window>` → limit"""
    frozen: bool = False
    full: bool = False
    outage: str = "closed"
    max_staleness_s: int = 30

    @property
    def shapes(self) -> list[tuple[str, str]]:
        """(meter, window) pairs, in the order of the field `limited`."""
        return sorted({(name.split("|")[1], name.split("|")[2]) for name in self.limits})


@dataclass
class Record:
    """h:<hold>. fields: [account~scope, base, units] each."""

    st: str
    exp: int
    account: str
    call: str
    fields: list[list[Any]]
    src: str = ""
    seq: int = 0
    first: dict[tuple[str, str], int] = field(default_factory=dict)
    """What was first held; for planted faults alone."""

    def copy(self) -> "Record":
        return Record(
            self.st, self.exp, self.account, self.call, [list(f) for f in self.fields], self.src, self.seq, self.first
        )

    def key(self) -> tuple[Any, ...]:
        return self.st, self.exp, self.account, self.call, tuple(map(tuple, self.fields)), self.src, self.seq


@dataclass
class Meta:
    """m."""

    epoch: str
    gen: int
    state: str
    off: int
    begun: int
    tok: str
    part: int
    log: int


class Lane:
    """The keys of one lane."""

    def __init__(self, bugs: frozenset[str] = NO_BUGS) -> None:
        self.bugs = bugs
        self.m: Meta | None = None
        self.g: dict[str, int] = {}
        self.p: dict[str, Policy] = {}
        self.s: dict[str, dict[str, list[int | None]]] = {}
        """account~scope → base → [used, held]"""
        self.h: dict[str, Record] = {}
        self.hx: dict[str, int] = {}
        self.fx: dict[str, int] = {}
        self.i: dict[str, Reply] = {}
        self.n: dict[str, int] = {}

    def copy(self) -> "Lane":
        lane = Lane(self.bugs)
        lane.m = None if self.m is None else Meta(**vars(self.m))
        lane.g, lane.p, lane.hx, lane.fx = dict(self.g), dict(self.p), dict(self.hx), dict(self.fx)
        lane.i, lane.n = dict(self.i), dict(self.n)
        lane.s = {scope: {base: list(pair) for base, pair in fields.items()} for scope, fields in self.s.items()}
        lane.h = {hold: record.copy() for hold, record in self.h.items()}
        return lane

    def content(self, counters: bool = True) -> dict[str, Any]:
        """What two equal lanes have equal."""
        found: dict[str, Any] = {
            "m": None if self.m is None else vars(self.m),
            "p": self.p,
            "s": self.s,
            "h": {hold: record.key() for hold, record in self.h.items()},
            "hx": self.hx,
            "fx": self.fx,
            "i": self.i,
            "n": self.n,
        }
        return found | {"g": self.g} if counters else found

    def used(self, scope: str, base: str) -> int | None:
        return self.s.get(scope, {}).get(base, [None, None])[0]

    def held(self, scope: str, base: str) -> int | None:
        return self.s.get(scope, {}).get(base, [None, None])[1]

    def _set(self, scope: str, base: str, place: int, value: int) -> None:
        self.s.setdefault(scope, {}).setdefault(base, [None, None])[place] = value

    def _head(self, word: str, gate: str) -> Reply:
        if self.m is None:
            return word, None, None, self.g.get(gate, 0)
        return word, self.m.gen, self.m.off, self.g.get(gate, 0)

    def _mark_loss(self, gate: str, gen: int | None, floor: int) -> None:
        if self.m is None or gen is None:
            return
        count = sum(self.g.values()) if "lane_wide_counter" in self.bugs else self.g.get(gate, 0)
        if "no_floor" in self.bugs:
            floor = 0
        if gen > self.m.gen or (gen == self.m.gen and count < floor):
            self.m.state = "COLD"
            self.m.gen = max(gen, self.m.gen) + (0 if "no_new_gen" in self.bugs else 1)

    def _count(self, gate: str) -> None:
        self.g[gate] = self.g.get(gate, 0) + 1

    def _move(self, record: Record, wanted: Any, *, create: bool = False) -> bool:
        """move(hold, new): ` h` changes only where it exists."""
        changed = False
        for row in record.fields:
            scope, base, old = row
            new = wanted(base, old)
            changed |= new != old
            held = self.held(scope, base)
            if held is not None:
                self._set(scope, base, 1, held - old + new)
            elif create or "release_creates" in self.bugs:
                self._set(scope, base, 1, new - old)
            row[2] = new
        return changed

    def _made_by_gate(self, scope: str, account: str) -> None:
        if scope not in self.s and scope not in self.n:
            self.n[scope] = 1
            self.n[account] = self.n.get(account, 0) + 1

    # The gate's scripts.

    def authorize(
        self,
        now_us: int,
        account: str,
        scopes: Iterable[str],
        call: str,
        fingerprint: str,
        hold: str,
        triples: Iterable[Triple],
        ttl_ms: int,
        grace_ms: int,
        gate: str,
        gen: int | None,
        floor: int,
        scopes_max: int = 100_000,
        unknown: bool = False,
    ) -> Reply:
        """(word, gen, off, count, outage, at us, staleness ms, *body) as the script gives it, amounts as ints."""
        now_ms, at, bugs = now_us // 1000, now_us // 1_000_000, self.bugs
        policy = self.p.get(account)

        def answer(word: str, *body: Any) -> Reply:
            stale = None if self.m is None else now_ms - self.m.log
            return (*self._head(word, gate), policy.outage if policy else "", now_us, stale, *body)

        earlier = None if "retry_second_hold" in bugs else self.i.get(f"{account}~{call}")
        if earlier is not None:
            return answer("DUP" if earlier[0] == fingerprint else "CONFLICT", *earlier)
        self._mark_loss(gate, gen, floor)
        if (barred := self._barred(gen, hold, policy, unknown, now_ms)) is not None:
            return answer(barred)
        asked = {meter: (ask, least) for meter, ask, least in triples}
        rows, closed = self._rows(account, scopes, asked, policy, at, scopes_max)
        if closed is not None:
            return answer("CLOSED", (closed, "", None, 0, 0, 0), ())
        if self._stale(rows, asked, policy, now_ms):
            return answer("STALE")
        short = [row for row in rows if row["left"] < (asked[row["meter"]][1] if row["meter"] in asked else 1)]
        if "first_scope_only" in bugs:
            short = [row for row in short if row["scope"] == rows[0]["scope"]]
        if short:
            if "refusal_takes" in bugs:
                self._take(rows, {meter: 0 if row["left"] < 1 else 1 for meter in asked for row in rows}, account, at)
            least = min(short, key=lambda row: row["left"])
            return answer("DENY", _told(least, 0), tuple(_told(row, 0) for row in rows))
        checked = [row for row in rows if row["scope"] == rows[0]["scope"]] if "first_scope_only" in bugs else rows
        grants = {
            meter: min([ask, *(row["left"] for row in checked if row["meter"] == meter)])
            for meter, (ask, _) in asked.items()
        }
        record, expires = self._take(rows, grants, account, at), now_ms + ttl_ms
        first = {(row[0], row[1]): row[2] for row in record}
        self.h[hold] = Record("H", expires, account, call, record, first=first)
        self.hx[hold] = expires + grace_ms
        told = tuple(_told(row, grants.get(row["meter"], 0)) for row in rows)
        body = (fingerprint, hold, now_us, expires, tuple(sorted(grants.items())), told)
        self.i[f"{account}~{call}"] = body
        self._count(gate)
        return answer("OK", *body)

    def _barred(self, gen: int | None, hold: str, policy: Policy | None, unknown: bool, now_ms: int) -> str | None:
        """Why nothing is granted, whatever is left."""
        if self.m is None or (self.m.state != "READY" and "cold_ignored" not in self.bugs):
            return "COLD"
        if gen is not None and gen != self.m.gen and "old_gen_takes" not in self.bugs:
            return "GEN"
        if hold in self.h:
            return "CONFLICT"
        if policy is None and not unknown:
            return "UNKNOWN"
        if policy is not None and policy.frozen:
            return "FROZEN"
        return "CLOCK" if now_ms < self.m.log - 60_000 else None

    def _stale(
        self, rows: list[dict[str, Any]], asked: dict[str, tuple[int, int]], policy: Policy | None, now_ms: int
    ) -> bool:
        """Whether a limit that no hold enforces rests on totals that are too old."""
        assert self.m is not None
        oldest_ms = (policy.max_staleness_s if policy else 30) * 1000
        return any(row["meter"] not in asked for row in rows) and now_ms - self.m.log > oldest_ms

    def _rows(
        self,
        account: str,
        scopes: Iterable[str],
        asked: dict[str, tuple[int, int]],
        policy: Policy | None,
        at: int,
        scopes_max: int,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """The limited fields of an ask, and a scope that is closed."""
        if policy is None:
            return [], None
        full = policy.full or self.n.get(account, 0) >= scopes_max
        rows: list[dict[str, Any]] = []
        seen: dict[tuple[str, str], int] = {}
        for scope in scopes:
            kind, name = scope.partition(":")[0], f"{account}~{scope}"
            if kind in ("run", "sess") and self.used(name, "~closed L:0") is not None:
                return [], name
            where = f"{account}~{OTHER}" if full and name not in self.s else name
            for meter, window in policy.shapes:
                limit = policy.limits.get(f"{scope}|{meter}|{window}", policy.limits.get(f"{kind}|{meter}|{window}"))
                if limit is None:
                    continue
                start, stop = span(window, at, kind)
                base = f"{meter} {window}:{start}"
                held = 0 if "authorize_ignores_h" in self.bugs else self.held(where, base) or 0
                used = 0 if "authorize_ignores_u" in self.bugs else self.used(where, base) or 0
                left = limit - used - held
                if meter in asked:
                    times = seen.get((where, base), 0)
                    seen[where, base] = times + 1
                    left -= times * asked[meter][0]
                rows.append({"scope": where, "base": base, "stop": stop, "limit": limit, "left": left, "meter": meter})
        return rows, None

    def _take(self, rows: list[dict[str, Any]], grants: dict[str, int], account: str, at: int) -> list[list[Any]]:
        record: list[list[Any]] = []
        for row in rows:
            if row["meter"] not in grants:
                continue
            scope, base, stop, units = row["scope"], row["base"], row["stop"], grants[row["meter"]]
            if not scope.endswith(f"~{OTHER}"):
                self._made_by_gate(scope, account)
            held = self.held(scope, base)
            self._set(scope, base, 1, (held or 0) + units)
            if stop is not None and (held is None or stop - at > 31 * DAY_S) and "authorize_skips_fx" not in self.bugs:
                self.fx[f"{scope} {base}"] = max(stop, self.fx.get(f"{scope} {base}", stop))
            record.append([scope, base, units])
        return record

    def capture(
        self, now_us: int, hold: str, used: dict[str, int], src: str, seq: int, gate: str, gen: int | None, floor: int
    ) -> Reply:
        self._mark_loss(gate, gen, floor)
        record, bugs = self.h.get(hold), self.bugs
        if record is None:
            return self._head("GONE", gate)
        if record.st == "C" and "second_capture" not in bugs:
            return self._head("DUP" if (record.src, record.seq) == (src, seq) else "CONFLICT", gate)
        late = record.st == "X"
        if late and "late_nothing" in bugs:
            return self._head("LATE", gate)
        if late and "late_subtracts_held_again" in bugs:
            for row in record.fields:
                row[2] = record.first.get((row[0], row[1]), 0)
        if late and "late_reopens_empty" in bugs:
            self._move(record, lambda base, old: 0)
        elif (late and "late_forgets_h" in bugs) or "capture_forgets_actual" in bugs:
            self._move(record, lambda base, old: 0)
            for row in record.fields:
                row[2] = used.get(row[1].partition(" ")[0], 0)
        elif "capture_forgets_held" in bugs and not late:
            for row in record.fields:
                row[2] = 0
            self._move(record, lambda base, old: used.get(base.partition(" ")[0], 0))
        else:
            self._move(record, lambda base, old: used.get(base.partition(" ")[0], 0))
        record.st, record.src, record.seq = "C", src, seq
        self.hx[hold] = now_us // 1000 + 60_000
        self._count(gate)
        return self._head("LATE" if late else "OK", gate)

    def void(self, hold: str) -> Reply:
        record = self.h.get(hold)
        if record is not None and record.st == "C" and "void_captured" not in self.bugs:
            return self._head("DONE", "")[:3]
        if record is None or record.st == "X":
            return self._head("GONE", "")[:3]
        self._move(record, lambda base, old: 0)
        del self.h[hold]
        self.hx.pop(hold, None)
        if "call_id_outlives_void" not in self.bugs:
            self.i.pop(f"{record.account}~{record.call}", None)
        return self._head("OK", "")[:3]

    def extend(
        self,
        now_us: int,
        hold: str,
        totals: dict[str, int],
        ttl_ms: int,
        grace_ms: int,
        account: str,
        gate: str,
        gen: int | None,
        floor: int,
    ) -> Reply:
        """(word, gen, off, count, expires, fields)."""
        self._mark_loss(gate, gen, floor)
        now_ms = now_us // 1000

        def answer(word: str, *body: Any) -> Reply:
            return (*self._head(word, gate), *(body or (None, ())))

        if self.m is None or self.m.state != "READY":
            return answer("COLD")
        if gen is not None and gen != self.m.gen:
            return answer("GEN")
        policy = self.p.get(account)
        if policy is not None and policy.frozen:
            return answer("FROZEN")
        if now_ms < self.m.log - 60_000:
            return answer("CLOCK")
        record = self.h.get(hold)
        if record is not None and record.st == "C":
            return answer("DONE")
        if record is None or record.st != "H":
            return answer("GONE")

        def larger(base: str, old: int) -> int:
            new = totals.get(base.partition(" ")[0], old)
            return old + new if "extend_adds" in self.bugs else max(new, old)

        refused = self._short(policy, record, larger)
        if refused is not None:
            return answer("DENY", None, refused)
        if "extend_forgets_h" in self.bugs:
            for row in record.fields:
                row[2] = larger(row[1], row[2])
        else:
            self._move(record, larger)
        record.exp = max(record.exp, now_ms + ttl_ms)
        self.hx[hold] = record.exp + grace_ms
        self._count(gate)
        return answer("OK", record.exp, tuple(item for row in record.fields for item in row))

    def _short(self, policy: Policy | None, record: Record, larger: Any) -> Reply | None:
        """The field that cannot hold more."""
        seen: dict[tuple[str, str], int] = {}
        for scope, base, old in record.fields:
            new, held = larger(base, old), self.held(scope, base)
            if new == old:
                continue
            if held is None:
                return scope, base, 0
            limit = self._limit(policy, scope.partition("~")[2], base)
            if limit is not None:
                left = limit - (self.used(scope, base) or 0) - held + old
                times = seen.get((scope, base), 0)
                if left - new - times * (new - old) < 0:
                    return scope, base, left
                seen[scope, base] = times + 1
        return None

    @staticmethod
    def _limit(policy: Policy | None, scope: str, base: str) -> int | None:
        if policy is None:
            return None
        meter, _, window = base.partition(" ")
        shape = f"|{meter}|{window.partition(':')[0]}"
        if scope == OTHER:
            kinds = ("user", "client", "anon", "agent", "sess", "run")
            return min((policy.limits[kind + shape] for kind in kinds if kind + shape in policy.limits), default=None)
        return policy.limits.get(scope + shape, policy.limits.get(scope.partition(":")[0] + shape))

    def reassert(
        self,
        now_us: int,
        hold: str,
        account: str,
        call: str,
        st: str,
        exp: int,
        grace_ms: int,
        src: str,
        seq: int,
        gate: str,
        fields: list[tuple[str, str, int]],
    ) -> Reply:
        if self.m is None:
            return self._head("COLD", gate)
        record, now_ms = self.h.get(hold), now_us // 1000
        if record is not None and record.st == "C":
            return self._head("DUP", gate)
        if record is not None and record.st == "H" and "reassert_adds_again" not in self.bugs:
            self._reassert_open(record, hold, now_ms, st, exp, grace_ms, src, seq, gate, fields)
            return self._head("OK", gate)
        if record is not None and record.st == "H":
            self._move(record, lambda base, old: 2 * old)
            return self._head("OK", gate)
        kept: list[list[Any]] = []
        at = now_us // 1_000_000
        for scope, base, units in fields:
            held = self.held(scope, base)
            stop = self._stop(scope, base, at)
            gone = stop is not None and stop * 1000 + DAY_MS <= self.m.log
            if held is None and gone and "reassert_on_ended" not in self.bugs:
                continue
            kept.append([scope, base, units])
            if held is None and "reassert_only_existing" in self.bugs:
                continue
            if not scope.endswith(f"~{OTHER}"):
                self._made_by_gate(scope, account)
            self._set(scope, base, 1, (self.held(scope, base) or 0) + units)
            if stop is not None and "reassert_on_ended" not in self.bugs:
                self.fx[f"{scope} {base}"] = max(stop, self.fx.get(f"{scope} {base}", stop))
        first = {(row[0], row[1]): row[2] for row in kept}
        self.h[hold] = Record(st, exp, account, call, kept, src if st == "C" else "", seq if st == "C" else 0, first)
        self.hx[hold] = now_ms + 60_000 if st == "C" else exp + grace_ms
        self._count(gate)
        return self._head("MADE", gate)

    def _reassert_open(
        self,
        record: Record,
        hold: str,
        now_ms: int,
        st: str,
        exp: int,
        grace_ms: int,
        src: str,
        seq: int,
        gate: str,
        fields: list[tuple[str, str, int]],
    ) -> None:
        units_of = {base: units for _, base, units in fields}
        if st == "C":
            self._move(record, lambda base, old: units_of.get(base, old))
            record.st, record.src, record.seq = "C", src, seq
            self.hx[hold] = now_ms + 60_000
            self._count(gate)
            return
        changed = self._move(record, lambda base, old: max(old, units_of.get(base, old)))
        if changed or exp > record.exp:
            record.exp = max(exp, record.exp)
            self.hx[hold] = record.exp + grace_ms
            if "reassert_uncounted" not in self.bugs:
                self._count(gate)

    @staticmethod
    def _stop(scope: str, base: str, at: int) -> int | None:
        window, _, start = base.partition(" ")[2].partition(":")
        kind = scope.partition("~")[2].partition(":")[0]
        return span(window, at if window == "L" else int(start), kind)[1]

    # The fold's scripts.

    def _fold_head(self, word: str) -> Reply:
        if self.m is None:
            return word, None, "", None, None
        return word, self.m.off, self.m.state, self.m.gen, self.m.begun

    def apply(
        self,
        epoch: str,
        off: int,
        tok: str,
        part: int,
        more: bool,
        expect: int | None,
        log: int,
        totals: list[tuple[str, str, int]],
        ends: dict[str, int],
        policies: dict[str, Policy],
        closes: list[str],
    ) -> Reply:
        """totals (account~scope, base, used); ends `<account~scope> <base>` → second."""
        m, bugs = self.m, self.bugs
        if m is None:
            return self._fold_head("LOST")
        if m.epoch != epoch:
            return self._fold_head("EPOCH")
        guard = m.off if "guard_complete_only" in bugs else m.begun
        if off < guard and "no_guard" not in bugs:
            return self._fold_head("OLD")
        if expect is not None and m.off < expect and "expect_ignored" not in bugs:
            m.state = "COLD"
            return self._fold_head("LOST")
        if part > 0 and (m.tok != tok or m.begun != off or part > m.part + 1) and "no_part_chain" not in bugs:
            return self._fold_head("BROKEN")
        answer = self._fold_head("OK")
        m.begun, m.tok, m.part = off, tok, part
        self.p.update(policies)
        for scope, base, value in totals:
            end = ends.get(f"{scope} {base}")
            if end is not None and (end + DAY_S) * 1000 <= m.log:
                continue
            self._set(scope, base, 0, value + ((self.used(scope, base) or 0) if "additive" in bugs else 0))
            if "apply_drops_h" in bugs and self.held(scope, base) is not None:
                self._set(scope, base, 1, 0)
            if end is not None and "apply_skips_fx" not in bugs:
                self.fx[f"{scope} {base}"] = end
        for hold in closes:
            record = self.h.pop(hold, None)
            if record is not None:
                self._close(record)
            self.hx.pop(hold, None)
        if not more:
            m.off = off
        if not more or "log_by_first_part" in bugs:
            m.log = max(m.log, log)
        return answer

    def _close(self, record: Record) -> None:
        if "close_first_held" in self.bugs and record.st != "X":
            for row in record.fields:
                held = self.held(row[0], row[1])
                if held is not None:
                    self._set(row[0], row[1], 1, held - record.first.get((row[0], row[1]), 0))
        elif "close_nothing" not in self.bugs:
            self._move(record, lambda base, old: 0)

    def begin(self, epoch: str, off: int, now_us: int) -> Reply:
        """Also the number of gates."""
        m = self.m
        if m is not None and m.epoch != epoch:
            if int(epoch.split("-")[0]) <= int(m.epoch.split("-")[0]):
                return (*self._fold_head("EPOCH"), 0)
        elif m is not None and off < m.begun:
            return (*self._fold_head("OLD"), 0)
        gen = max(now_us, m.gen + 1) if m is not None else now_us
        if "zero_held_at_begin" in self.bugs:
            for fields in self.s.values():
                for pair in fields.values():
                    pair[1] = None if pair[1] is None else 0
        kept = -1 if "begin_keeps_off" not in self.bugs or m is None else m.off
        self.m = Meta(epoch, gen, "COLD", kept, off, "", -1, m.log if m is not None else 0)
        return (*self._fold_head("OK"), len(self.g))

    def end(self, epoch: str, gen: int, off: int) -> Reply:
        m = self.m
        if m is None:
            return self._fold_head("LOST")
        if (m.epoch != epoch or m.gen != gen) and "end_unguarded" not in self.bugs:
            return self._fold_head("EPOCH")
        if m.off < off and "end_unguarded" not in self.bugs and "ready_early" not in self.bugs:
            return self._fold_head("LOST")
        m.state = "READY"
        return self._fold_head("OK")

    def sweep(self, limit: int, fold_log: int | None = None) -> Reply:
        """`fold_log`: for a planted fault alone."""
        if self.m is None or self.m.state != "READY":
            return "COLD", [], [], 0, 0
        t = fold_log if fold_log is not None and "sweep_by_fold_clock" in self.bugs else self.m.log
        unsettled: list[str] = []
        asked: list[tuple[str, str, int]] = []
        due = _first(self.hx, t, limit)
        for hold in due:
            record = self.h.get(hold)
            if record is not None and (
                record.st == "H" or (record.st == "C" and "sweep_expires_captured" in self.bugs)
            ):
                self._expire(hold, record, t)
                unsettled.append(hold)
            elif record is not None and record.st == "C":
                asked.append((hold, record.src, record.seq))
                self.hx[hold] = t + 60_000
            else:
                self.h.pop(hold, None)
                del self.hx[hold]
        removed, ended = 0, _first(self.fx, (t - DAY_MS) // 1000, limit)
        for member in ended:
            removed += self._remove(member, t)
        return "OK", unsettled, asked, removed, int(len(due) == limit or len(ended) == limit)

    def _expire(self, hold: str, record: Record, t: int) -> None:
        if "expiry_does_not_subtract" in self.bugs:
            for row in record.fields:
                row[2] = 0
        else:
            kept = [list(row) for row in record.fields]
            self._move(record, lambda base, old: 0)
            if "expiry_keeps_amounts" in self.bugs:
                record.fields = kept
        record.st = "X"
        if "call_id_outlives_expiry" not in self.bugs:
            self.i.pop(f"{record.account}~{record.call}", None)
        self.hx[hold] = t + DAY_MS

    def _remove(self, member: str, t: int) -> int:
        scope, _, base = member.partition(" ")
        if base.endswith(" L:0") and self.held(scope, base):
            self.fx[member] = t // 1000
            return 0
        pair = self.s.get(scope, {}).get(base)
        if pair is not None:
            pair[0] = None
            if "sweep_used_only" not in self.bugs:
                pair[1] = None
            if pair == [None, None]:
                del self.s[scope][base]
            if not self.s[scope]:
                del self.s[scope]
        del self.fx[member]
        if scope not in self.s and self.n.pop(scope, None) is not None:
            account = scope.partition("~")[0]
            self.n[account] -= 1
            if not self.n[account]:
                del self.n[account]
        return 1


def _told(row: dict[str, Any], units: int) -> Reply:
    return row["scope"], row["base"], row["stop"], row["limit"], row["left"] - units, units


def _first(scores: dict[str, int], most: int, limit: int) -> list[str]:
    """As ZRANGEBYSCORE gives them."""
    return [name for score, name in sorted((score, name) for name, score in scores.items() if score <= most)][:limit]
