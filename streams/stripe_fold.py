"""billing.meter_events → Stripe: the fold of group `stripe`, whose state is what it has tried and what came of it.

That state is no function of its log, so its checkpoints carry a turn and are written by a transactional producer a
partition, started at assignment: the broker then refuses whoever owned the partition before (design §7).
"""

import asyncio
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.errors import KafkaError, ProducerFenced

from tollway.connectors.closing import close
from tollway.connectors.errors import Fatal, Refused, Unavailable
from tollway.connectors.kafka import started_producer
from tollway.connectors.meter_events import meter_events_since
from tollway.connectors.stripe import StripePort, meter_fault
from tollway.schemas import codec
from tollway.schemas.meter_event import MeterEvent
from tollway.schemas.topics import CHECKPOINTS, METER_EVENTS
from tollway.streams.batch import Records
from tollway.streams.failpoint import Failpoints
from tollway.streams.fold import Send, Unseated
from tollway.streams.hand import Work, take
from tollway.streams.settings import Settings
from tollway.streams.stripe_outbox import PENDING_MAX, Outbox
from tollway.streams.stripe_sender import Sender

TRANSACTION_TIMEOUT_MS = 10_000
"""A worker that died in a transaction holds back readers of committed records for this long at most."""

TRANSACTION_S = 20.0
"""A transaction that is not through by then is given up, and with it the assignment."""

CLOSE_S = 2.0
IDLE_S = 3600
FOREVER_S = 1 << 62
DOUBT_RED_S = 300
"""A meter event that Stripe has not answered for so long makes its partition red."""
CHECK_AGAIN_S = 10
"""A meter that is not sound, or a Stripe that cannot be asked, is looked at again after so long."""
TEST_KEYS = ("sk_test_", "rk_test_")

Think = Callable[[Any], Awaitable[Any]]


@dataclass
class StripeState:
    """A partition of billing.meter_events: its offset and its sender."""

    partition: int
    next_offset: int
    sender: Sender
    due_s: int = 0
    """When its sender has something to do again, by the clock that stamps attempts."""

    def dump(self) -> dict[str, Any]:
        """As msgpack takes it."""
        return {"next_offset": self.next_offset, "sender": self.sender.outbox.dump()}


@dataclass
class MeterEvents:
    """Meter events of one partition, in their order."""

    state: StripeState
    events: list[MeterEvent]


def think_stripe(subject: MeterEvents) -> None:
    """Agent stripe: take meter events into the sender's state; sending follows, with its attempts on record first."""
    if not subject.state.sender.take(subject.events):
        raise Fatal("more meter events were taken than the sender has room for")


async def stripe(works: AsyncIterable[Work]) -> None:
    """Agent stripe."""
    async for work in works:
        take(work, think_stripe)


def fresh() -> dict[str, Any]:
    """Dump of a sender that has seen nothing."""
    return {"next_offset": 0, "sender": Outbox().dump()}


