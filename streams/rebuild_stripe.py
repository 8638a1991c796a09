"""A sender whose checkpoint is lost, made anew from the meter events in the topic: nothing can be billed twice.

What was attempted and what came of it stood in the checkpoint alone. Meter events of the last 20 h go out again under the
same identifier, as attempts in doubt: Stripe refuses the second of two for at least 24 h. Older ones are never sent again:
they are taken as delivered, and `tollway meter-events` shows ours beside Stripe's.
"""

from collections.abc import Callable
from typing import Any, cast

from aiokafka import ConsumerRecord

from tollway.connectors.errors import Fatal
from tollway.connectors.kafka import ends, read_newest
from tollway.schemas import codec
from tollway.schemas.meter_event import MeterEvent, identifier
from tollway.schemas.topics import METER_EVENTS
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState
from tollway.streams.stripe_outbox import RESEND_S, Item, Outbox

LOST = "the checkpoint that knew what came of it is lost"


class Recovery:
    """Meter events in the order of their topic → an outbox."""

    def __init__(self, epoch: str, last_n: dict[str, int], now_s: int) -> None:
        """`last_n`: account → n of the newest meter event that was acknowledged when the accounts' state stood."""
        self._epoch, self._now_s = epoch, now_s
        self._taken = dict(last_n)
        self._seen: dict[str, int] = {}
        self._items: list[Item] = []
        self._delivered: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, event: MeterEvent, append_s: int) -> None:
        """One record, appended at that time; copies are passed over. Raises Fatal where it is another log's."""
        account, n = event["account"], event["n"]
        if event["epoch"] != self._epoch:
            raise Fatal(
                f"meter event of epoch {event['epoch']} behind those of {self._epoch}: this is another log's topic"
            )
        if n <= self._seen.get(account, 0):
            return
        self._seen[account] = n
        self._taken[account] = max(n, self._taken.get(account, 0))
        if self._now_s - append_s >= RESEND_S:
            count, units = self._delivered.get((account, event["event_name"]), (0, 0))
            self._delivered[account, event["event_name"]] = count + 1, units + event["units"]
        else:
            doubt = {"attempts": 1, "unanswered": 1, "doubt_since_s": append_s, "last": LOST}
            self._items.append(Item(event, identifier(event), **doubt))  # type: ignore[arg-type]

    @property
    def again(self) -> int:
        """Meter events that go out again."""
        return len(self._items)

    @property
    def delivered(self) -> int:
        """Meter events that are taken as delivered."""
        return sum(count for count, _ in self._delivered.values())

    def dump(self) -> dict[str, Any]:
        """As `Outbox.load` takes it."""
        return Outbox.recovered(self._epoch, self._taken, self._delivered, self._items).dump()


async def rebuilt_sender(
    settings: Settings, epoch: str, partition: int, accounts: PartitionState, now_s: int
) -> tuple[dict[str, Any], int, int]:
    """(dump of group stripe's state, meter events that go out again, those taken as delivered). Raises Unavailable, Fatal."""
    bootstrap, security = settings.kafka_bootstrap, settings.kafka_security()
    end = (await ends(bootstrap, security, METER_EVENTS.name, [partition]))[partition]
    recovery = Recovery(epoch, accounts.parts["billing"].last_n(), now_s)
    await read_newest(bootstrap, security, METER_EVENTS.name, [partition], None, keep=_adding(recovery, end))
    return {"next_offset": end, "sender": recovery.dump()}, recovery.again, recovery.delivered


def _adding(recovery: Recovery, end: int) -> Callable[[ConsumerRecord], bool]:
    """Takes each record in as it comes, and keeps none in memory."""

    def add(record: ConsumerRecord) -> bool:
        if record.value and record.offset < end:
            recovery.add(cast(MeterEvent, codec.decode(record.value)[1]), record.timestamp // 1000)
        return False

    return add
