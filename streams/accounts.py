"""usage.events → quota totals, meter events, dead letters: the fold of group `accounts`."""

from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiokafka import ConsumerRecord

from tollway.connectors.errors import Fatal
from tollway.schemas import codec
from tollway.schemas.lane import LANES
from tollway.schemas.meter_event import MeterEvent
from tollway.schemas.topics import METER_EVENTS, USAGE
from tollway.streams.batch import REFUSED, Batch, Records
from tollway.streams.billing import Billing
from tollway.streams.dead_letters import dead_letter
from tollway.streams.failpoint import Failpoints
from tollway.streams.fold import Message, Send
from tollway.streams.hand import Work, take
from tollway.streams.judge import cut, judge
from tollway.streams.quota import Quota
from tollway.streams.seal import Seal, crossed, sealed_aside
from tollway.streams.state import PartitionState

PARTS: dict[str, Any] = {"quota": Quota, "billing": Billing}


@dataclass
class Step:
    """A new step of a partition begins; nothing of it has been folded."""

    state: PartitionState
    step_time_s: int


@dataclass
class Fact:
    """A judged batch of a partition, its commands already in the directory."""

    state: PartitionState
    batch: Batch


@dataclass
class AccountsEffects:
    """What a stretch of one partition has caused."""

    partition: int
    meter_events: list[MeterEvent] = field(default_factory=list)
    dead_letters: list[Message] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)


class View(Protocol):
    """Where quota totals show: never awaited by the fold."""

    async def assigned(self, states: dict[int, PartitionState]) -> None: ...
    async def revoked(self, partitions: list[int]) -> None: ...
    def note(self, partition: int, state: PartitionState) -> None: ...


Think = Callable[[Any], Awaitable[Any]]


def think_quota(subject: Step | Fact) -> None:
    """Agent quota: count a batch, or let go of windows that a new step has closed."""
    part: Quota = subject.state.parts["quota"]
    if isinstance(subject, Step):
        part.on_step(subject.step_time_s)
    elif subject.batch.command is None:
        part.fold(subject.state.directory, subject.batch)
    else:
        part.on_command(subject.state.directory, subject.batch.command)


def think_billing(subject: Step | Fact) -> list[MeterEvent]:
    """Agent billing: accumulate a batch, or flush what a new step lets go."""
    part: Billing = subject.state.parts["billing"]
    if isinstance(subject, Step):
        return part.on_step(subject.state.directory, subject.step_time_s)
    if subject.batch.command is None:
        part.fold(subject.state.directory, subject.batch)
    return []


async def quota(works: AsyncIterable[Work]) -> None:
    """Agent quota."""
    async for work in works:
        take(work, think_quota)


async def billing(works: AsyncIterable[Work]) -> None:
    """Agent billing."""
    async for work in works:
        take(work, think_billing)


class AccountsFold:
    """Hands each batch to the agents quota and billing; dead-letters what was refused."""

    group, ticks, fencing = "accounts", True, None

    def __init__(
        self,
        epoch: str,
        partitions: int,
        public_key: str,
        quota: Think,
        billing: Think,
        view: View,
        failpoints: Failpoints,
        topic: str = USAGE.name,
        billing_partitions: int = LANES,
    ) -> None:
        """`billing_partitions`: of the topic of meter events, where they are fewer than the log's."""
        self.topic, self._billing_partitions = topic, billing_partitions
        self._epoch, self._partitions, self._public_key = epoch, partitions, public_key
        self._quota, self._billing, self._view, self._fail = quota, billing, view, failpoints

    def load(self, partition: int, state: dict[str, Any]) -> PartitionState:
        """Raises Fatal where the log names another first key than the settings."""
        loaded = PartitionState.load(partition, self._partitions, self._epoch, state, PARTS)
        check_key(loaded, self._public_key)
        return loaded

    async def assigned(self, states: dict[int, PartitionState]) -> None:
        """The view refreshes all that the states hold."""
        await self._view.assigned(states)

    async def revoked(self, partitions: list[int]) -> None:
        """The view lets go."""
        await self._view.revoked(partitions)

    def ready(self, state: PartitionState, stash: list[ConsumerRecord]) -> int:
        """Everything."""
        return len(stash)

    async def take(self, state: PartitionState, records: Records) -> AccountsEffects:
        """Fold records batch by batch."""
        effects = AccountsEffects(state.partition)
        start = 0
        while start < len(records):
            rest = records.part(start, len(records))
            end = cut(state, rest)
            log_time_ms = max(int(rest.append_ms[0]), state.log_time_ms)
            step = state.step_of(log_time_ms)
            if step != state.step:
                if (day := crossed(state, log_time_ms)) is not None:
                    effects.seals.append(await sealed_aside(self.group, state, day))
                state.enter(step)
                entered = Step(state, step * state.step_s)
                await self._quota(entered)
                effects.meter_events += await self._billing(entered)
            batch = judge(state, rest.part(0, end))
            if batch.command is not None and batch.command["kind"] == "log.open":
                check_key(state, self._public_key)
            fact = Fact(state, batch)
            await self._quota(fact)
            await self._billing(fact)
            effects.dead_letters += [
                dead_letter(self._epoch, batch, row) for row in batch.reasons if batch.verdict[row] == REFUSED
            ]
            start += end
        return effects

    async def settle(self, effects: list[AccountsEffects], send: Send) -> None:
        """Meter events go to the partition of their account, dead letters to the one they come from.

        Sealed snapshots go last: where one stands, all that was caused before it is acknowledged.
        """
        messages: list[Message] = [
            (
                METER_EVENTS.name,
                effect.partition % self._billing_partitions,
                event["account"].encode(),
                codec.encode("MeterEvent", dict(event)),
                (),
            )
            for effect in effects
            for event in effect.meter_events
        ]
        letters = [letter for effect in effects for letter in effect.dead_letters]
        if messages:
            await send(messages)
            self._fail.hit("accounts.between_effects")
        if letters:
            await send(letters)
        for effect in effects:
            for seal in effect.seals:
                self._fail.hit("accounts.before_seal")
                await send(seal.messages())

    def settled(self, partition: int, state: PartitionState) -> None:
        """Totals up to this offset may show."""
        self._view.note(partition, state)

    async def tend(self, states: dict[int, PartitionState]) -> None:
        """Nothing that time brings: windows close by log time."""

    def may_tick(self, state: PartitionState) -> bool:
        """Only behind log.open."""
        return state.is_open

    def problems(self) -> dict[int, str]:
        """None: effects that are not taken hold the turn."""
        return {}

    def stats(self, state: PartitionState) -> dict[str, Any]:
        """For `tollway status`."""
        return {
            **judged_stats(state),
            "unbound": len(state.parts["billing"].unbound()),
            "alarms": dict(state.parts["quota"].alarms),
        }


def judged_stats(state: PartitionState) -> dict[str, Any]:
    """What both groups of the log know."""
    return {
        "log_time_ms": state.log_time_ms,
        "accounts": len(state.directory.accounts),
        "sources": len(state.dedupe.sources),
        "missing": state.dedupe.missing(),
        "duplicates": state.dedupe.duplicates,
        "refused": state.refused,
        "undeclared": state.undeclared,
        "open": state.directory.config is not None,
    }


def check_key(state: PartitionState, public_key: str) -> None:
    """The log's first key and the worker's settings must agree. Raises Fatal."""
    config = state.directory.config
    if config is not None and config.public_key != public_key:
        raise Fatal(
            f"log.open names the public key {config.public_key[:16]}…, TOLLWAY_PUBLIC_KEY is {public_key[:16]}…: "
            "one of them is another deployment's"
        )
