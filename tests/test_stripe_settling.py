"""An attempt whose answer nobody saw: asked for again, or settled from the hour's summary, never billed twice."""

import pytest

from tests.stripe_world import BUSY_S, HOUR_S, NOW, T0, Desk, Topic, owed
from tollway.connectors.errors import Fatal
from tollway.schemas.meter_event import identifier
from tollway.streams.stripe_outbox import RECHECK_S, RESEND_S, SETTLE_GAP_S, TOO_LATE_S, Outbox
from tollway.streams.stripe_sender import BACKOFF_MAX_S

DAY_S = 86_400


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.mark.parametrize("trouble", ["lost", "accepted, lost"])
async def test_within_20_hours_a_lost_answer_is_asked_for_again(desk: Desk, trouble: str) -> None:
    """One second before the limit the same identifier goes out again; Stripe's refusal is the missing answer."""
    event = desk.topic.publish()
    desk.trouble = [trouble]
    desk.start()
    await desk.drive()
    desk.clock.now_s += RESEND_S - 1
    await desk.finish(hours=0)
    assert desk.rail.sent == [identifier(event)] * 2
    assert desk.rail.billed() == owed(desk.topic)
    assert desk.status["alarms"] == []


@pytest.mark.parametrize("hours", [20, 23, 24, 25, 24 * 30])
@pytest.mark.parametrize("trouble", ["lost", "accepted, lost"])
async def test_after_20_hours_the_hours_summary_decides(desk: Desk, trouble: str, hours: int) -> None:
    """Past the limit nothing is sent before the hour's summary was read twice, ten minutes apart; then it bills once."""
    desk.topic.publish(5)
    doubted, next_one = desk.topic.publish(9, at_s=T0 + 60), desk.topic.publish(2, at_s=T0 + 70)
    desk.trouble = ["", trouble]
    desk.start()
    await desk.drive(3)
    desk.clock.now_s = NOW + hours * HOUR_S
    before = len(desk.rail.sent)
    assert await desk.drive() == 0
    assert await desk.drive() == SETTLE_GAP_S
    desk.clock.now_s += SETTLE_GAP_S - 1
    assert await desk.drive() == 1
    assert len(desk.rail.sent) == before
    assert desk.status["pending"][0]["settle"] == "no answer for 20 hours"
    await desk.finish()
    assert desk.rail.billed() == owed(desk.topic)
    again = [doubted, next_one] if trouble == "lost" else [next_one]
    assert desk.rail.sent[before:] == [identifier(event) for event in again]
    assert desk.status["alarms"] == desk.status["dead"] == []


async def test_doubt_counts_from_the_first_attempt_nobody_answered(desk: Desk) -> None:
    """Resending does not renew the 20 hours, a refusal in between does not end them, a restart does not forget them."""
    desk.topic.publish()
    desk.trouble = ["busy", "accepted, lost", "lost", "busy", "lost"]
    desk.start()
    await desk.drive()
    desk.clock.now_s += BUSY_S
    await desk.drive()
    first_s = desk.clock.now_s
    for hours in (5, 12, 19):
        desk.clock.now_s = first_s + hours * HOUR_S
        desk.start()
        await desk.drive()
        assert desk.status["pending"][0]["in_doubt_since_s"] == first_s
    desk.clock.now_s = first_s + RESEND_S
    sent = len(desk.rail.sent)
    await desk.drive(2)
    assert (len(desk.rail.sent), desk.status["pending"][0]["settle"]) == (sent, "no answer for 20 hours")


async def test_a_known_refusal_leaves_no_doubt(desk: Desk) -> None:
    """Told to come back for days, an event is simply sent once Stripe takes it: no summary is needed."""
    desk.topic.publish()
    desk.trouble = ["busy"] * 3
    desk.start()
    for _ in range(3):
        await desk.drive()
        desk.clock.now_s += 30 * HOUR_S
    await desk.drive()
    assert desk.rail.billed() == owed(desk.topic)


