"""What a partition still owes Stripe: meter events in order, their attempts, and what may be done next (design §5, §7).

Pure: no clock, no network. One pair (customer, meter) is a queue; only its head is ever attempted, so at most one event of
a pair is in doubt, and an hour's summary can settle it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any, Literal

from tollway.connectors.errors import Fatal
from tollway.connectors.stripe import Delivered, Duplicate, Outcome, Rejected, Retry, Unknown
from tollway.schemas.meter_event import MeterEvent, identifier
from tollway.schemas.usage import LATE_S

PENDING_MAX = 10_000
"""Most events a partition holds; then `take` refuses and the topic keeps the rest."""
DEAD_MAX = 1_000
"""Most events that Stripe will never take; then they stay at the head of their pair, with an alarm: something is wrong."""
RESEND_S = 20 * 3600
"""Stripe remembers identifiers for at least 24 h: an attempt in doubt is resent for this long, then settled."""
TOO_LATE_S = LATE_S
"""Stripe takes 35 days."""
SETTLE_GAP_S = 600
"""An hour's summary counts when it reads the same twice, this far apart: summaries are late."""
RECHECK_S = 3600
"""After a summary that fits neither case: read again, in case somebody has put it right at Stripe."""

EVENT_FIELDS = tuple(MeterEvent.__annotations__)
Pair = tuple[str, str]
Course = Literal["send", "settle", "late"]


