"""Agent stripe: meter events → Stripe, each unit once: attempts on record before the calls, answers with the next save."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from tollway.connectors.errors import Invalid, Refused, Unavailable
from tollway.connectors.stripe import Sends
from tollway.schemas.meter_event import MeterEvent
from tollway.streams.stripe_outbox import Attempt, Item, Outbox

ROUND_MAX = 64
"""Most pairs a round attempts, and one save puts on record."""
CALLS_MAX = 16
"""Most calls of one partition in flight."""
SLEPT_S = 60
"""A call that starts later than this after its attempt was stamped is not made: its owner may be another by now."""
BACKOFF_FIRST_S, BACKOFF_MAX_S = 2, 300

Save = Callable[[], Awaitable[None]]
History = Callable[[str, int], Awaitable[Iterable[MeterEvent]]]
"""(account, since_s) → that account's meter events in the topic, at least those with usage since then."""


def backoff_s(failures: int, rng: random.Random) -> int:
    """Wait before the next try after `failures` tries that failed in a row: doubling, half of it by chance."""
    most = min(BACKOFF_MAX_S, BACKOFF_FIRST_S << min(failures, 10))
    return rng.randint(most // 2, most)


class Sender:
    """Drives one partition's outbox. `save` makes `outbox.dump()` durable or raises; `drive` is never run twice at once."""

    def __init__(
        self,
        outbox: Outbox,
        port: Sends,
        save: Save,
        clock_s: Callable[[], int],
        *,
        history: History,
        rng: random.Random,
    ) -> None:
        self.outbox = outbox
        self._port, self._save, self._clock_s, self._history, self._rng = port, save, clock_s, history, rng
        self._calls = asyncio.Semaphore(CALLS_MAX)

    def take(self, events: list[MeterEvent]) -> bool:
        """As `Outbox.take`: False means full, pause the partition."""
        return self.outbox.take(events)

    async def drive(self) -> int | None:
        """One round; returns the seconds until the next one is due, None when nothing is left to do.

        Raises what `save` raises (then nothing was called), and Fatal where the topic lacks what it should hold.
        """
        now_s = self._clock_s()
        attempts: list[Attempt] = []
        unsettled: list[Item] = []
        for item in self.outbox.due(now_s, ROUND_MAX):
            course = self.outbox.course(item, now_s)
            if course == "send":
                attempts.append(self.outbox.attempt(item, now_s))
            elif course == "settle":
                unsettled.append(item)
            else:
                self.outbox.bury(item, "too late: Stripe takes no usage of more than 35 days ago", now_s)
        await self._put_on_record(attempts)
        calls = [*map(self._send, attempts), *map(self._settle, unsettled)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        return self.outbox.wait_s(self._clock_s())

    async def _put_on_record(self, attempts: list[Attempt]) -> None:
        if not self.outbox.changed:
            return
        self.outbox.changed = False
        try:
            await self._save()
        except BaseException:
            for attempt in attempts:
                self.outbox.withdraw(attempt)
            self.outbox.changed = True
            raise

    async def _send(self, attempt: Attempt) -> None:
        item = attempt.item
        async with self._calls:
            if not 0 <= self._clock_s() - attempt.at_s <= SLEPT_S:
                self.outbox.withdraw(attempt)
                return
            customer, event_name = item.pair
            outcome = await self._port.send(
                item.identifier, event_name, customer, item.event["units"], item.timestamp_s
            )
        self.outbox.answered(attempt, outcome, self._clock_s(), backoff_s(item.failures, self._rng))

    async def _settle(self, item: Item) -> None:
        customer, event_name = item.pair
        try:
            async with self._calls:
                theirs = await self._port.summary(event_name, customer, item.hour_s)
            now_s = self._clock_s()
            if self.outbox.read(item, theirs, now_s):
                history = await self._history(item.event["account"], item.hour_s)
                self.outbox.decide(item, theirs, self.outbox.delivered_units(item, history), now_s)
        except (Unavailable, Refused, Invalid) as error:
            item.last = f"no summary: {error}"
            self.outbox.postpone(item, self._clock_s(), backoff_s(item.failures, self._rng))

    def status(self, account: str | None = None) -> dict[str, Any]:
        """As `Outbox.status`."""
        return self.outbox.status(account)
