"""Redis in memory: the fold's packed calls on lanes that are the gate contract's model, which real Lua is held to."""

from typing import Any

import msgpack

from tests.simulation.fold_network import LOST, OK, Away, Network
from tests.simulation.gate_model import Lane, Policy
from tollway.connectors.errors import Unavailable
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP, Script

Words = list[bytes]


def words(call: bytes) -> Words:
    """The bulk strings of one RESP array."""
    found: Words = []
    at = call.index(b"\r\n") + 2
    for _ in range(int(call[1 : call.index(b"\r\n")])):
        end = call.index(b"\r\n", at)
        size = int(call[at + 1 : end])
        found.append(call[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return found


def policy_of(fields: list[str]) -> Policy:
    """`p:<account>` as `streams.policy.gate_fields` gives it."""
    found = dict(zip(fields[::2], fields[1::2], strict=True))
    limits = {name: int(value) for name, value in found.items() if "|" in name}
    flags = {name: found[name] == "1" for name in ("frozen", "full")}
    return Policy(
        int(found["v"]), limits, **flags, outage=found["outage"], max_staleness_s=int(found["max_staleness_s"])
    )


def _sha(script: Script) -> bytes:
    return words(script.call(0))[1]


_NAMES = {_sha(script): name for script, name in ((APPLY, "apply"), (REWRITE_BEGIN, "begin"), (REWRITE_END, "end"), (SWEEP, "sweep"))}  # fmt: skip


def lane_of(call: bytes) -> int:
    """The lane that a call is for."""
    return int(words(call)[3].partition(b"{")[2][:3])


def served(lane: Lane, call: bytes, now_us: int) -> tuple[str, tuple[Any, ...], Any]:
    """(script, its arguments, reply as Valkey gives it) of one call on its lane."""
    _, sha, _, _, *raw = words(call)
    name = _NAMES[sha]
    if name == "apply":
        arguments = _apply_arguments(raw)
        return name, arguments, _wire(lane.apply(*arguments))
    if name == "begin":
        epoch, off = raw[0].decode(), int(raw[1])
        return name, (epoch, off), _wire(lane.begin(epoch, off, now_us))
    if name == "end":
        given = raw[0].decode(), int(raw[1]), int(raw[2])
        return name, given, _wire(lane.end(*given))
    limit = int(raw[0])
    _, unsettled, asked, fields, more = found = lane.sweep(limit)
    flat = [str(item).encode() for row in asked for item in row]
    return name, (limit, found[0]), [found[0].encode(), [hold.encode() for hold in unsettled], flat, fields, more]


def _apply_arguments(raw: Words) -> tuple[Any, ...]:
    epoch, off, tok, part, more, expect, log, body = raw
    totals, ends, policies, closes = msgpack.unpackb(body)
    rows = [
        (scope, name[:-2], int(value))
        for scope, *fields in totals
        for name, value in zip(fields[::2], fields[1::2], strict=True)
    ]
    told = dict(zip(ends[1::2], ends[::2], strict=True))
    known = {account: policy_of(fields) for account, *fields in policies}
    head = epoch.decode(), int(off), tok.decode(), int(part), more == b"1", int(expect) if expect else None, int(log)
    return (*head, rows, told, known, closes)


def _wire(reply: tuple[Any, ...]) -> list[Any]:
    """Texts and '' for nothing; the number of gates stays one."""
    word, off, state, gen, begun, *gates = reply
    texts = [word, "" if off is None else off, state or "", "" if gen is None else gen, "" if begun is None else begun]
    return [*(str(text).encode() for text in texts), *gates]


class Redis:
    """One server. `heard` is told of each call that ran."""

    def __init__(self, network: Network, clock_us: Any, bugs: frozenset[str]) -> None:
        self.network, self.clock_us, self.bugs = network, clock_us, bugs
        self.away = False
        self.lanes: dict[int, Lane] = {}
        self.copies: list[dict[int, Lane]] = []
        self.heard: Any = None

    def lane(self, number: int) -> Lane:
        return self.lanes.setdefault(number, Lane(self.bugs))

    def keep_copy(self) -> None:
        """What a replica has by now."""
        self.copies = [*self.copies[-3:], {number: lane.copy() for number, lane in self.lanes.items()}]

    def fail_over(self) -> None:
        """An older copy becomes the server; later ones are gone."""
        place = self.network.dice.randrange(len(self.copies))
        self.lanes = {number: lane.copy() for number, lane in self.copies[place].items()}
        self.copies = self.copies[: place + 1]

    def flush(self) -> None:
        self.lanes, self.copies = {}, []

    def serve(self, calls: list[bytes]) -> list[Any]:
        replies = []
        for call in calls:
            number = lane_of(call)
            name, arguments, reply = served(self.lane(number), call, self.clock_us())
            self.heard(number, name, arguments, reply)
            replies.append(reply)
        return replies

    async def fly(self, client: Any, calls: list[bytes]) -> list[Any]:
        """In place of `connectors.redis.fly`: a flight that fails may have run in part."""
        fate = self.network.fate(self.away)
        some = calls
        if fate not in (OK, LOST) and self.network.dice.random() < 0.4:
            some = calls[: self.network.dice.randrange(len(calls) + 1)]
        try:
            return await self.network.call(lambda: self.serve(some), fate=fate)  # type: ignore[no-any-return]
        except Away as error:
            raise Unavailable(f"Redis does not answer: {error}") from error

    async def check(self, client: Any, *, allow_volatile: bool = False) -> None:
        """In place of `connectors.redis.check`."""
        try:
            await self.network.call(lambda: None, away=self.away)
        except Away as error:
            raise Unavailable(f"Redis does not answer: {error}") from error

    async def aclose(self) -> None:
        """As a client is closed."""
