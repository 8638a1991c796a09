"""The gate contract's scripts on a real Valkey against the model that the simulation runs on: answers and the whole key space."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import redis

from tests.gate_lua import Real, authorized, head, policy_fields, read
from tests.simulation.gate_model import Lane, Policy
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.gate_calls import (
    Me,
    authorize_call,
    capture_call,
    extend_call,
    reassert_call,
    void_call,
)
from tollway.connectors.gate_decision import Ask, Hold
from tollway.connectors.gate_wire import AUTHORIZE, CAPTURE, EXTEND, REASSERT, VOID
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP, Swept
from tollway.schemas.lane import lane

ACCOUNT, EPOCH, GRACE_MS = "acme", "0-log", 900_000
NUMBER = lane(ACCOUNT)
NOON_US = 1_769_860_800_000_000  # 2026-01-31 12:00:00 UTC: a month ends tomorrow
BIG = 9_007_199_254_740_993  # 2⁵³ + 1: no double holds it
SCOPES = ("acct", "user:u1", "user:u2", "run:r1", "sess:s1")
METERS = ("calls", "usd")
UNITS = (0, 1, 2, 7, 10**9, BIG, 3 * 10**18)
LIMITS = (0, 3, 50, 10**9 + 1, BIG + 9, 9 * 10**18)


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator["redis.Redis[bytes]"]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as found:
        found.flushdb()
        yield found


class Pair:
    """The same call to both; they must give the same answer."""

    def __init__(self, client: Any, seed: int) -> None:
        self.dice = random.Random(seed)
        self.client, self.real, self.model = client, Real(client, NUMBER), Lane()
        self.now_us = NOON_US
        self.known: dict[str, Hold] = {}
        """hold id → as last granted"""
        self.asked: list[Ask] = []
        self.reached: Counter[str] = Counter()

    def same(self, real: Any, wanted: Any, what: str) -> None:
        assert real == wanted, what
        self.reached[f"{what.partition(' ')[0]} {real[0]}"] += 1
        assert read(self.client, NUMBER) == self.model.content(), what

    def me(self) -> Me:
        gate, gen = self.dice.choice(["g1", "g2"]), ""
        floor = self.model.g.get(gate, 0)
        if self.model.m is not None and self.dice.random() < 0.8:
            gen = str(self.model.m.gen + self.dice.choice([0] * 12 + [-1, 1]))
        return Me(gate, gen, max(0, floor + self.dice.choice([0] * 12 + [-1, 1])), GRACE_MS)

    def authorize(self) -> None:
        dice, me = self.dice, self.me()
        amounts: dict[str, int | tuple[int, int]] = {}
        for meter in dice.sample(METERS, dice.choice([1, 1, 2])):
            ask = dice.choice(UNITS)
            amounts[meter] = (ask, min(ask, dice.choice([0, 1, ask])))
        scopes = tuple(dice.sample(SCOPES, dice.choice([1, 2, 3])))
        ask = Ask(ACCOUNT, scopes, amounts, call=f"c{dice.randrange(12)}", fingerprint=dice.choice(["", "", "", "x"]))
        if self.asked and dice.random() < 0.2:
            ask = dice.choice(self.asked)
        self.asked.append(ask)
        hold, scopes_max, unknown = f"h{dice.randrange(12)}", dice.choice([100_000, 100_000, 2]), dice.random() < 0.2
        call = authorize_call(me, ask, ask.call, hold, "default" if unknown else "", scopes_max)
        real = authorized(self.real.run(AUTHORIZE, *call))
        wanted = self.model.authorize(
            self.now_us, ACCOUNT, ask.scopes, ask.call, ask.digest, hold, ask.triples, 60_000, GRACE_MS, me.gate,
            int(me.gen) if me.gen else None, me.floor, scopes_max, unknown,
        )  # fmt: skip
        self.same(real, wanted, f"authorize {ask} {hold} {me}")
        if wanted[0] == "OK":
            self._know(hold, ask.call)

    def _know(self, hold: str, call: str) -> None:
        record = self.model.h[hold]
        fields = tuple((scope, base, units) for scope, base, units in record.fields)
        self.known[hold] = Hold(hold, ACCOUNT, call, self.now_us, record.exp, fields)

    def some_hold(self) -> Hold | None:
        return self.known[self.dice.choice(sorted(self.known))] if self.known else None

    def capture(self) -> None:
        hold, me, dice = self.some_hold(), self.me(), self.dice
        if hold is None:
            return
        used = {meter: dice.choice(UNITS) for meter in dice.sample(METERS, 2)}
        src, seq = "5" * 32, dice.choice([1, 1, 2])
        real = head(self.real.run(CAPTURE, *capture_call(me, hold, used, src, seq)))
        wanted = self.model.capture(
            self.now_us, hold.id, used, src, seq, me.gate, int(me.gen) if me.gen else None, me.floor
        )
        self.same(real, wanted, f"capture {hold} {used}")

    def void(self) -> None:
        if (hold := self.some_hold()) is not None:
            self.same(head(self.real.run(VOID, *void_call(hold))), self.model.void(hold.id), f"void {hold}")

    def extend(self) -> None:
        hold, me, dice = self.some_hold(), self.me(), self.dice
        if hold is None:
            return
        totals = {meter: dice.choice(UNITS) for meter in dice.sample(METERS, dice.choice([1, 2]))}
        reply = self.real.run(EXTEND, *extend_call(me, hold, totals, 90))
        fields = tuple(int(item) if place % 3 == 2 else item for place, item in enumerate(reply[5]))
        real = (*head(reply), int(reply[4]) if reply[4] else None, fields)
        wanted = self.model.extend(
            self.now_us, hold.id, totals, 90_000, GRACE_MS, ACCOUNT, me.gate, int(me.gen) if me.gen else None, me.floor
        )
        self.same(real, wanted, f"extend {hold} {totals}")
        if wanted[0] == "OK":
            self._know(hold.id, hold.call)

    def reassert(self) -> None:
        hold, me, dice = self.some_hold(), self.me(), self.dice
        if hold is None:
            return
        captured, src = dice.random() < 0.4, "5" * 32
        used = {"calls": 1, "usd": dice.choice(UNITS)} if captured else None
        more = dice.choice([0, 0, 5])
        fields = tuple((scope, base, units + more) for scope, base, units in hold.fields)
        told = Hold(hold.id, ACCOUNT, hold.call, hold.at_us, hold.expires_at_ms + dice.choice([0, 1]), fields)
        real = head(self.real.run(REASSERT, *reassert_call(me, told, used, src, 1)))
        rows = [(scope, base, units if used is None else used[base.partition(" ")[0]]) for scope, base, units in fields]
        state = "H" if used is None else "C"
        wanted = self.model.reassert(
            self.now_us, hold.id, ACCOUNT, hold.call, state, told.expires_at_ms, GRACE_MS, src, 1, me.gate, rows
        )
        self.same(real, wanted, f"reassert {told} {used}")

    def apply(self) -> None:
        dice, m = self.dice, self.model.m
        begun = m.begun if m is not None else 0
        off = begun + dice.choice([0, 1, 1, 2, -1])
        tok, part = (m.tok, m.part + 1) if m is not None and dice.random() < 0.2 else ("t", 0)
        expect = None if m is None or dice.random() < 0.5 else m.off + dice.choice([0] * 8 + [1])
        log = self.now_us // 1000 - dice.choice([0, 0, 40_000, 3_600_000])
        totals, ends = self._totals()
        policies = {ACCOUNT: self._policy(off)} if dice.random() < 0.3 or ACCOUNT not in self.model.p else {}
        closes = dice.sample(sorted(self.known), 1) if self.known and dice.random() < 0.4 else []
        more = dice.random() < 0.2
        runs = [[scope, f"{base} u", str(used)] for scope, base, used in totals]
        told = [policy_fields(name, policy) for name, policy in policies.items()]
        flat = [item for member, end in ends.items() for item in (end, member)]
        words = (EPOCH, off, tok, part, "1" if more else "", "" if expect is None else expect, log)
        reply = self.real.fold(APPLY, *words, msgpack.packb([runs, flat, told, closes]))
        wanted = self.model.apply(EPOCH, off, tok, part, more, expect, log, totals, ends, policies, closes)
        self.same(_fold(reply), wanted, f"apply {words}")

    def _totals(self) -> tuple[list[tuple[str, str, int]], dict[str, int]]:
        """Some of the fields that gates have made, and a closed run."""
        dice = self.dice
        fields = sorted({(scope, base) for hold in self.known.values() for scope, base, _ in hold.fields})
        some = dice.sample(fields, min(len(fields), 2))
        totals = [(scope, base, dice.choice([0, 1, 5, BIG])) for scope, base in some]
        ends = {f"{s} {b}": int(b.rpartition(":")[2]) + 86_400 for s, b, _ in totals if " d:" in b or " h:" in b}
        if dice.random() < 0.03:
            totals.append((f"{ACCOUNT}~run:r1", "~closed L:0", 1))
            ends[f"{ACCOUNT}~run:r1 ~closed L:0"] = self.now_us // 1_000_000 + 7_200
        return totals, ends

    def _policy(self, version: int) -> Policy:
        dice, limits = self.dice, {}
        for scope in ("acct", "user", "user:u2", "run", "sess"):
            for meter in METERS:
                for window in dice.sample("mhdML", 2):
                    limits[f"{scope}|{meter}|{window}"] = dice.choice(LIMITS)
        flags = [dice.random() < chance for chance in (0.05, 0.1)]
        return Policy(max(0, version), limits, flags[0], flags[1], "open", dice.choice([1, 30, 10_000, 10**6]))

    def fold(self) -> None:
        """A rewrite, or a part of one."""
        m, dice = self.model.m, self.dice
        if m is not None and m.state == "COLD" and dice.random() < 0.8:
            gen, off = m.gen + dice.choice([0] * 9 + [1]), m.off + dice.choice([0] * 9 + [1])
            reply = _fold(self.real.fold(REWRITE_END, EPOCH, gen, off))
            self.same(reply, self.model.end(EPOCH, gen, off), "end")
            return
        off = (m.begun if m is not None else 0) + dice.choice([0, 1, -1])
        reply = self.real.fold(REWRITE_BEGIN, EPOCH, off)
        self.same((*_fold(reply), reply[5]), self.model.begin(EPOCH, off, self.now_us), "begin")

    def sweep(self) -> None:
        limit = self.dice.choice([1, 10])
        word, unsettled, asked, fields, more = self.real.fold(SWEEP, limit)
        swept = Swept.read([word, [t.encode() for t in unsettled], [t.encode() for t in asked], fields, more])
        found = (word, swept.unsettled, swept.asked, fields, more)
        self.same(found, self.model.sweep(limit), "sweep")

    def step(self) -> None:
        dice = self.dice
        self.now_us += dice.choice([0, 1_000, 7_001_001, 900_000_000, 3_600_000_000, 43_200_000_000])
        self.real.now_us = self.now_us
        if self.model.m is None or (self.model.m.state == "COLD" and dice.random() < 0.5):
            self.fold()
            return
        kinds = [(self.authorize, 8), (self.capture, 3), (self.void, 1), (self.extend, 2), (self.reassert, 2)]
        kinds += [(self.apply, 4), (self.sweep, 2)]
        dice.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]()
        if dice.random() < 0.02:
            self.fold()


def _fold(reply: list[Any]) -> tuple[Any, ...]:
    word, off, state, gen, begun = reply[:5]
    return word, *(int(off) if off else None,), state, int(gen) if gen else None, int(begun) if begun else None


HISTORIES, STEPS = 60, 60
REACHED = {
    "authorize": "OK DUP CONFLICT COLD GEN UNKNOWN FROZEN STALE DENY CLOSED",
    "capture": "OK LATE DUP CONFLICT GONE",
    "void": "OK GONE DONE",
    "extend": "OK DENY DONE GONE COLD GEN FROZEN",
    "reassert": "OK MADE DUP",
    "apply": "OK OLD LOST BROKEN",
    "sweep": "OK",
}


def test_the_scripts_do_what_the_model_does(client: Any) -> None:
    """3,600 calls of every script in any order, over days, amounts to 9·10¹⁸: equal answers and equal keys after each,
    and every answer of the contract is among them."""
    reached: Counter[str] = Counter()
    for seed in range(HISTORIES):
        client.flushdb()
        pair = Pair(client, seed)
        for _ in range(STEPS):
            pair.step()
        reached += pair.reached
    missed = {f"{kind} {word}" for kind, words in REACHED.items() for word in words.split()} - reached.keys()
    assert not missed, reached