async def test_a_summary_that_still_moves_does_not_count(desk: Desk) -> None:
    """Two readings ten minutes apart must be equal; a late summary is waited for."""
    desk.topic.publish(5)
    desk.trouble = ["accepted, lost"]
    desk.start()
    await desk.drive()
    desk.clock.now_s += RESEND_S
    desk.rail.delay_s = RESEND_S + SETTLE_GAP_S  # the event appears between the two readings
    await desk.drive()
    desk.clock.now_s += SETTLE_GAP_S
    await desk.drive()
    assert desk.status["pending"][0]["last"] == "the hour's summary says 5"
    await desk.finish()
    assert len(desk.rail.sent) == 1
    assert desk.rail.billed() == owed(desk.topic)


async def test_every_doubt_is_settled_by_readings_of_its_own(desk: Desk) -> None:
    """A reading that settled an earlier doubt counts for nothing in the next one."""
    desk.topic.publish(5)
    desk.trouble = ["lost", "accepted, lost"]
    desk.start()
    await desk.drive()
    desk.clock.now_s += RESEND_S
    await desk.drive()
    desk.clock.now_s += SETTLE_GAP_S
    await desk.drive(2)
    assert len(desk.rail.sent) == 2
    desk.clock.now_s += 25 * HOUR_S
    desk.rail.delay_s = 25 * HOUR_S + SETTLE_GAP_S // 2
    await desk.finish()
    assert len(desk.rail.sent) == 2
    assert desk.rail.billed() == owed(desk.topic)


def test_a_reading_counts_after_ten_minutes_of_standing_still() -> None:
    """Equal readings closer together than SETTLE_GAP_S decide nothing; a changed one begins again."""
    topic, outbox = Topic(), Outbox()
    topic.publish(5)
    outbox.take(topic.events)
    (item,) = outbox.due(NOW, 1)
    readings = [(0, 0), (0, SETTLE_GAP_S - 1), (5, SETTLE_GAP_S), (5, 2 * SETTLE_GAP_S - 1), (5, 2 * SETTLE_GAP_S)]
    assert [outbox.read(item, theirs, NOW + at_s) for theirs, at_s in readings] == [False, False, False, False, True]


async def test_only_what_was_delivered_counts_against_the_summary(desk: Desk) -> None:
    """Of the hour's events in the topic, dead ones and those not taken yet are not expected at Stripe."""
    desk.topic.publish(100)
    desk.topic.publish(5, at_s=T0 + 10)
    desk.trouble = ["rejected", "lost"]
    desk.start()
    await desk.drive(2)
    desk.topic.publish(1_000, at_s=T0 + 20)
    desk.clock.now_s += RESEND_S
    await desk.finish()
    (dead,) = desk.status["dead"]
    assert dead["reason"] == "archived_meter"
    assert len(desk.rail.sent) == 3
    assert desk.rail.billed() == {identifier(desk.topic.events[1]): 5}


@pytest.mark.parametrize("strange", [3, 8])
async def test_a_summary_that_fits_neither_case_stops_its_pair_alone_and_alarms(desk: Desk, strange: int) -> None:
    """With units of a stranger in the hour the pair stands still, others go on; put right at Stripe, it goes on too."""
    first, second = desk.topic.publish(5), desk.topic.publish(6, at_s=T0 + 10)
    desk.trouble = ["lost"]
    desk.start()
    await desk.drive()
    desk.rail._accept("stranger", "calls", "cus_a1", strange, T0)
    desk.clock.now_s += RESEND_S
    await desk.drive()
    desk.clock.now_s += SETTLE_GAP_S
    await desk.drive()
    (alarm,) = desk.status["alarms"]
    assert (alarm["identifier"], alarm["due_s"]) == (identifier(first), desk.clock.now_s + RECHECK_S)
    assert alarm["alarm"] == f"Stripe counts {strange} for this hour, not 0 or 5: this pair stands still"
    other = desk.topic.publish(7, account="a2")
    assert desk.process
    desk.process.catch_up()
    desk.clock.now_s += RECHECK_S
    await desk.drive(2)
    assert desk.rail.sent == [identifier(first), identifier(other)]
    desk.rail.state.apply({"kind": "cancel", "identifier": "stranger"})
    desk.trouble = ["busy"]
    while desk.trouble:
        desk.clock.now_s += await desk.drive() or 0
    assert (len(desk.status["pending"]), desk.status["alarms"]) == (2, [])
    await desk.finish()
    assert desk.rail.sent[2:] == [identifier(first), identifier(first), identifier(second)]


