"""A partition of meter events, its sender, and Stripe's own rules in one process: crashes, zombies, lost answers, outages."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack

from tollway.connectors.embedded.stripe_state import DUPLICATE, ApiError, StripeState
from tollway.connectors.errors import Fatal, Unavailable
from tollway.connectors.stripe import Delivered, Duplicate, Outcome, Rejected, Retry, Sends, Unknown
from tollway.schemas.meter_event import MeterEvent, identifier
from tollway.streams.stripe_outbox import Outbox
from tollway.streams.stripe_sender import Sender

T0 = 1_800_000_000
NOW = T0 + 3600
HOUR_S = 3600
BUSY_S = 400
"""What a busy Stripe asks to wait: longer than the sender would by itself."""


class Crash(BaseException):
    """The process ends here: nothing of it goes on, not even its handlers of ordinary errors."""


class Topic:
    """`billing.meter_events`: what was published, in order; n gapless an account."""

    def __init__(self) -> None:
        self.events: list[MeterEvent] = []
        self._last = Counter[str]()

    def publish(
        self, units: int = 1, *, account: str = "a1", event_name: str = "calls", at_s: int = T0, **fields: Any
    ) -> MeterEvent:
        """One delta of the window of ten seconds that `at_s` is in."""
        self._last[account] += 1
        event: MeterEvent = {
            "epoch": "0-t",
            "account": account,
            "n": self._last[account],
            "deployment": "test",
            "customer": f"cus_{account}",
            "meter": event_name,
            "event_name": event_name,
            "price_ref": None,
            "window_start_s": at_s // 10 * 10,
            "flush": len(self.events),
            "part": 0,
            "units": units,
            "last_occurred_at": at_s * 1_000_000 + 123_456,
        }
        event.update(fields)  # type: ignore[typeddict-item]
        self.events.append(event)
        return event

    async def history(self, account: str, since_s: int) -> list[MeterEvent]:
        """The account's events, some twice: its producer may repeat."""
        found = [event for event in self.events if event["account"] == account]
        return found + found[:3]


