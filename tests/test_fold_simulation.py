"""The folds in seeded worlds: named invariants hold after every step, and each planted hole is named by an invariant."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.gate_lua import read
from tests.simulation.fold import again, main, one
from tests.simulation.fold_holes import MUTANTS
from tests.simulation.fold_invariants import Violation
from tests.simulation.fold_mutants import Mutant
from tests.simulation.fold_redis import served
from tests.simulation.fold_rest import at_rest, come_to_rest
from tests.simulation.fold_traffic import POLICIES
from tests.simulation.fold_workers import wired
from tests.simulation.fold_world import KINDS, Profile, World, play
from tests.simulation.gate_model import Lane
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SCRIPTS, SWEEP
from tollway.schemas.command import DEFAULT_POLICY
from tollway.schemas.topics import USAGE
from tollway.streams.policy import gate_fields
from tollway.streams.quota_lots import Lot, parts

WORLDS = {"mixed": 45, "crashes": 45, "sinks": 45, "days": 45, "ends": 45}
DAY_MS = 86_400_000
START_MS = 1_767_225_480_000


@pytest.mark.parametrize("kind", KINDS)
def test_every_invariant_holds_after_every_step(kind: str) -> None:
    """Crashes at every effect and checkpoint, zombies, lost answers, sinks away, spools of days, poison: nothing is lost or doubled."""
    for seed in range(WORLDS[kind]):
        try:
            play(seed, kind)
        except Violation as violation:
            pytest.fail(f"{violation}\n{again(kind, seed)}")


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.seed is not None], ids=lambda mutant: mutant.name
)
def test_a_planted_hole_is_named(mutant: Mutant) -> None:
    """A hole of the design's review, put back into the product's code, breaks the invariant that stands for it.

    Those of which no seed is known are planted by `python -m tests.simulation.fold --mutants` alone.
    """
    assert mutant.seed is not None
    for seed in [mutant.seed, *(seed for seed in range(mutant.worlds) if seed != mutant.seed)]:
        try:
            one(mutant.kind, seed, mutant)
        except Violation as violation:
            if violation.name in mutant.killers.split():
                return
    pytest.fail(f"{mutant.name} was not named in {mutant.worlds} worlds")


def test_a_failing_seed_prints_the_command_that_plays_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that `again` names fails by the same invariant, and without the hole it does not fail."""
    words = again("mixed", 0, "shared_source").split()[3:]
    assert main(words) == 1
    assert capsys.readouterr().out.startswith("every_call_counts_once")
    assert main(again("mixed", 0).split()[3:]) == 0


def test_a_seed_is_one_world_in_every_process() -> None:
    """What happens depends on the seed alone, not on the process or its hashes."""
    command = [sys.executable, "-m", "tests.simulation.fold", "--kind", "crashes", "--seed", "1"]
    run = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True, text=True)
    told = json.loads(run.stdout)
    assert {name: told[name] for name in told if name != "worlds"} == dict(play(1, "crashes").stats)


def test_a_stopped_partition_is_retried_until_a_broker_answers() -> None:
    """A retry whose load fails leaves the partition stopped; it once left it paused for ever, and green."""
    world = World(1)
    world.profile = dataclasses.replace(Profile.of(random.Random(1), "mixed"), redis_last=False, ends="at rest")
    world.network.trouble = 0
    with wired(world):
        world.run(4)
        for worker in world.workers:
            worker.broken = 1
        for _ in range(6):
            world.call()
        known = world.cluster.topic_ids.pop(USAGE.name)
        world.run(6)
        assert any(mine.stopped for worker in world.workers for mine in worker.engine.owned.values())
        world.cluster.topic_ids[USAGE.name] = known
        come_to_rest(world)
        at_rest(world)
    world.loop.close()


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator["redis.Redis[bytes]"]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as found:
        found.flushdb()
        for script in SCRIPTS:
            found.script_load(script.text)
        yield found


def test_the_worlds_redis_answers_packed_calls_as_valkey_does(client: Any) -> None:
    """Replies and key space after each of the folds' packed calls: parts, stale, lost, other logs, rewrites, sweeps."""
    dice, lane, number, log_ms, off = random.Random(3), Lane(), 42, START_MS, 0
    words: set[Any] = set()
    for turn in range(400):
        log_ms += dice.choice((0, 1_000, 60_000, DAY_MS // 2))
        off += dice.choice((0, 1, 1, -1))
        epoch = dice.choice(("0-log",) * 12 + ("0-other",))
        for call in _calls(dice, number, epoch, off, log_ms, lane, turn):
            real = client.connection_pool.get_connection()
            real.send_packed_command([call])
            reply = real.read_response()
            client.connection_pool.release(real)
            now_us = int(reply[3] or 0) if len(reply) == 6 else 0
            _, _, wanted = served(lane, call, now_us)
            assert reply == wanted
            words.add((wanted[0], len(wanted)))
        assert read(client, number) == lane.content()
    assert {(b"OK", 5), (b"LOST", 5), (b"OLD", 5), (b"EPOCH", 5), (b"OK", 6), (b"OK", 5)} <= words


def _calls(
    dice: random.Random, number: int, epoch: str, off: int, log_ms: int, lane: Lane, turn: int
) -> Iterator[bytes]:
    """One call, or the parts of a batch."""
    roll = dice.random()
    gen = lane.m.gen if lane.m else 1
    if roll < 0.1 or lane.m is None:
        yield REWRITE_BEGIN.call(number, epoch, off)
    elif roll < 0.25:
        yield REWRITE_END.call(number, epoch, gen + dice.choice((0, 0, 0, 1)), off)
    elif roll < 0.35:
        yield SWEEP.call(number, dice.choice((1, 100)))
    else:
        expect = dice.choice(("", lane.m.off, lane.m.off + 1 if dice.random() < 0.1 else lane.m.off))
        policies = [["acme", *gate_fields({**DEFAULT_POLICY, **dice.choice(POLICIES)}, turn, dice.random() < 0.2)]]
        made = list(parts(_lot(dice, log_ms), policies if dice.random() < 0.3 else [], ["hold-1"]))
        for place, part in enumerate(made):
            more = "1" if place < len(made) - 1 else ""
            yield APPLY.call(number, epoch, off, f"t{turn}", place, more, expect, log_ms, part.body)


def _lot(dice: random.Random, log_ms: int) -> Lot:
    lot = Lot()
    start = log_ms // 1000 // 3600 * 3600 - dice.choice((0, 3_600, 100_000))
    for scope in sorted(dice.sample(("acct", "user:u1", "run:r1"), dice.randint(1, 3))):
        lot.scopes.append(f"acme~{scope}")
        lot.fields.append(f"calls h:{start} u")
        lot.values.append(str(dice.randrange(10**18)))
        lot.ends.append(start + 3_600 if dice.random() < 0.7 else 0)
    return lot
