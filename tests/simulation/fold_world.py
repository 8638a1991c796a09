"""A seeded world round the folds: writers, a log, workers and their zombies, sinks that are away, clocks that jump."""

import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.load_poison import Raw
from tests.oracle_wire import lane
from tests.simulation.fold_faults import Faults
from tests.simulation.fold_group import Group
from tests.simulation.fold_invariants import Judge
from tests.simulation.fold_kafka import Cluster, Record
from tests.simulation.fold_loop import Loop
from tests.simulation.fold_network import Network
from tests.simulation.fold_opening import EPOCH, SIGNER, START_MS, WIDTH, opening, unpacked
from tests.simulation.fold_redis import Redis
from tests.simulation.fold_rest import at_rest, come_to_rest, last_scene
from tests.simulation.fold_sinks import ClickHouse, Stripe
from tests.simulation.fold_traffic import (
    GRACE_MS,
    METERS,
    POLICIES,
    Call,
    Emitter,
    Frame,
    Hold,
    accounts_of,
    command,
    event_of,
    poison,
    priced,
)
from tests.simulation.fold_truth import Truth
from tests.simulation.fold_workers import GROUPS, SESSION_MS, Worker, wired
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, METER_EVENTS, USAGE
from tollway.streams import checkpoint

LIVE = (5, 77)
POISON_LIFE_MS = 400_000
"""Poison that is older may be refused for its age first."""
KINDS = ("mixed", "crashes", "sinks", "days", "ends")


@dataclass(frozen=True)
class Profile:
    """How often, in parts of a thousand a step, and which faults there are."""

    kind: str
    steps: int
    partitions: int
    workers: int
    trouble: int
    faults: int
    checkpoint_s: float
    redis_last: bool
    """Redis stays away until all else has come to rest."""
    ends: str
    """How it ends: at rest, and then with a log that was `trimmed` too far, or made `anew`."""

    @classmethod
    def of(cls, dice: random.Random, kind: str) -> "Profile":
        calm = kind == "ends" or (kind == "mixed" and dice.random() < 0.1)
        return cls(
            kind,
            steps=dice.randint(3, 6) if kind == "ends" else dice.randint(18, 34),
            partitions=1 if dice.random() < 0.7 else 2,
            workers=1 if dice.random() < 0.5 else 2,
            trouble=0 if calm else dice.choice((0, 20, 80)),
            faults=0 if calm else 550 if kind != "mixed" else 400,
            checkpoint_s=dice.choice((1.0, 3.0, 8.0)),
            redis_last=dice.random() < 0.3,
            ends=dice.choice(("trimmed", "anew") if kind == "ends" else ("at rest",)),
        )