class Process:
    """One life of the sender: from the last save, over the topic from its start. `hooks` may crash or freeze a save."""

    def __init__(
        self,
        topic: Topic,
        port: Sends,
        saved: list[bytes],
        clock_s: Callable[[], int],
        seed: int = 0,
        *,
        owner: Callable[[], "Process | None"] = lambda: None,
        before_save: Callable[[], Awaitable[None]] | None = None,
        after_save: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._saved, self._owner, self._before, self._after = saved, owner, before_save, after_save
        outbox = Outbox.load(msgpack.unpackb(saved[-1])) if saved else Outbox()
        self.sender = Sender(outbox, port, self._save, clock_s, history=topic.history, rng=random.Random(seed))
        self._topic = topic
        self.catch_up()

    def catch_up(self) -> None:
        """Read the topic again from its start, as after a restart without an offset."""
        assert self.sender.take(self._topic.events)

    async def _save(self) -> None:
        if self._before:
            await self._before()
        owner = self._owner()
        if owner not in (None, self):
            raise Fatal("fenced: another sender has this partition")
        self._saved.append(msgpack.packb(self.sender.outbox.dump()))
        if self._after:
            await self._after()


class Rail:
    """Stripe's rules without its HTTP; `trouble` decides what happens to each call."""

    def __init__(self, clock_s: Callable[[], int], trouble: Callable[[str], str] = lambda _: "") -> None:
        self.state, self._clock_s, self._trouble = StripeState(), clock_s, trouble
        self.delay_s = 0
        self.sent: list[str] = []
        self._busy: set[tuple[str, str]] = set()

    def open(self, *names: str, customers: tuple[str, ...] = ("cus_a1",)) -> None:
        """Meters and customers that exist."""
        for name in names:
            params = {"event_name": name, "display_name": name, "default_aggregation": {"formula": "sum"}}
            self.state.apply(self.state.judge_meter(params, self._clock_s(), f"mtr_{name}")[0])
        for customer in customers:
            self.state.apply(self.state.judge_customer({}, self._clock_s(), customer)[0])

    async def send(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        trouble = self._trouble("send")
        self.sent.append(identifier)
        if (customer, event_name) in self._busy:
            return Retry(None, "lock_timeout")
        self._busy.add((customer, event_name))
        try:
            await asyncio.sleep(0)
            if trouble == "crash":
                raise Crash
            if trouble == "lost":
                return Unknown("lost")
            if trouble == "rejected":
                return Rejected("archived_meter")
            if trouble == "busy":
                return Retry(BUSY_S, "busy")
            outcome = self._accept(identifier, event_name, customer, units, timestamp_s)
            await asyncio.sleep(0)
            if trouble == "accepted, crash":
                raise Crash
            return Unknown("answer lost") if trouble == "accepted, lost" else outcome
        finally:
            self._busy.discard((customer, event_name))

    def _accept(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        params = {
            "identifier": identifier,
            "event_name": event_name,
            "timestamp": str(timestamp_s),
            "payload": {"stripe_customer_id": customer, "value": str(units)},
        }
        try:
            self.state.apply(self.state.judge_event(params, self._clock_s(), "")[0])
        except ApiError as error:
            return Duplicate(str(error)) if str(error).startswith(DUPLICATE) else Rejected(str(error))
        return Delivered()

    async def summary(self, event_name: str, customer: str, hour_start_s: int) -> int:
        if self._trouble("summary"):
            raise Unavailable("away")
        span = {"customer": customer, "start_time": str(hour_start_s), "end_time": str(hour_start_s + HOUR_S)}
        (found,) = self.state.summaries(f"mtr_{event_name}", span, self._clock_s(), self.delay_s)
        return int(found["aggregated_value"])

    def billed(self) -> Counter[str]:
        """identifier → units that Stripe counts."""
        units = Counter[str]()
        for event in self.state.events:
            units[event["identifier"]] += int(event["value"])
        return units


def owed(topic: Topic) -> Counter[str]:
    """identifier → units that the topic says."""
    return Counter({identifier(event): event["units"] for event in topic.events})


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW

    def __call__(self) -> int:
        return self.now_s


class Desk:
    """One partition with its topic, its saves and a rail; `trouble` is used up call by call, then all goes well."""

    def __init__(self) -> None:
        self.clock, self.topic, self.saved = Clock(), Topic(), list[bytes]()
        self.trouble: list[str] = []
        self.rail = Rail(self.clock, lambda call: self.trouble.pop(0) if call == "send" and self.trouble else "")
        self.rail.open("calls", "tokens", customers=("cus_a1", "cus_a2"))
        self.process: Process | None = None

    def start(self, port: Sends | None = None, **hooks: Any) -> Process:
        """A new life from the last save."""
        self.process = Process(
            self.topic, port or self.rail, self.saved, self.clock, owner=lambda: self.process, **hooks
        )
        return self.process

    async def drive(self, rounds: int = 1) -> int | None:
        """Some rounds; the seconds until the next."""
        assert self.process
        wait_s = None
        for _ in range(rounds):
            wait_s = await self.process.sender.drive()
        return wait_s

    async def finish(self, hours: int = 48) -> None:
        """Drive until nothing is left, letting time pass as the sender asks."""
        assert self.process
        end_s = self.clock.now_s + hours * HOUR_S
        while (wait_s := await self.process.sender.drive()) is not None:
            self.clock.now_s += wait_s
            assert self.clock.now_s <= end_s, self.process.sender.status()

    def saved_state(self) -> dict[str, Any]:
        return Outbox.load(msgpack.unpackb(self.saved[-1])).status()

    @property
    def status(self) -> dict[str, Any]:
        assert self.process
        return self.process.sender.status()


async def turns(done: Callable[[], bool]) -> None:
    """Let the others run until something holds."""
    for _ in range(1_000_000):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")
