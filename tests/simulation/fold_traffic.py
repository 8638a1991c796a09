"""Who writes the log: emitters whose spools outlive them, a gate that holds, a control plane, and those who send poison."""

import asyncio
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from aiokafka.errors import KafkaError

from tests import load_poison
from tests.simulation.fold_loop import Process
from tollway.connectors.control import signed_record
from tollway.schemas import codec
from tollway.schemas.ids import born_ms, uuid7_hex
from tollway.schemas.lane import LANES, lane
from tollway.schemas.topics import USAGE

METERS = {"calls": "tw_calls", "tokens": "tw_tokens", "seconds": None}
PRICE = {"price_ref": "price:1", "asset": "USD", "unit_nano": {"calls": 1_000, "tokens": 3}}
WINDOWS = ["m", "h", "d", "M", "L"]
COUNTS = [{"meter": "calls", "windows": WINDOWS, "scopes": ["acct", "principal"]}]
POLICIES: list[dict[str, Any]] = [
    {
        "counts": [
            *COUNTS,
            *({"meter": m, "windows": ["h", "d"], "scopes": ["acct"]} for m in ("tokens", "undeclared")),
        ],
        "limits": [{"scope": "acct", "meter": "calls", "window": w, "limit": 10**9} for w in ("h", "d")],
    },
    {"counts": [{"meter": "tokens", "windows": ["m", "L"], "scopes": ["acct", "user", "agent"]}], "limits": []},
    {"counts": [*COUNTS, {"meter": "seconds", "windows": ["d"], "scopes": ["principal"]}], "limits": []},
]
DAY_S = 86_400
SPOOL_LIFE_S = 3 * DAY_S
GRACE_MS = 900_000
REQUEST_LIFE_S = 3_600
"""Clients and brokers give a request up within minutes: none is under way for days."""


@cache
def accounts_of(number: int, width: int, count: int) -> list[str]:
    """Accounts that live in a partition, its lanes in turn."""
    lanes = list(range(number, LANES, width))
    found: list[str] = []
    name = 0
    while len(found) < count:
        account = f"acct-{number}-{name}"
        if lane(account) == lanes[len(found) % len(lanes)]:
            found.append(account)
        name += 1
    return found


@dataclass
class Call:
    """A call that an emitter has taken. `hold` where a gate let it pass."""

    tag: str
    account: str
    units: dict[str, int]
    billed: bool
    hold: str = ""


@dataclass
class Frame:
    """A line of a spool."""

    tag: str
    place: int
    key: bytes
    value: bytes
    at_s: int
    acked: bool = False


@dataclass
class Hold:
    """What a gate has granted: (account~scope, base, units) each."""

    tag: str
    account: str
    fields: list[tuple[str, str, int]]
    source: str = ""
    """Of the usage that was to end it."""


