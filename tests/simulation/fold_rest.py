"""The end of a world: faults stop, all that is owed is done, and the books agree to the unit."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.fold_invariants import expect
from tests.simulation.fold_loop import OUTSIDE
from tests.simulation.fold_opening import unpacked
from tests.simulation.fold_traffic import POLICIES, Hold
from tollway.schemas.lane import lane
from tollway.schemas.topics import USAGE
from tollway.streams.owned import as_records
from tollway.streams.refold import folds
from tollway.streams.seal import canonical

if TYPE_CHECKING:
    from tests.simulation.fold_world import World

REST_S = 240
"""Virtual seconds within which all must have settled."""


def come_to_rest(world: "World") -> None:
    """Everything is back; time passes until nothing is owed, or too much of it has passed."""
    _heal(world)
    world.run(4)
    world.wall_ms += 180_000
    if world.profile.redis_last:
        world.redis.away = True
        _until(world, lambda: [each for each in _owed(world) if not each.startswith("Redis")], "redis_stops_nobody")
        world.redis.away = False
    _until(world, lambda: _owed(world), "it_comes_to_rest")
    for worker in world.workers:
        stopped = {n: o.stopped for n, o in worker.engine.owned.items() if o.stopped} if worker.engine else {}
        expect(not stopped, "it_comes_to_rest", (worker.group, stopped))


def _until(world: "World", look: Callable[[], list[str]], name: str) -> None:
    """Time passes until nothing is owed."""
    began, owed = world.loop.now, ["not looked yet"]
    while owed and world.loop.now - began < REST_S:
        world.run(3)
        owed = look()
        if world.loop.now - began > 20 and any("Stripe" in each for each in owed):
            world.wall_ms += 3_600_000  # an hour's summary is read twice, and a doubt grows a day old
        elif world.loop.now - began > 20:
            world.wall_ms += 300_000
    expect(not owed, name, owed)


def _heal(world: "World") -> None:
    world.faults.sinks_back()
    world.cluster.away = False
    world.network.trouble = 0
    world.broker_behind_ms = 0
    while world.zombies:
        world.faults.wake()
    for worker in world.workers:
        worker.broken, worker.fail.name = 0, ""


def _owed(world: "World") -> list[str]:
    """What is still to be done, in words."""
    owed = [f"{emitter.name} has a spool" for emitter in world.emitters if not emitter.empty]
    owed += ["a dead emitter's spool"] * len(world.orphans)
    truth, judge = world.truth, world.judge
    for number in world.numbers:
        end = _last_fact(world, number)
        for group in ("accounts", "audit"):
            newest = judge.newest.get((group, number))
            if newest is None or newest.next_offset < end:
                owed.append(f"{group} {number} is not at {end}")
        for key_lane in range(number, 256, world.width):
            m = world.redis.lane(key_lane).m
            if m is None or m.state != "READY" or m.off < end:
                owed.append(f"Redis lane {key_lane} is {m}, not at {end}")
        owed += [f"{number} owes a delta" for _ in range(truth.partitions[number].still_open())]
    owed += [f"Redis holds {name}" for name, hold in world.holds.items() if _held(world, name, hold)]
    due = {name: delta.units for name, delta in truth.book.deltas.items() if delta.units}
    owed += [f"Stripe lacks {name}" for name in due if name not in judge.billed]
    return owed


def _last_fact(world: "World", number: int) -> int:
    """Offset behind the last record that is no tick."""
    records = world.cluster.partitions[USAGE.name, number].records
    return max((record.offset + 1 for record in records if record.value is not None), default=0)


def at_rest(world: "World") -> None:
    """To the unit, from what was called, not from how it was folded."""
    _every_call_once(world)
    _billed(world)
    _letters(world)
    _holds(world)
    for group in ("accounts", "audit"):
        for number in world.numbers:
            _refolded(world, group, number)


def _every_call_once(world: "World") -> None:
    for tag in world.calls:
        found = world.truth.accepted.get(tag, [])
        least = 0 if tag in world.given_up else 1
        expect(least <= len(found) <= 1, "every_call_counts_once", (tag, found))


def _billed(world: "World") -> None:
    """Stripe's units by customer and meter = those of the calls."""
    wanted: Counter[tuple[str, str]] = Counter()
    for tag, call in world.calls.items():
        if call.billed and call.account in world.bound and world.truth.accepted.get(tag):
            for meter, name in (("calls", "tw_calls"), ("tokens", "tw_tokens")):
                wanted[world.bound[call.account], name] += call.units.get(meter, 0)
    found: Counter[tuple[str, str]] = Counter()
    for event in world.stripe.state.events:
        found[event["customer"], event["event_name"]] += int(event["value"])
    for key in wanted.keys() | found.keys():
        expect(found[key] == wanted[key], "billed_once", (key, found[key], wanted[key]))


