"""Asks and holds as script calls, and scripts' answers as values. Pure; the scripts are `lua/*.lua`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tollway.connectors.gate_decision import Ask, Hold, Left
from tollway.schemas.lane import lane, tag

LIVE_SCOPES_MAX = 100_000
"""Live scopes of one account; further ones are held and counted together in `other~`."""

Call = tuple[list[str], list[str | int]]
"""Keys and arguments."""


@dataclass(frozen=True)
class Standing:
    """What every answer says of the lane: `gen` "" = there is no lane; `count` = this gate's acknowledged writes."""

    word: str
    gen: str
    off: int
    count: int


@dataclass(frozen=True)
class Me:
    """Who asks, and what it was last told of a lane."""

    gate: str
    gen: str
    floor: int
    grace_ms: int


def authorize_call(me: Me, ask: Ask, call: str, hold: str, unknown: str, scopes_max: int = LIVE_SCOPES_MAX) -> Call:
    account, t = ask.account, tag(lane(ask.account))
    keys = [
        f"{t}m",
        f"{t}g",
        f"{t}p:{account}",
        f"{t}hx",
        f"{t}fx",
        f"{t}i:{account}~{call}",
        f"{t}h:{hold}",
        f"{t}n",
    ]
    keys += [f"{t}s:{account}~other~", *(f"{t}s:{account}~{scope}" for scope in ask.scopes)]
    arguments: list[str | int] = [
        account,
        call,
        ask.digest,
        hold,
        ask.ttl_s * 1000,
        me.grace_ms,
        me.gate,
        me.gen,
        me.floor,
    ]
    arguments += [scopes_max, unknown]
    for triple in ask.triples:
        arguments += triple
    return keys, arguments


def _scopes(hold: Hold) -> list[str]:
    t = tag(lane(hold.account))
    return [f"{t}s:{scope}" for scope in dict.fromkeys(scope for scope, _, _ in hold.fields)]


def capture_call(me: Me, hold: Hold, used: Mapping[str, int], source: str, sequence: int) -> Call:
    t = tag(lane(hold.account))
    keys = [f"{t}m", f"{t}g", f"{t}hx", f"{t}h:{hold.id}", *_scopes(hold)]
    arguments: list[str | int] = [hold.id, source, sequence, me.gate, me.gen, me.floor]
    return keys, [*arguments, *_pairs(used)]


def void_call(hold: Hold) -> Call:
    t = tag(lane(hold.account))
    return [f"{t}m", f"{t}hx", f"{t}h:{hold.id}", f"{t}i:{hold.account}~{hold.call}", *_scopes(hold)], [hold.id]


def extend_call(me: Me, hold: Hold, totals: Mapping[str, int], ttl_s: int) -> Call:
    t = tag(lane(hold.account))
    keys = [f"{t}m", f"{t}g", f"{t}p:{hold.account}", f"{t}hx", f"{t}h:{hold.id}", *_scopes(hold)]
    return keys, [hold.id, ttl_s * 1000, me.grace_ms, me.gate, me.gen, me.floor, *_pairs(totals)]


def reassert_call(me: Me, hold: Hold, used: Mapping[str, int] | None, source: str, sequence: int) -> Call:
    """`used` = what a captured hold really used; None = it is open."""
    t = tag(lane(hold.account))
    keys = [f"{t}m", f"{t}g", f"{t}hx", f"{t}fx", f"{t}h:{hold.id}", f"{t}n", *_scopes(hold)]
    arguments: list[str | int] = [hold.id, hold.account, hold.call, "H" if used is None else "C", hold.expires_at_ms]
    arguments += [me.grace_ms, source, sequence, me.gate]
    for scope, base, units in hold.fields:
        arguments += [scope, base, units if used is None else used.get(base.partition(" ")[0], 0)]
    return keys, arguments


def meta_call(number: int, gate: str) -> Call:
    return [f"{tag(number)}m", f"{tag(number)}g"], [gate]


def _pairs(units: Mapping[str, int]) -> list[str | int]:
    return [item for pair in units.items() for item in pair]


def standing(reply: Sequence[Any]) -> Standing:
    """The head of any answer."""
    word, gen, off = reply[:3]
    count = reply[3] if len(reply) > 3 else b"0"
    return Standing(word.decode(), gen.decode(), int(off or -1), int(count))


@dataclass(frozen=True)
class Granted:
    """The body of OK, DUP and, where there is one, CONFLICT."""

    hold: Hold
    up_to: dict[str, int]
    left: tuple[Left, ...]


def granted(ask: Ask, call: str, body: bytes) -> Granted:
    _, hold, at_us, expires, grants, rows = msgpack.unpackb(body)
    up_to = {meter: int(units) for meter, units in zip(grants[::2], grants[1::2], strict=True)}
    fields = tuple((row[0], row[1], int(row[5])) for row in rows if row[1].partition(" ")[0] in up_to)
    value = Hold(hold, ask.account, call, int(at_us), int(expires), fields)
    return Granted(value, up_to, tuple(map(_left, rows)))


def refused(body: bytes) -> tuple[Left, tuple[Left, ...]]:
    """The body of DENY and CLOSED: the limit that refused, and all that were met."""
    row, rows = msgpack.unpackb(body)
    return _left(row), tuple(map(_left, rows))


def _left(row: Sequence[str]) -> Left:
    """A row of an answer: [account~scope, base, end, limit, left, units]. A closed scope's row has no base."""
    scope, base, end, limit, rest, _ = row
    meter, _, window = base.partition(" ")
    window, _, start = window.partition(":")
    end_s = None if not end or window == "L" else int(end)
    return Left(scope.partition("~")[2], meter, window, int(start or 0), end_s, int(limit), int(rest))


def fields_of(flat: Sequence[bytes]) -> tuple[tuple[str, str, int], ...]:
    """[account~scope, base, units, ...] as a hold's fields."""
    texts = [item.decode() for item in flat]
    return tuple(
        (scope, base, int(units)) for scope, base, units in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    )