class World:
    """One seed. `bugs` are planted in the model of Redis; those of the product are planted around `play`."""

    def __init__(self, seed: int, kind: str = "mixed", bugs: frozenset[str] = frozenset()) -> None:
        self.seed, self.dice = seed, random.Random(f"{kind}/{seed}")
        self.profile = Profile.of(self.dice, kind)
        self.stats: Counter[str] = Counter()
        self.epoch, self.width = EPOCH, WIDTH
        self.wall_ms = START_MS
        self._names = 0
        self.ended_at: dict[int, int] = {}
        """partition → offset behind which the log is gone, or another one, from the last scene on."""
        self.loop = Loop(self.dice)
        self.network = Network(self.loop, self.dice)
        self.cluster = Cluster(self.network, self.broker_ms)
        self.broker_behind_ms = 0
        self.redis = Redis(self.network, lambda: self.clock_ms() * 1000, bugs)
        self.clickhouse = ClickHouse(self.network)
        self.stripe = Stripe(self.network, lambda: self.clock_ms() // 1000)
        self.signer = SIGNER
        self.numbers = list(LIVE[: self.profile.partitions])
        self.truth, self.judge = Truth(WIDTH, self.numbers), Judge(self)
        self.cluster.heard.append(self.judge.heard)
        self.clickhouse.heard, self.stripe.heard, self.redis.heard = (
            self.judge.inserted,
            self.judge.called,
            self.judge.told,
        )
        topics = {"accounts": USAGE.name, "audit": USAGE.name, "stripe": METER_EVENTS.name}
        self.groups = {group: Group(self.cluster, topics[group], self.numbers, SESSION_MS / 1000) for group in GROUPS}
        self.calls: dict[str, Call] = {}
        self.holds: dict[str, Hold] = {}
        self.given_up: set[str] = set()
        self.poisons: list[Raw] = []
        self._poisoned_ms = 0
        self.spools_stopped = False
        self.shared_source = uuid7_hex(START_MS, 7) if "shared_source" in bugs else ""
        self.accounts: dict[int, list[str]] = {}
        self.first: dict[int, dict[str, bytes]] = {}
        self.bound: dict[str, str] = {}
        self.workers: list[Worker] = []
        self.zombies: list[Worker] = []
        self.due: list[tuple[float, str, str]] = []
        """(time, group, instance) of workers that are started again."""
        self.emitters: list[Emitter] = []
        self.orphans: list[list[Frame]] = []
        self.faults = Faults(self)
        self._open_log()

    # Clocks and names

    def clock_ms(self) -> int:
        """Everybody's clock; it jumps where time passes with nothing happening."""
        return self.wall_ms + int(self.loop.now * 1000)

    def broker_ms(self) -> int:
        """The broker's may be set back."""
        return self.clock_ms() - self.broker_behind_ms

    def name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def new_source(self) -> str:
        return self.shared_source or uuid7_hex(self.clock_ms(), self.dice.getrandbits(74))

    # What stands before the traffic

    def _open_log(self) -> None:
        for topic in (USAGE, METER_EVENTS, DEAD_LETTERS, CHECKPOINTS):
            self.cluster.topic_ids[topic.name] = "the-log" if topic is USAGE else f"{topic.name}-id"
        from_nothing = self.dice.random() < 0.1
        for number in self.numbers:
            begin = opening(number)
            for row in begin.records:
                self.wall_ms = row.timestamp
                self.cluster.append((USAGE.name, number), row.key, row.value, row.headers)
            self.first[number] = begin.nothing if from_nothing else begin.folded
            for table, rows, token in [] if from_nothing else begin.inserts:
                self.clickhouse.insert(table, rows, token)
            for group, data in self.first[number].items():
                state = unpacked(data)
                about: dict[str, Any] = {"group": group, "epoch": EPOCH, "partition": number, "slot": 0, "turn": 0}
                about |= {"next_offset": state["next_offset"], "written_ms": START_MS, "fold_version": 1}
                records = checkpoint.encode(**about, stats={}, state=state)
                for key, value in records:
                    self.cluster.append((CHECKPOINTS.name, number), key, value, ())
            self.accounts[number] = accounts_of(number, WIDTH, 3)
            self.bound |= {name: f"cus_{name}" for name in self.accounts[number][:2]}
        names = [name for name in METERS.values() if name]
        self.stripe.open(names, [f"cus_{name}" for mine in self.accounts.values() for name in mine])
        self.emitters = [Emitter(self, self.name("emitter")) for _ in range(self.dice.choice((1, 2)))]
        for group in GROUPS:
            for slot in range(self.profile.workers):
                self.start(group, str(slot))
        self.network.trouble = self.profile.trouble

    def command(self, account: str, kind: str, body: dict[str, Any], age_s: int = 0) -> None:
        """Signed, and in the log at once."""
        self.cluster.append((USAGE.name, lane(account) % WIDTH), *command(self, account, kind, body, age_s))

    def bind(self, account: str) -> None:
        self.bound[account] = f"cus_{account}"
        self.command(account, "customer.bind", {"customer": self.bound[account]})

    # Workers

    def start(self, group: str, instance: str) -> Worker:
        worker = Worker(self, group, instance)
        self.workers.append(worker)
        return worker

    def tend_workers(self) -> None:
        """Whoever is gone is started again after a while; sessions expire."""
        for worker in list(self.workers):
            if not worker.alive:
                self.workers.remove(worker)
                if worker.failure is not None:
                    self.stats[f"ended by {type(worker.failure).__name__}"] += 1
                self.due.append((self.loop.now + self.dice.choice((0.1, 2.0, 6.0)), worker.group, worker.instance))
        for at, group, instance in list(self.due):
            if at <= self.loop.now:
                self.due.remove((at, group, instance))
                self.start(group, instance)
        for coordinator in self.groups.values():
            coordinator.expire()

    # Traffic

    def adopt(self) -> None:
        """A dead emitter's spool is found by a living one."""
        self.emitters[-1].spool += self.orphans.pop(0)

    def call(self) -> None:
        """One call of a service, emitted; perhaps late, held, priced, paid elsewhere, unsequenced."""
        dice = self.dice
        number = dice.choice(self.numbers)
        account = dice.choice(self.accounts[number])
        units = {"calls": dice.choice((1, 1, 1, 2, 0))}
        units |= {"tokens": dice.randrange(1, 9)} if dice.random() < 0.5 else {}
        units |= {"seconds": dice.randrange(1, 5)} if dice.random() < 0.2 else {}
        units |= {"undeclared": 7} if dice.random() < 0.05 else {}
        more: dict[str, Any] = {}
        at_us, sequenced = self.clock_ms() * 1000 + dice.randrange(1000), dice.random() < 0.93
        roll = dice.random()
        if sequenced and roll < 0.12:
            at_us -= dice.choice((70, 4_000, 90_000, 5 * 86_400)) * 10**6
        elif sequenced and roll < 0.16:
            at_us += dice.choice((20, 3_000)) * 10**6
        if dice.random() < 0.1:
            more["status"] = dice.choice(("error", "denied"))
        if dice.random() < 0.08:
            more["rail"] = "x402"
        if dice.random() < 0.15:
            more |= priced(units) | ({"revenue_asset": "EUR"} if dice.random() < 0.15 else {})
        call = Call(self.name("call"), account, units, "status" not in more and "rail" not in more)
        if sequenced and dice.random() < 0.3:
            at_us = self._hold(call, at_us)
            more |= {"hold": call.hold} if call.hold else {}
        self.calls[call.tag] = call
        emitter = dice.choice(self.emitters)
        emitter.emit(call, event_of(self, call, at_us, dice.choice(("u1", "u2")), **more), sequenced)
        if not sequenced or more.get("revenue_asset") == "EUR":
            self.given_up.add(call.tag)  # taken within an hour of its call alone; or in another asset than its price's
        if call.hold:
            self.holds[call.hold].source = emitter.source
            self._capture(call, emitter)
        self.stats["calls"] += 1

    def _hold(self, call: Call, at_us: int) -> int:
        """A gate's authorize in one round trip; the call's `at` where it is granted."""
        found, name = self.redis.lane(lane(call.account)), self.name("hold")
        now_us = self.clock_ms() * 1000
        if self.redis.away:
            return at_us
        triples = [(meter, units, 0) for meter, units in call.units.items()]
        scopes = ("acct", "user:u1")
        reply = found.authorize(
            now_us, call.account, scopes, call.tag, "", name, triples, 60_000, GRACE_MS, "gate", None, 0
        )
        if reply[0] != "OK":
            return at_us
        call.hold = name
        fields = [(row[0], row[1], row[2]) for row in found.h[name].fields]
        self.holds[name] = Hold(call.tag, call.account, fields)
        return now_us

    def _capture(self, call: Call, emitter: Emitter) -> None:
        number = lane(call.account)
        if self.dice.random() < 0.8 and not self.redis.away:
            self.redis.lane(number).capture(
                self.clock_ms() * 1000,
                call.hold,
                call.units,
                emitter.source,
                emitter.sequences[number],
                "gate",
                None,
                0,
            )

    def write_poison(self) -> None:
        """A record that nobody may count."""
        if self.clock_ms() - self._poisoned_ms > POISON_LIFE_MS:
            home, self._poisoned_ms = self.dice.choice(self.numbers), self.clock_ms()
            self.poisons = poison(self, self.accounts[home][1], accounts_of(home, WIDTH, 4)[3])
        for raw in self.dice.sample(self.poisons, self.dice.choice((1, 3, 6))):
            home = lane((raw.key or b"").decode()) % WIDTH if raw.key else self.numbers[0]
            places = [number for number in self.numbers if (number != home) == bool(raw.off_by)]
            if places:
                self.cluster.append((USAGE.name, places[0]), raw.key, raw.value, raw.headers)
                self.stats["poison"] += 1

    # The world goes on

    def step(self) -> None:
        """One thing happens, then time passes."""
        dice = self.dice
        if dice.random() * 1000 < self.profile.faults:
            self.faults.one()
        else:
            kinds = [self.call, self._calls, self.write_poison, self._order, self.faults.pass_time]
            dice.choices(kinds, [30, 30, 10, 8, 10])[0]()
        self.run(dice.choice((0.05, 0.3, 0.8, 1.5)))

    def _calls(self) -> None:
        for _ in range(self.dice.choice((2, 4, 8))):
            self.call()

    def _order(self) -> None:
        """A command of an account; sometimes once more, sometimes too late."""
        dice = self.dice
        account = dice.choice([name for mine in self.accounts.values() for name in mine])
        roll = dice.random()
        if roll < 0.3 and account not in self.bound:
            self.bind(account)
        elif roll < 0.5:
            self.command(account, "policy.set", dice.choice(POLICIES), age_s=dice.choice((0, 0, 1_200)))
        elif roll < 0.8:
            self.copy_one(lambda record: bool(record.headers))
        else:
            self.command(account, "policy.set", dice.choice(POLICIES))

    def copy_one(self, wanted: Callable[[Record], bool]) -> None:
        """A record that was not refused stands in the log once more."""
        number = self.dice.choice(self.numbers)
        dead = self.truth.book.dead
        found = [
            record
            for record in self.cluster.partitions[USAGE.name, number].records
            if wanted(record) and (number, record.offset) not in dead
        ]
        record = self.dice.choice(found)
        self.cluster.append((USAGE.name, number), record.key, record.value, record.headers)

    def run(self, seconds: float) -> None:
        """Time passes; then everything is judged."""
        until = self.loop.now + seconds
        while self.loop.now < until:
            self.loop.run_until(min(until, self.loop.now + 0.5))
            self.tend_workers()
        self.judge.step()


def play(seed: int, kind: str = "mixed", bugs: frozenset[str] = frozenset()) -> World:
    """A world from its first record to its rest. Raises Violation."""
    world = World(seed, kind, bugs)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with wired(world):
            for _ in range(world.profile.steps):
                world.step()
            come_to_rest(world)
            at_rest(world)
            last_scene(world)
    finally:
        world.loop.close()
        logging.disable(before)
    return world