class StripeFold:
    """Takes meter events and drives the senders of its partitions."""

    group, topic, ticks = "stripe", METER_EVENTS.name, False

    def __init__(
        self,
        epoch: str,
        stripe: Think,
        port: StripePort,
        settings: Settings,
        failpoints: Failpoints,
        clock_s: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._epoch, self._stripe, self._port, self._fail = epoch, stripe, port, failpoints
        self._settings, self._clock_s = settings, clock_s
        self._meters: set[str] = set()
        """Event names of meters that were found sound."""
        self._faults: dict[str, str] = {}
        """Event name → why nothing is sent to it."""
        self._states: dict[int, StripeState] = {}
        self._held: dict[int, str] = {}
        """Partition → why its sender stands still."""
        self._producers: dict[int, AIOKafkaProducer] = {}
        self._spent: set[int] = set()
        """Partitions whose producer has a transaction open, or one that failed: it writes no other."""
        self._save: Callable[[int], Awaitable[None]] | None = None
        self.fencing = self

    def bind(self, save: Callable[[int], Awaitable[None]]) -> None:
        """The engine's writer of a partition's checkpoint."""
        self._save = save

    async def fence(self, partitions: list[int]) -> None:
        """Start the partitions' transactional producers: their former owners can write no more."""
        await asyncio.gather(*(self._fence(number) for number in partitions))

    async def _fence(self, number: int) -> None:
        await self._drop(number)
        self._producers[number] = await started_producer(
            self._settings.kafka_bootstrap,
            self._settings.kafka_security(),
            transactional_id=f"stripe-{self._epoch}-{number}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        self._spent.discard(number)

    async def write_checkpoint(self, number: int, records: list[tuple[bytes, bytes]]) -> None:
        """One transaction. Raises Unseated where it was not taken: another worker may own the partition by now.

        Never fenced anew here: a worker that missed its revoke would shut out its successor, and its memory lacks what that one
        has put on record. Nor aborted: whoever is given the partition next aborts it by fencing.
        """
        producer = self._producers.get(number)
        if producer is None or number in self._spent:
            raise Unseated(f"partition {number} is not ours any more")
        self._spent.add(number)  # until the transaction is through
        try:
            async with asyncio.timeout(TRANSACTION_S):
                await producer.begin_transaction()
                for key, value in records:
                    await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=number)
                await producer.commit_transaction()
        except ProducerFenced as error:
            raise Unseated(f"partition {number} has another sender now: this worker was away too long") from error
        except (KafkaError, TimeoutError) as error:
            raise Unseated(f"checkpoint of partition {number} not taken ({type(error).__name__} {error})") from error
        self._spent.discard(number)

    def load(self, partition: int, state: dict[str, Any]) -> StripeState:
        """A sender with its attempts and outcomes."""

        async def save() -> None:
            if self._save is None:
                raise Fatal("the sender has no way to put attempts on record")
            await self._save(partition)
            self._fail.hit("stripe.after_attempts")

        async def history(account: str, since_s: int) -> list[MeterEvent]:
            return await meter_events_since(
                self._settings.kafka_bootstrap, self._settings.kafka_security(), partition, account, since_s
            )

        sender = Sender(
            Outbox.load(state["sender"]),
            self._port,
            save,
            self._clock_s,
            history=history,
            rng=random.Random(),
        )
        return StripeState(partition, state["next_offset"], sender)

    async def assigned(self, states: dict[int, StripeState]) -> None:
        """Nothing to show."""

    async def revoked(self, partitions: list[int]) -> None:
        """Stop writing for them."""
        for number in partitions:
            self._held.pop(number, None)
            self._states.pop(number, None)
            await self._drop(number)

    def ready(self, state: StripeState, stash: list[ConsumerRecord]) -> int:
        """As many as the sender has room for."""
        return min(len(stash), PENDING_MAX - state.sender.outbox.pending)

    async def take(self, state: StripeState, records: Records) -> None:
        """Into the sender's state, with the offset behind them."""
        events = [cast(MeterEvent, codec.decode(value)[1]) for value in records.values if value]
        await self._stripe(MeterEvents(state, events))
        state.next_offset = int(records.offsets[-1]) + 1
        state.due_s = 0

    async def _check_meters(self, names: set[str]) -> None:
        """Look, once in a process, whether meters add up what is sent to them (formula, window, mode)."""
        key = self._settings.stripe_key.get_secret_value()
        try:
            found = await self._port.meters()
        except (Unavailable, Refused) as error:
            self._faults = dict.fromkeys(names, str(error))
            return
        told = {name: meter_fault(found.get(name), not key.startswith(TEST_KEYS)) for name in names}
        self._faults = {name: f"Stripe's meter {name}: {fault}" for name, fault in told.items() if fault}
        self._meters |= names - self._faults.keys()

    async def settle(self, effects: list[None], send: Send) -> None:
        """Effects are calls, made in `tend` once their attempts are on record."""

    def settled(self, partition: int, state: StripeState) -> None:
        """Nothing to show."""

    async def tend(self, states: dict[int, StripeState]) -> None:
        """A round of every sender that has something due."""
        self._states = states
        now_s = self._clock_s()
        due = [state for state in states.values() if state.due_s <= now_s]
        unknown = set[str]().union(*(state.sender.outbox.event_names for state in due)) - self._meters
        if unknown:
            await self._check_meters(unknown)
        # All of them end before the first failure is raised: none calls on behind an engine that is gone.
        for result in await asyncio.gather(*(self._drive(state) for state in due), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _drive(self, state: StripeState) -> None:
        faults = [self._faults[name] for name in sorted(state.sender.outbox.event_names - self._meters)]
        if faults:
            self._held[state.partition], state.due_s = faults[0], self._clock_s() + CHECK_AGAIN_S
            return
        self._held.pop(state.partition, None)
        wait_s = await state.sender.drive()
        self._fail.hit("stripe.after_calls")
        if state.sender.outbox.changed:
            wait_s = 0  # the next round puts what came of this one on record
        state.due_s = self._clock_s() + (wait_s if wait_s is not None else IDLE_S)

    def may_tick(self, state: StripeState) -> bool:
        """Ticks are of the log, not of its effects."""
        return False

    def problems(self) -> dict[int, str]:
        """Senders that stand still before units go into a meter that would not add them up, or that Stripe does not answer."""
        now_s, found = self._clock_s(), dict[int, str]()
        for number, state in self._states.items():
            since_s = min(_doubts(state), default=now_s)
            if now_s - since_s >= DOUBT_RED_S:
                found[number] = f"Stripe has left a meter event in doubt for {now_s - since_s} s: it is asked again"
        return found | self._held

    def stats(self, state: StripeState) -> dict[str, Any]:
        """For `tollway status`."""
        found, doubts = state.sender.status(), _doubts(state)
        counts = {name: len(found[name]) for name in ("pending", "alarms", "dead")}
        return {**counts, "in_doubt": len(doubts), "in_doubt_since_s": min(doubts, default=None)}

    async def _drop(self, number: int) -> None:
        producer = self._producers.pop(number, None)
        if producer is not None:
            await close(producer, CLOSE_S)


def _doubts(state: StripeState) -> list[int]:
    """Since when each meter event in doubt is so; only the first of a pair ever is."""
    heads = state.sender.outbox.due(FOREVER_S, PENDING_MAX)
    return [item.doubt_since_s for item in heads if item.doubt_since_s is not None]
