"""What goes wrong in a world, one thing at a time."""

from typing import TYPE_CHECKING, Any

from tests.simulation.fold_traffic import Emitter
from tollway.schemas.topics import CHECKPOINTS

if TYPE_CHECKING:
    from tests.simulation.fold_world import World

PLACES = {
    "accounts": ("before_effects", "between_effects", "after_effects", "before_checkpoint", "after_checkpoint", "before_seal"),
    "audit": ("before_effects", "between_effects", "after_effects", "before_checkpoint", "after_checkpoint"),
    "stripe": ("before_effects", "after_effects", "before_checkpoint", "after_checkpoint", "after_attempts", "after_calls"),
}  # fmt: skip
"""Where workers are killed: before and behind every effect and checkpoint."""


class Faults:
    """Each method is a fault; `one` picks by the world's kind."""

    def __init__(self, world: "World") -> None:
        self.world = world
        common = [
            (self.kill, 8), (self.kill_at, 14), (self.zombie, 6), (self.wake, 6), (self.lose_channel, 2), (self.think_badly, 8),
            (self.kafka_away, 3), (self.redis_away, 3), (self.redis_back, 2), (self.redis_flush, 2), (self.redis_failover, 3),
            (self.clickhouse_away, 3), (self.stripe_away, 4), (self.sinks_back, 6), (self.kill_emitter, 4), (self.stop_spools, 3),
            (self.old_copy, 5), (self.compact, 2), (self.damage, 2), (self.leave, 2), (self.pass_time, 5), (self.clock_back, 2),
        ]  # fmt: skip
        more: dict[str, set[Any]] = {
            "crashes": {self.kill, self.kill_at, self.zombie, self.wake, self.leave},
            "sinks": {
                self.redis_flush, self.redis_failover, self.redis_away, self.clickhouse_away, self.stripe_away, self.sinks_back,
            },
            "days": {self.pass_time, self.stop_spools, self.stripe_away, self.sinks_back, self.old_copy},
        }  # fmt: skip
        mine = more.get(world.profile.kind, set())
        self._faults = [fault for fault, _ in common]
        self._weights = [weight * 4 if fault in mine else weight for fault, weight in common]

    def one(self) -> None:
        """A fault, counted by its name."""
        fault = self.world.dice.choices(self._faults, self._weights)[0]
        self.world.stats[fault.__name__] += 1
        fault()

    def _worker(self) -> Any:
        awake = [worker for worker in self.world.workers if worker.alive and not worker.process.frozen]
        return self.world.dice.choice(awake) if awake else None

    # Workers

    def kill(self) -> None:
        if (worker := self._worker()) is not None:
            worker.kill()

    def kill_at(self) -> None:
        """The next time, or the one after, that it passes a place."""
        if (worker := self._worker()) is not None:
            worker.fail.name = f"{worker.group}.{self.world.dice.choice(PLACES[worker.group])}"
            worker.fail.left = self.world.dice.choice((1, 1, 2))

    def zombie(self) -> None:
        """SIGSTOP; a successor may take its partitions meanwhile."""
        if (worker := self._worker()) is not None:
            worker.process.frozen = True
            self.world.zombies.append(worker)
            if self.world.dice.random() < 0.5:
                self.world.start(worker.group, self.world.name("spare"))

    def wake(self) -> None:
        """SIGCONT."""
        if self.world.zombies:
            worker = self.world.zombies.pop(0)
            self.world.loop.thaw(worker.process)

    def leave(self) -> None:
        """SIGTERM; it comes again."""
        if (worker := self._worker()) is not None:
            worker.stop()

    def lose_channel(self) -> None:
        """A rebalance of Faust's own consumer."""
        if (worker := self._worker()) is not None:
            for channel in worker.channels:
                channel.clear()

    def think_badly(self) -> None:
        if (worker := self._worker()) is not None:
            worker.broken = self.world.dice.choice((1, 2))

    # Parts

    def kafka_away(self) -> None:
        cluster, world = self.world.cluster, self.world
        cluster.away = True
        world.loop.after(world.dice.choice((0.5, 3.0, 8.0)), lambda: setattr(cluster, "away", False))

    def redis_away(self) -> None:
        self.world.redis.away = True

    def redis_back(self) -> None:
        self.world.redis.away = False

    def redis_flush(self) -> None:
        self.world.redis.flush()
        self.world.holds.clear()

    def redis_failover(self) -> None:
        redis = self.world.redis
        if redis.copies and self.world.dice.random() < 0.7:
            redis.fail_over()
            self.world.holds.clear()
        else:
            redis.keep_copy()

    def clickhouse_away(self) -> None:
        clickhouse = self.world.clickhouse
        clickhouse.away, clickhouse.refuses = self.world.dice.choice(((True, False), (False, True)))

    def stripe_away(self) -> None:
        stripe = self.world.stripe
        stripe.away, stripe.mute, stripe.busy = self.world.dice.choice(
            ((True, False, False), (False, True, False), (False, True, False), (False, False, True))
        )
        stripe.delay_s = self.world.dice.choice((0, 0, 300))

    def sinks_back(self) -> None:
        world = self.world
        world.clickhouse.away = world.clickhouse.refuses = False
        world.stripe.away = world.stripe.mute = world.stripe.busy = False
        world.redis.away = world.spools_stopped = False

    def compact(self) -> None:
        self.world.cluster.compact(CHECKPOINTS.name, newest=self.world.dice.choice((0, 2)))

    def damage(self) -> None:
        """The newest checkpoint of a group whose state is a function of the log has a bit turned."""
        world = self.world
        place = CHECKPOINTS.name, world.dice.choice(world.numbers)
        mine = [
            r
            for r in world.cluster.partitions[place].records
            if r.value and (r.key or b"").startswith((b"acc", b"aud"))
        ]
        slots = {r.key for r in mine if b"sealed" not in (r.key or b"")}
        if len(slots) == 4 and mine[-1].value is not None and b"sealed" not in (mine[-1].key or b""):
            text = bytearray(mine[-1].value)
            text[len(text) // 2] ^= 1
            mine[-1].value = bytes(text)
            world.stats["damaged"] += 1

    # Writers

    def kill_emitter(self) -> None:
        """kill −9; a successor sends what it left, at once or much later."""
        world = self.world
        emitter = world.dice.choice(world.emitters)
        world.emitters.remove(emitter)
        world.orphans.append(emitter.killed())
        world.emitters.append(Emitter(world, world.name("emitter")))
        world.loop.after(world.dice.choice((0.1, 2.0, 9.0)), world.adopt)

    def stop_spools(self) -> None:
        """No emitter reaches the broker; they go on taking calls."""
        self.world.spools_stopped = not self.world.spools_stopped

    def old_copy(self) -> None:
        """A record of long ago comes once more: a mirror, a restored disk."""
        self.world.copy_one(lambda record: record.value is not None)

    # Time

    def pass_time(self) -> None:
        """Nothing happens for a while; everybody's clock has moved on."""
        world = self.world
        spans = (
            (20, 60, 90, 700)
            if world.profile.kind != "days"
            else (90, 700, 4_000, 30_000, 76_000, 90_000, 200_000, 450_000)
        )
        world.wall_ms += world.dice.choice(spans) * 1000

    def clock_back(self) -> None:
        """The broker's clock is set back by seconds; and again."""
        self.world.broker_behind_ms = self.world.dice.choice((0, 3_000, 40_000))
