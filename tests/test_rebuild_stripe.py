"""A sender whose checkpoint is lost: what may have been sent is never sent under another name, what is old never again."""

from typing import Any

import pytest

from tollway.connectors.errors import Fatal
from tollway.connectors.stripe import Delivered, Duplicate
from tollway.schemas.meter_event import MeterEvent, identifier
from tollway.streams.rebuild_stripe import LOST, Recovery
from tollway.streams.stripe_outbox import RESEND_S, Outbox

NOW_S = 1_790_000_000
EPOCH = "0-test"


def event(n: int, account: str = "acme", **fields: Any) -> MeterEvent:
    given: Any = {
        "epoch": EPOCH, "account": account, "n": n, "deployment": "test", "customer": f"cus_{account}", "meter": "calls",
        "event_name": "calls", "price_ref": None, "window_start_s": NOW_S - 7_200, "flush": n, "part": 0, "units": 10 + n,
        "last_occurred_at": (NOW_S - 7_000) * 1_000_000, **fields,
    }  # fmt: skip
    return given  # type: ignore[no-any-return]


def recovered(*appended: tuple[MeterEvent, int], last_n: dict[str, int] | None = None) -> tuple[Recovery, Outbox]:
    recovery = Recovery(EPOCH, last_n or {}, NOW_S)
    for one, append_s in appended:
        recovery.add(one, append_s)
    return recovery, Outbox.load(recovery.dump())


def test_the_last_hours_go_out_again_under_the_same_identifier() -> None:
    """Whether Stripe had it (400 duplicate) or not (200): it is delivered once, and nothing stays."""
    for outcome in (Duplicate("known"), Delivered()):
        recovery, outbox = recovered((event(1), NOW_S - 60))
        assert (recovery.again, recovery.delivered, outbox.pending) == (1, 0, 1)
        (item,) = outbox.due(NOW_S, 10)
        assert (item.identifier, item.last, outbox.course(item, NOW_S)) == (identifier(event(1)), LOST, "send")
        outbox.answered(outbox.attempt(item, NOW_S), outcome, NOW_S, 1)
        assert outbox.pending == 0
        assert outbox.status()["accounts"]["acme"]["meters"]["calls"]["delivered"] == 11


def test_what_stripe_may_have_forgotten_is_never_sent_again() -> None:
    """20 h old and more: taken as delivered, and shown so. What comes closer to it while it waits is settled, not sent."""
    recovery, outbox = recovered((event(1), NOW_S - RESEND_S), (event(2), NOW_S - RESEND_S + 1))
    assert (recovery.again, recovery.delivered, outbox.pending) == (1, 1, 1)
    assert outbox.status()["accounts"]["acme"]["meters"]["calls"] == {"delivered": 11, "pending": 12, "dead": 0}
    (item,) = outbox.due(NOW_S, 10)
    assert item.event["n"] == 2
    assert outbox.course(item, NOW_S + 1) == "settle"


def test_accounts_go_on_where_they_were() -> None:
    """Copies count once; the next n follows the topic's, or the books' where the topic was trimmed."""
    recovery, outbox = recovered(
        (event(1), NOW_S - 9), (event(2), NOW_S - 8), (event(1), NOW_S - 7), last_n={"acme": 2, "quiet": 57}
    )
    assert recovery.again == 2
    assert outbox.take([event(2), event(3), event(58, "quiet")])
    assert outbox.pending == 4
    with pytest.raises(Fatal, match="60 follows 58"):
        outbox.take([event(60, "quiet")])
    with pytest.raises(Fatal, match="another log"):
        recovered((event(1, epoch="0-other"), NOW_S))
