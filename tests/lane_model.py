"""A lane of Redis as dictionaries, and what the fold's scripts do to it: the oracle for connectors/lua."""

import copy
from dataclasses import dataclass, field
from typing import Any

import msgpack
import redis

DAY_MS = 86_400_000
TAG = "tw:{042}:"


def packed(body: list[Any]) -> bytes:
    """The wire form of [totals, fresh, policies, closes], where fresh are [end, scope, field, value, ...] each."""
    totals, fresh, policies, closes = body
    ends = [item for end, scope, *pairs in fresh for name in pairs[::2] for item in (end, f"{scope} {name[:-2]}")]
    return msgpack.packb([totals + [run[1:] for run in fresh], ends, policies, closes])  # type: ignore[no-any-return]


@dataclass
class Lane:
    """The keys of one lane. Hash values are texts; hold records are lists."""

    m: dict[str, str] = field(default_factory=dict)
    s: dict[str, dict[str, str]] = field(default_factory=dict)
    p: dict[str, dict[str, str]] = field(default_factory=dict)
    h: dict[str, dict[str, Any]] = field(default_factory=dict)
    i: set[str] = field(default_factory=set)
    g: dict[str, str] = field(default_factory=dict)
    hx: dict[str, int] = field(default_factory=dict)
    fx: dict[str, int] = field(default_factory=dict)
    n: dict[str, str] = field(default_factory=dict)

    def answer(self, word: str) -> tuple[str, ...]:
        return (word, *(self.m.get(name, "") for name in ("off", "state", "gen", "begun")))

    def apply(
        self, epoch: str, off: int, tok: str, part: int, more: bool, expect: int | None, log: int, body: list[Any]
    ) -> tuple[str, ...]:
        if not self.m:
            return self.answer("LOST")
        if self.m["epoch"] != epoch:
            return self.answer("EPOCH")
        if off < int(self.m["begun"]):
            return self.answer("OLD")
        if expect is not None and int(self.m["off"]) < expect:
            self.m["state"] = "COLD"
            return self.answer("LOST")
        chained = self.m["tok"] == tok and int(self.m["begun"]) == off and part <= int(self.m["part"]) + 1
        if part > 0 and not chained:
            return self.answer("BROKEN")
        answer = self.answer("OK")
        self.m |= {"begun": str(off), "tok": tok, "part": str(part)}
        self._write(*copy.deepcopy(body))
        if not more:
            self.m |= {"off": str(off), "log": str(max(log, int(self.m["log"])))}
        return answer

    def _write(self, totals: list[Any], fresh: list[Any], policies: list[Any], closes: list[str]) -> None:
        for account, *fields in policies:
            self.p[account] = dict(zip(fields[::2], fields[1::2], strict=True))
        for scope, *fields in totals:
            self.s.setdefault(scope, {}).update(zip(fields[::2], fields[1::2], strict=True))
        for end, scope, *fields in fresh:
            if end * 1000 + DAY_MS <= int(self.m["log"]):
                continue
            self.s.setdefault(scope, {}).update(zip(fields[::2], fields[1::2], strict=True))
            self.fx |= {f"{scope} {name[:-2]}": end for name in fields[::2]}
        for hold in closes:
            if hold in self.h:
                self._move_to_nothing(hold)
                del self.h[hold]
            self.hx.pop(hold, None)

    def _move_to_nothing(self, hold: str) -> None:
        record = self.h[hold]["r"]
        for at in range(2, len(record), 3):
            scope, name, amount = record[at : at + 3]
            if f"{name} h" in self.s.get(scope, {}):
                self.s[scope][f"{name} h"] = str(int(self.s[scope][f"{name} h"]) - int(amount))
            record[at + 2] = "0"

    def begin(self, epoch: str, off: int, gen: str) -> tuple[str, ...]:
        """`gen` is taken from the real answer: it comes from the server's clock."""
        if self.m and self.m["epoch"] != epoch:
            if int(epoch.split("-")[0]) <= int(self.m["epoch"].split("-")[0]):
                return self.answer("EPOCH")
        elif self.m and off < int(self.m["begun"]):
            return self.answer("OLD")
        assert int(gen) > int(self.m.get("gen", 0))
        self.m = {"log": "0"} | self.m
        self.m |= {"epoch": epoch, "gen": gen, "state": "COLD", "off": "-1", "begun": str(off), "tok": "", "part": "-1"}
        return self.answer("OK")

    def end(self, epoch: str, gen: str, off: int) -> tuple[str, ...]:
        if not self.m:
            return self.answer("LOST")
        if self.m["epoch"] != epoch or self.m["gen"] != gen:
            return self.answer("EPOCH")
        if int(self.m["off"]) < off:
            return self.answer("LOST")
        self.m["state"] = "READY"
        return self.answer("OK")

    def sweep(self, limit: int) -> tuple[Any, ...]:
        if self.m.get("state") != "READY":
            return ("COLD", [], [], 0, 0)
        t = int(self.m["log"])
        unsettled, asked, fields = [], [], 0
        due = _first(self.hx, t, limit)
        for hold in due:
            state = self.h.get(hold, {}).get("st")
            if state == "H":
                self._move_to_nothing(hold)
                self.h[hold]["st"] = "X"
                self.i.discard(f"{self.h[hold]['r'][0]}~{self.h[hold]['r'][1]}")
                self.hx[hold] = t + DAY_MS
                unsettled.append(hold)
            elif state == "C":
                asked += [hold, self.h[hold]["src"], self.h[hold]["seq"]]
                self.hx[hold] = t + 60_000
            else:
                self.h.pop(hold, None)
                del self.hx[hold]
        ended = _first(self.fx, (t - DAY_MS) // 1000, limit)
        for member in ended:
            scope, _, name = member.partition(" ")
            if name.endswith(" L:0") and self.s.get(scope, {}).get(f"{name} h", "0") != "0":
                self.fx[member] = t // 1000
                continue
            for suffix in "uh":
                self.s.get(scope, {}).pop(f"{name} {suffix}", None)
            if not self.s.get(scope, True):
                del self.s[scope]
            del self.fx[member]
            fields += 1
            self._uncounted(scope)
        return ("OK", unsettled, asked, fields, int(len(due) == limit or len(ended) == limit))

    def _uncounted(self, scope: str) -> None:
        account = scope.partition("~")[0]
        if scope in self.n and scope not in self.s:
            del self.n[scope]
            self.n[account] = str(int(self.n[account]) - 1)
            if self.n[account] == "0":
                del self.n[account]

    def hold(self, name: str, fields: list[tuple[str, str, int, int]], due: int) -> None:
        """A granted hold: (scope, field, amount, end) each; end 0 = none."""
        if name in self.h:
            return
        self.h[name] = {"st": "H", "r": ["acme", f"call-{name}"]}
        for scope, base, amount, end in fields:
            held = self.s.setdefault(scope, {})
            if f"{base} h" not in held and end:
                self.fx[f"{scope} {base}"] = end
            held[f"{base} h"] = str(int(held.get(f"{base} h", "0")) + amount)
            self.h[name]["r"] += [scope, base, str(amount)]
        self.hx[name] = due
        self.i.add(f"acme~call-{name}")
        self.g["gate-1"] = str(int(self.g.get("gate-1", "0")) + 1)

    def capture(self, name: str, due: int) -> None:
        """The hold is captured with what it holds."""
        if self.h.get(name, {}).get("st") == "H":
            self.h[name] |= {"st": "C", "src": "5" * 32, "seq": "7"}
            self.hx[name] = due

    def write(self, client: "redis.Redis[bytes]") -> None:
        """Make the real lane the same as this one."""
        client.flushdb()
        for name in ("m", "g", "n"):
            if getattr(self, name):
                client.hset(f"{TAG}{name}", mapping=getattr(self, name))
        for kind in ("s", "p"):
            for name, fields in getattr(self, kind).items():
                if fields:
                    client.hset(f"{TAG}{kind}:{name}", mapping=fields)
        for name, hold in self.h.items():
            client.hset(f"{TAG}h:{name}", mapping={**hold, "r": msgpack.packb(hold["r"])})
        for name in ("hx", "fx"):
            if getattr(self, name):
                client.zadd(f"{TAG}{name}", getattr(self, name))
        for name in self.i:
            client.set(f"{TAG}i:{name}", "answer")

    @classmethod
    def read(cls, client: "redis.Redis[bytes]") -> "Lane":
        """The real lane."""
        lane = cls()
        for raw in client.scan_iter("tw:*", count=1_000):
            kind, _, name = raw.decode().removeprefix(TAG).partition(":")
            if kind in ("hx", "fx"):
                setattr(
                    lane,
                    kind,
                    {member.decode(): int(score) for member, score in client.zrange(raw, 0, -1, withscores=True)},
                )
            elif kind == "i":
                lane.i.add(name)
            else:
                fields = client.hgetall(raw)
                packed = fields.pop(b"r", None)
                texts: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()}
                if packed is not None:
                    texts["r"] = msgpack.unpackb(packed)
                if kind in ("m", "g", "n"):
                    setattr(lane, kind, texts)
                else:
                    getattr(lane, kind)[name] = texts
        return lane


def _first(scores: dict[str, int], most: int, limit: int) -> list[str]:
    """As ZRANGEBYSCORE gives them."""
    return [name for score, name in sorted((score, name) for name, score in scores.items()) if score <= most][:limit]