@dataclass
class Emitter:
    """One process life: a source, a sequence a lane, a spool. Its death leaves the spool to a successor."""

    world: Any
    name: str
    source: str = ""
    sequences: dict[int, int] = field(default_factory=dict)
    spool: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = Process(self.name)
        self.source = self.world.new_source()
        self.world.loop.spawn(self.process, self._send())

    def emit(self, call: Call, event: dict[str, Any], sequenced: bool) -> None:
        """On disk when this returns. No source outlives its day."""
        number = lane(call.account)
        if self.world.clock_ms() - born_ms(self.source) > DAY_S * 1000:
            self.source, self.sequences = self.world.new_source(), {}
        if sequenced:
            self.sequences[number] = self.sequences.get(number, 0) + 1
        event |= {"source": self.source, "sequence": self.sequences[number] if sequenced else 0}
        value = codec.encode("UsageEvent", event)
        at_s = self.world.clock_ms() // 1000
        self.spool.append(Frame(call.tag, number % self.world.width, call.account.encode(), value, at_s))

    async def _send(self) -> None:
        while True:
            await asyncio.sleep(self.world.dice.uniform(0.2, 0.9))
            if not self.world.spools_stopped:
                for place in {frame.place: None for frame in self.spool}:
                    await self._batch(place)

    async def _batch(self, place: int) -> None:
        """The oldest frames of one partition, in their order."""
        now_s = self.world.clock_ms() // 1000
        mine = [frame for frame in self.spool if frame.place == place and not frame.acked]
        for frame in [frame for frame in mine if now_s - frame.at_s > SPOOL_LIFE_S]:
            frame.acked = True
            self.world.given_up.add(frame.tag)
        mine = [frame for frame in mine if not frame.acked][: self.world.dice.choice((1, 3, 20))]
        if not mine:
            return
        cluster = self.world.cluster
        if self.world.dice.random() < 0.15:
            self.world.dice.shuffle(mine)  # a writer with several requests in flight

        def arrives() -> None:
            if self.world.clock_ms() // 1000 - now_s > REQUEST_LIFE_S:  # everybody's clock was set on meanwhile
                raise KafkaError("a request this old is nobody's any more")
            for frame in mine:
                cluster.append((USAGE.name, place), frame.key, frame.value, ())

        try:
            await cluster.call(arrives)
        except KafkaError:
            return  # not known: the same again, in the same order
        for frame in mine:
            frame.acked = True

    def killed(self) -> list[Frame]:
        """What a successor finds: all that was not acknowledged, and some that was."""
        self.process.kill()
        first = next((at for at, frame in enumerate(self.spool) if not frame.acked), len(self.spool))
        saved = max(0, first - self.world.dice.choice((0, 0, 1, 4)))
        for frame in self.spool[saved:]:
            frame.acked = False
        return self.spool[saved:]

    @property
    def empty(self) -> bool:
        return all(frame.acked for frame in self.spool)


def event_of(world: Any, call: Call, at_us: int, principal: str, **more: Any) -> dict[str, Any]:
    """The usage record of a call, but for source and sequence."""
    event: dict[str, Any] = {
        "event_id": uuid7_hex(world.clock_ms(), world.dice.getrandbits(74)),
        "occurred_at": at_us,
        "surface": "rest",
        "operation": "GET /things",
        "account": call.account,
        "principal_kind": "user",
        "principal": principal,
        "status": "ok",
        "latency_us": 1_200,
        "quantities": call.units,
        "trace_id": call.tag,
        **more,
    }
    return event


def priced(units: dict[str, int]) -> dict[str, Any]:
    """The price fields that the fold agrees with."""
    due = sum(nano * units.get(meter, 0) for meter, nano in PRICE["unit_nano"].items())  # type: ignore[attr-defined]
    return {"price_ref": PRICE["price_ref"], "revenue_nano": due, "revenue_asset": PRICE["asset"]}


def command(world: Any, account: str, kind: str, body: dict[str, Any], age_s: int = 0) -> tuple[Any, ...]:
    """(key, value, headers) of a signed command, its id new."""
    command_id = uuid7_hex(world.clock_ms(), world.dice.getrandbits(74))
    signed_at_us = (world.clock_ms() - age_s * 1000) * 1000
    return signed_record(world.signer, command_id, account, kind, body, signed_at_us)


def poison(world: Any, account: str, stranger: str) -> list[load_poison.Raw]:
    """Every reason of a dead letter at least once."""
    dice = world.dice

    def uuid4() -> Any:
        bits = dice.getrandbits(128)
        return SimpleNamespace(hex=f"{bits:032x}", int=bits)

    before, load_poison.uuid = load_poison.uuid, SimpleNamespace(uuid4=uuid4)  # type: ignore[assignment]
    try:
        signed = [("sig", b"\0" * 64), ("kid", b"first")]
        headers = lambda value: [("sig", world.signer.sign(value)), ("kid", world.signer.kid.encode())]  # noqa: E731
        return load_poison.poisons(account, stranger, world.clock_ms() * 1000, headers, lambda _: signed)
    finally:
        load_poison.uuid = before