def _letters(world: "World") -> None:
    for number in world.numbers:
        end = world.cluster.partitions[USAGE.name, number].end
        wanted = world.truth.letters_before(number, end)
        expect(world.judge.letters[number] == wanted, "dead_letters_exactly_poison", (number, wanted))


def _holds(world: "World") -> None:
    """A hold whose usage is in the log does not stay."""
    for name, hold in world.holds.items():
        expect(not _held(world, name, hold), "holds_end_with_their_usage", name)


def _held(world: "World", name: str, hold: Hold) -> bool:
    """One that nobody captured may also expire, a quarter of an hour of log time behind its end."""
    found = world.redis.lane(lane(hold.account)).h.get(name)
    return found is not None and found.st != "X" and bool(world.truth.accepted.get(hold.tag))


def _refolded(world: "World", group: str, number: int) -> None:
    """The newest checkpoint, its bytes, from the log alone and without a fault: from its start or from a sealed snapshot."""
    newest = world.judge.newest[group, number]
    mine = [s for s in world.judge.seals.values() if (s.group, s.partition) == (group, number)]
    mine = [seal for seal in mine if seal.next_offset <= newest.next_offset]
    seal = world.dice.choice(mine) if mine and world.dice.random() < 0.5 else None
    fold = folds(world.epoch, world.width, world.signer.public_key, None)[group]  # type: ignore[arg-type]
    state = fold.load(number, seal.state if seal else unpacked(world.first[number][group]))
    records = world.cluster.partitions[USAGE.name, number].records
    done: list[Any] = []

    async def refold() -> None:
        stash = records[state.next_offset :]
        while state.next_offset < newest.next_offset:
            count = min(fold.ready(state, stash), newest.next_offset - state.next_offset)  # type: ignore[arg-type]
            expect(count, "replay_equals_live", (group, number, state.next_offset, "it does not go on"))
            await fold.take(state, as_records(stash[:count]))  # type: ignore[arg-type]
            del stash[:count]
        done.append(canonical(state.dump()))

    task = world.loop.spawn(OUTSIDE, refold())
    world.loop.run_until(world.loop.now)
    if not done:
        task.result()
    live = canonical(newest.state)
    expect(done[0] == live, "replay_equals_live", (group, number, newest.next_offset, seal and str(seal)))


def last_scene(world: "World") -> None:
    """The log loses what nobody has folded, or is made anew under its name: workers stop, and make nothing of it."""
    if world.profile.ends == "at rest":
        return
    logs = {number: world.cluster.partitions[USAGE.name, number] for number in world.numbers}
    readers = [worker for worker in world.workers if worker.group != "stripe"]
    if world.profile.ends == "trimmed":
        for worker in readers:
            worker.kill()
            world.workers.remove(worker)
        world.due.clear()
    ends = {number: log.end for number, log in logs.items()}
    if world.profile.ends == "anew":
        world.cluster.recreate(USAGE.name)
        world.ended_at = ends
    for account in (name for mine in world.accounts.values() for name in mine[:1]):
        world.command(account, "policy.set", POLICIES[0])
    if world.profile.ends == "trimmed":
        world.ended_at = ends
        for number, log in logs.items():
            log.start, log.records = log.end, []
            world.command(world.accounts[number][0], "policy.set", POLICIES[1])
        for worker in readers:
            world.start(worker.group, worker.instance)
    world.run(15)
    if world.profile.ends == "trimmed":
        for worker in world.workers:
            for number, owned in worker.engine.owned.items() if worker.group != "stripe" and worker.engine else ():
                expect(owned.stopped and owned.final, "another_log_is_not_folded", (worker.group, number, "it goes on"))