@dataclass(slots=True)
class Item:
    """One meter event on its way. Times are whole seconds."""

    event: MeterEvent
    identifier: str
    attempts: int = 0
    unanswered: int = 0
    """Attempts on record whose answer nobody saw."""
    doubt_since_s: int | None = None
    """The first attempt since when it may be at Stripe without our knowing."""
    failures: int = 0
    due_s: int = 0
    last: str = ""
    """The last outcome, in words."""
    settle: str = ""
    """Why the hour's summary must decide, where it must."""
    read_units: int | None = None
    read_s: int = 0
    """The summary's last reading and its time."""
    alarm: str = ""

    @property
    def pair(self) -> Pair:
        return self.event["customer"], self.event["event_name"]

    @property
    def timestamp_s(self) -> int:
        """What Stripe is told: inside the usage hour, never before a subscription's start nor in the next period."""
        return self.event["last_occurred_at"] // 1_000_000

    @property
    def hour_s(self) -> int:
        return self.timestamp_s // 3600 * 3600


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt on record, and whether earlier ones were in doubt when it was made."""

    item: Item
    at_s: int
    in_doubt: bool


class Outbox:
    """State of one partition's sender. `dump()` is saved before every call; what is not saved is answered again later."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.changed = False
        """Whether outcomes wait for the next save."""
        self._queues: dict[Pair, deque[Item]] = {}
        self._dead: list[tuple[Item, str]] = []
        self._taken: dict[str, int] = {}
        self._delivered: dict[tuple[str, str], tuple[int, int]] = {}
        self._pending = 0

    # From the topic

    def take(self, events: list[MeterEvent]) -> bool:
        """Take events of the topic in, in its order; those taken before are skipped by n. False: full, none was taken.

        Raises Fatal where n has a gap or another epoch's events come: units would be lost.
        """
        new: list[MeterEvent] = []
        last = dict[str, int]()
        for event in events:
            epoch, account, n = event["epoch"], event["account"], event["n"]
            if self.epoch not in (None, epoch):
                raise Fatal(f"meter event of epoch {epoch} behind those of {self.epoch}: this is another log's topic")
            self.epoch = epoch
            before = last.get(account, self._taken.get(account, 0))
            if n > before + 1:
                raise Fatal(f"meter events of account {account}: {n} follows {before}: those between are lost")
            if n == before + 1:
                new.append(event)
                last[account] = n
        if new and self._pending + len(new) > PENDING_MAX:
            return False
        for event in new:
            self._queue(Item(event, identifier(event)))
        self._taken |= last
        return True

    def _queue(self, item: Item) -> None:
        self._queues.setdefault(item.pair, deque()).append(item)
        self._pending += 1

    # What to do

    def due(self, now_s: int, most: int) -> list[Item]:
        """The heads of up to `most` pairs whose time has come, longest due first."""
        heads = (queue[0] for queue in self._queues.values())
        return nsmallest(most, (item for item in heads if item.due_s <= now_s), key=lambda item: item.due_s)

    def course(self, item: Item, now_s: int) -> Course:
        """What a due head needs: another attempt, the hour's summary, or nothing any more."""
        if item.settle:
            return "settle"
        if item.doubt_since_s is not None and now_s - item.doubt_since_s >= RESEND_S:
            item.settle = f"no answer for {RESEND_S // 3600} hours"
            return "settle"
        if item.doubt_since_s is not None:
            return "send"
        return "late" if now_s - item.timestamp_s > TOO_LATE_S else "send"

    def wait_s(self, now_s: int) -> int | None:
        """Seconds until something is to be done or saved; None: idle."""
        if self.changed:
            return 0
        heads = [queue[0].due_s for queue in self._queues.values()]
        return max(0, min(heads) - now_s) if heads else None

    # Attempts and their answers

    def attempt(self, item: Item, now_s: int) -> Attempt:
        """Put an attempt on record. It must be saved before the call is made."""
        made = Attempt(item, now_s, item.doubt_since_s is not None)
        item.attempts += 1
        item.unanswered += 1
        if not made.in_doubt:
            item.doubt_since_s = now_s
        self.changed = True
        return made

    def withdraw(self, attempt: Attempt) -> None:
        """This attempt surely did not reach Stripe, or Stripe surely did not take it."""
        attempt.item.unanswered -= 1
        if not attempt.in_doubt:
            attempt.item.doubt_since_s = None
        self.changed = True

    def answered(self, attempt: Attempt, outcome: Outcome, now_s: int, backoff_s: int) -> None:
        """Take an attempt's outcome in."""
        item = attempt.item
        item.last = described(outcome)
        self.changed = True
        match outcome:
            case Delivered():
                self._deliver(item)
            case Duplicate() if item.unanswered > 1:
                self._deliver(item)  # an earlier attempt of ours had arrived
            case Duplicate():
                self.withdraw(attempt)
                item.settle = "the identifier was taken without an attempt of ours on record"
                item.alarm, item.due_s = item.settle, now_s
            case Rejected(reason) if not attempt.in_doubt:
                self.withdraw(attempt)
                self.bury(item, reason, now_s)
            case Rejected(reason):
                self.withdraw(attempt)
                item.settle, item.due_s = f"rejected while an earlier attempt is in doubt: {reason}", now_s
            case Retry(after_s):
                self.withdraw(attempt)
                self.postpone(item, now_s, max(backoff_s, after_s or 0))
            case Unknown():
                self.postpone(item, now_s, backoff_s)

    def postpone(self, item: Item, now_s: int, wait_s: int) -> None:
        """Try again later."""
        item.failures += 1
        item.due_s = now_s + wait_s
        self.changed = True

    def bury(self, item: Item, reason: str, now_s: int) -> None:
        """Stripe will never take it: a dead letter, listed with its reason."""
        self.changed = True
        if len(self._dead) >= DEAD_MAX:
            item.alarm, item.due_s = f"{DEAD_MAX} dead letters already; this would be one: {reason}", now_s + RECHECK_S
            return
        self._pop(item)
        self._dead.append((item, reason))

    def _deliver(self, item: Item) -> None:
        self._pop(item)
        key = item.event["account"], item.event["event_name"]
        count, units = self._delivered.get(key, (0, 0))
        self._delivered[key] = count + 1, units + item.event["units"]

    def _pop(self, item: Item) -> None:
        queue = self._queues[item.pair]
        assert queue[0] is item, "only heads are attempted"
        queue.popleft()
        self._pending -= 1
        if not queue:
            del self._queues[item.pair]

    # Settling what is in doubt

    def read(self, item: Item, theirs: int, now_s: int) -> bool:
        """Take a reading of the hour's summary in. True: it stood still for SETTLE_GAP_S, so `decide`."""
        if item.read_units == theirs and now_s - item.read_s >= SETTLE_GAP_S:
            return True
        if item.read_units != theirs:
            item.read_units, item.read_s = theirs, now_s
            item.last = f"the hour's summary says {theirs}"
            self.changed = True
        item.due_s = item.read_s + SETTLE_GAP_S
        return False

    def decide(self, item: Item, theirs: int, ours: int, now_s: int) -> None:
        """`theirs` = the hour at Stripe, `ours` = units of that hour delivered without this event."""
        item.read_units, item.failures = None, 0
        self.changed = True
        units = item.event["units"]
        if theirs == ours + units:
            self._deliver(item)
        elif theirs == ours:
            item.settle, item.alarm, item.doubt_since_s, item.due_s = "", "", None, now_s
            item.last = f"the hour's summary says {theirs}: not delivered"
        else:
            item.due_s = now_s + RECHECK_S
            item.alarm = f"Stripe counts {theirs} for this hour, not {ours} or {ours + units}: this pair stands still"

    def delivered_units(self, item: Item, history: Iterable[MeterEvent]) -> int:
        """Units of the item's pair and hour that Stripe has: those in the topic, less those not delivered yet.

        `history`: the account's events in the topic, at least those since that hour began. Raises Fatal where the item is
        not among them: then others may lack too.
        """
        found = {
            identifier(event): event["units"]
            for event in history
            if (event["customer"], event["event_name"]) == item.pair
            and event["last_occurred_at"] // 3_600_000_000 * 3600 == item.hour_s
            and event["n"] <= self._taken.get(event["account"], 0)
        }
        if item.identifier not in found:
            raise Fatal(f"the topic no longer holds meter event {item.identifier}: it was trimmed too early")
        undelivered = {other.identifier for other in self._all()}
        return sum(units for name, units in found.items() if name not in undelivered)

    def _all(self) -> Iterator[Item]:
        for queue in self._queues.values():
            yield from queue
        for item, _ in self._dead:
            yield item

    # For people, and for the next start

    def status(self, account: str | None = None) -> dict[str, Any]:
        """How far each account is, what is pending, in alarm and dead; of one account, or of all."""
        items = [item for queue in self._queues.values() for item in queue]
        meters: dict[str, dict[str, dict[str, int]]] = {name: {} for name in self._taken}
        for (name, event_name), (_, units) in sorted(self._delivered.items()):
            _row(meters, name, event_name)["delivered"] = units
        for kind, some in (("pending", items), ("dead", [item for item, _ in self._dead])):
            for item in some:
                _row(meters, item.event["account"], item.event["event_name"])[kind] += item.event["units"]
        return {
            "accounts": {
                name: {"taken": self._taken[name], "meters": rows}
                for name, rows in sorted(meters.items())
                if account in (None, name)
            },
            "pending": [shown(item) for item in items if account in (None, item.event["account"])],
            "alarms": [shown(item) for item in items if item.alarm and account in (None, item.event["account"])],
            "dead": [
                {**shown(item), "reason": reason}
                for item, reason in self._dead
                if account in (None, item.event["account"])
            ],
        }

    @property
    def pending(self) -> int:
        return self._pending

    @property
    def event_names(self) -> set[str]:
        """Of all that is pending."""
        return {event_name for _, event_name in self._queues}

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it."""
        return {
            "epoch": self.epoch,
            "taken": dict(self._taken),
            "delivered": [[*key, count, str(units)] for key, (count, units) in self._delivered.items()],
            "pending": [_packed(item) for queue in self._queues.values() for item in queue],
            "dead": [[_packed(item), reason] for item, reason in self._dead],
        }

    @classmethod
    def recovered(
        cls,
        epoch: str,
        taken: dict[str, int],
        delivered: dict[tuple[str, str], tuple[int, int]],
        items: Iterable[Item],
    ) -> "Outbox":
        """One that knows only what the topic tells: account → newest n, what counts as delivered, and what is in doubt."""
        outbox = cls()
        outbox.epoch, outbox._taken, outbox._delivered = epoch, dict(taken), dict(delivered)
        for item in items:
            outbox._queue(item)
        return outbox

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Outbox":
        """The inverse of `dump`. An attempt whose outcome was not saved is in doubt from here on."""
        outbox = cls()
        outbox.epoch, outbox._taken = state["epoch"], dict(state["taken"])
        outbox._delivered = {
            (account, event_name): (count, int(units)) for account, event_name, count, units in state["delivered"]
        }
        for row in state["pending"]:
            outbox._queue(_unpacked(row))
        outbox._dead = [(_unpacked(row), reason) for row, reason in state["dead"]]
        return outbox


def described(outcome: Outcome) -> str:
    """An outcome in words."""
    reason = getattr(outcome, "reason", "")
    return f"{type(outcome).__name__.lower()}{': ' if reason else ''}{reason}"


def shown(item: Item) -> dict[str, Any]:
    """An item as people see it."""
    event = item.event
    return {
        "identifier": item.identifier,
        **{
            name: event[name] for name in ("account", "n", "customer", "event_name", "window_start_s", "flush", "units")
        },
        "timestamp_s": item.timestamp_s,
        "attempts": item.attempts,
        "in_doubt_since_s": item.doubt_since_s,
        "due_s": item.due_s,
        "last": item.last,
        "settle": item.settle,
        "alarm": item.alarm,
    }


def _row(meters: dict[str, dict[str, dict[str, int]]], account: str, event_name: str) -> dict[str, int]:
    return meters.setdefault(account, {}).setdefault(event_name, {"delivered": 0, "pending": 0, "dead": 0})


def _packed(item: Item) -> list[Any]:
    event = [item.event[name] for name in EVENT_FIELDS]  # type: ignore[literal-required]
    return [*event, *(getattr(item, name) for name in ITEM_FIELDS)]


def _unpacked(row: list[Any]) -> Item:
    event = dict(zip(EVENT_FIELDS, row, strict=False))
    return Item(event, **dict(zip(ITEM_FIELDS, row[len(EVENT_FIELDS) :], strict=True)))  # type: ignore[arg-type]


ITEM_FIELDS = tuple(name for name in Item.__slots__ if name != "event")