async def test_a_duplicate_without_an_attempt_on_record_is_an_alarm(desk: Desk) -> None:
    """Somebody else used our identifier: not taken for delivered until the hour's summary says so, twice."""
    event = desk.topic.publish(5)
    desk.rail._accept(identifier(event), "calls", "cus_a1", 5, T0)
    desk.trouble = ["busy"]  # refused for sure: no attempt that could have arrived
    desk.start()
    await desk.drive()
    desk.clock.now_s += BUSY_S
    await desk.drive()
    (alarm,) = desk.status["alarms"]
    assert alarm["alarm"] == "the identifier was taken without an attempt of ours on record"
    assert desk.status["accounts"]["a1"]["meters"]["calls"] == {"delivered": 0, "pending": 5, "dead": 0}
    await desk.finish()
    assert desk.status["accounts"]["a1"]["meters"]["calls"] == {"delivered": 5, "pending": 0, "dead": 0}
    assert desk.rail.billed() == owed(desk.topic)


@pytest.mark.parametrize(("first", "sent"), [("lost", 3), ("accepted, lost", 2)])
async def test_a_rejection_does_not_answer_for_an_earlier_attempt(desk: Desk, first: str, sent: int) -> None:
    """An attempt in doubt and then a rejection: the hour's summary decides whether the first one had arrived."""
    desk.topic.publish(5)
    desk.trouble = [first, "rejected"]
    desk.start()
    await desk.drive()
    desk.clock.now_s += BACKOFF_MAX_S
    await desk.drive()
    assert desk.status["dead"] == []
    await desk.finish()
    assert len(desk.rail.sent) == sent
    assert desk.rail.billed() == owed(desk.topic)


async def test_an_attempt_made_in_time_is_asked_for_past_the_34_days(desk: Desk) -> None:
    """An answer lost just before the limit is still asked for after it: Stripe's 35th day is for that."""
    desk.topic.publish(5, at_s=NOW - TOO_LATE_S + HOUR_S)
    desk.trouble = ["accepted, lost"]
    desk.start()
    await desk.drive()
    desk.clock.now_s += 2 * HOUR_S
    await desk.finish(hours=0)
    assert desk.status["dead"] == []
    assert desk.rail.billed() == owed(desk.topic)


@pytest.mark.parametrize(("trouble", "dead"), [("lost", 1), ("accepted, lost", 0)])
async def test_doubt_is_settled_before_anything_is_called_too_late(desk: Desk, trouble: str, dead: int) -> None:
    """Attempted once and then away until 40 days later: delivered if the summary says so, else a dead letter."""
    desk.topic.publish(5)
    desk.trouble = [trouble]
    desk.start()
    await desk.drive()
    desk.clock.now_s += 40 * DAY_S
    await desk.finish()
    assert len(desk.rail.sent) == 1
    assert len(desk.status["dead"]) == dead


async def test_a_topic_that_no_longer_holds_the_event_settles_nothing(desk: Desk) -> None:
    """Where the topic was trimmed too early, the sum of what was delivered is not known: stop, do not guess."""
    desk.topic.publish(5)
    desk.trouble = ["lost"]
    desk.start()
    await desk.drive()
    desk.topic.events.clear()
    desk.clock.now_s += RESEND_S
    await desk.drive()
    desk.clock.now_s += SETTLE_GAP_S
    with pytest.raises(Fatal, match="trimmed too early"):
        await desk.drive()
