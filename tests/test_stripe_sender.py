"""The Stripe sender bills every unit once: whatever crashes, repeats, is refused, or sleeps."""

import asyncio
import random
from typing import Any

import pytest

from tests.stripe_world import BUSY_S, HOUR_S, NOW, T0, Crash, Desk, Rail, Topic, owed, turns
from tollway.connectors.errors import Fatal, Unavailable
from tollway.schemas.meter_event import identifier
from tollway.streams.stripe_outbox import DEAD_MAX, PENDING_MAX, TOO_LATE_S, Outbox
from tollway.streams.stripe_sender import BACKOFF_FIRST_S, BACKOFF_MAX_S, CALLS_MAX, ROUND_MAX, SLEPT_S, backoff_s

DAY_S = 86_400


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_every_event_is_sent_in_its_pairs_order_and_then_all_is_quiet(desk: Desk) -> None:
    """Events go out with identifier, value and the second of their last call, a pair's one after another."""
    events = [desk.topic.publish(units, event_name=name) for units, name in ((3, "calls"), (4, "calls"), (5, "tokens"))]
    desk.start()
    await desk.finish()
    sent = [(row["identifier"], row["value"], row["timestamp"]) for row in desk.rail.state.events]
    assert sorted(sent) == sorted((identifier(event), str(event["units"]), T0) for event in events)
    assert desk.rail.sent.index(identifier(events[0])) < desk.rail.sent.index(identifier(events[1]))
    assert await desk.drive() is None
    assert desk.status == desk.saved_state()
    assert desk.status["accounts"]["a1"] == {
        "taken": 3,
        "meters": {
            "calls": {"delivered": 7, "pending": 0, "dead": 0},
            "tokens": {"delivered": 5, "pending": 0, "dead": 0},
        },
    }


async def test_an_attempt_is_on_record_before_the_call_is_made(desk: Desk) -> None:
    """When Stripe is called, the saved state already says that this attempt was made."""
    desk.topic.publish()
    seen: list[int] = []

    class Watching(Rail):
        async def send(self, *event: Any) -> Any:
            seen.append(desk.saved_state()["pending"][0]["attempts"])
            return await desk.rail.send(*event)

    desk.trouble = ["lost", "busy"]
    desk.start(Watching(desk.clock))
    await desk.finish()
    assert seen == [1, 2, 3]


async def test_where_the_save_fails_nothing_is_called(desk: Desk) -> None:
    """Without a record there is no call, and the attempt is not held against the event later."""
    desk.topic.publish()
    refusals = [Unavailable("no broker"), asyncio.CancelledError(), Fatal("fenced")]

    async def fail() -> None:
        if refusals:
            raise refusals.pop(0)

    desk.start(before_save=fail)
    for kind in (Unavailable, asyncio.CancelledError, Fatal):
        with pytest.raises(kind):
            await desk.drive()
        assert desk.rail.sent == []
        assert desk.status["pending"][0]["in_doubt_since_s"] is None
    await desk.finish()
    assert desk.rail.billed() == owed(desk.topic)


@pytest.mark.parametrize("place", ["before the save", "after the save", "before the call", "after the call"])
async def test_a_crash_anywhere_bills_once(desk: Desk, place: str) -> None:
    """Killed around the save or the call, the next life sends what is missing and nothing twice."""
    for at_s in (T0, T0 + 10, T0 + 20):
        desk.topic.publish(7, at_s=at_s)

    async def crash() -> None:
        raise Crash

    hooks = {"before the save": {"before_save": crash}, "after the save": {"after_save": crash}}
    desk.trouble = {"before the call": ["crash"], "after the call": ["accepted, crash"]}.get(place, [])
    desk.start(**hooks.get(place, {}))
    with pytest.raises(Crash):
        await desk.finish()
    desk.start()
    await desk.finish()
    assert desk.rail.billed() == owed(desk.topic)
    assert desk.status["alarms"] == desk.status["dead"] == []


async def test_stripe_says_how_long_to_wait(desk: Desk) -> None:
    """Retry-After is kept to where it is longer than our own back-off."""
    desk.topic.publish()
    desk.trouble = ["busy"]
    desk.start()
    assert await desk.drive(2) == BUSY_S


async def test_outcomes_whose_save_failed_are_saved_by_the_next(desk: Desk) -> None:
    """A save that fails after a round leaves its outcomes to be saved; the sender is not quiet before that."""
    desk.topic.publish()
    fails = iter([False, True, False])

    async def fail() -> None:
        if next(fails):
            raise Unavailable("no broker")

    desk.start(before_save=fail)
    assert await desk.drive() == 0
    with pytest.raises(Unavailable):
        await desk.drive()
    assert desk.saved_state()["pending"] != []
    assert await desk.drive() is None
    assert desk.saved_state()["pending"] == []


async def test_a_round_ends_with_all_its_calls(desk: Desk) -> None:
    """Where one call breaks in a way nobody foresaw, the others' outcomes are in before the error goes up."""
    broken, whole = desk.topic.publish(), desk.topic.publish(account="a2")

    class Breaking(Rail):
        async def send(self, name: str, *event: Any) -> Any:
            if name == identifier(broken):
                raise RuntimeError("unforeseen")
            await asyncio.sleep(0)
            return await desk.rail.send(name, *event)

    desk.start(Breaking(desk.clock))
    with pytest.raises(RuntimeError):
        await desk.drive()
    assert desk.rail.billed() == {identifier(whole): 1}
    assert [item["identifier"] for item in desk.status["pending"]] == [identifier(broken)]


async def test_what_stripe_never_takes_is_a_dead_letter_and_holds_nobody_up(desk: Desk) -> None:
    """A rejected event is listed with Stripe's reason, also after a restart; the pair's next event goes out."""
    desk.topic.publish(10**16, at_s=T0)
    good = desk.topic.publish(4, at_s=T0 + 10)
    desk.start()
    await desk.finish()
    desk.start()
    (dead,) = desk.status["dead"]
    assert (dead["units"], "15 significant digits" in dead["reason"]) == (10**16, True)
    assert desk.rail.billed() == {identifier(good): 4}
    assert desk.status["accounts"]["a1"]["meters"]["calls"] == {"delivered": 4, "pending": 0, "dead": 10**16}


async def test_older_than_34_days_is_a_dead_letter(desk: Desk) -> None:
    """At 34 days an event is still sent, a second later it is not: Stripe takes 35 days, and bills none of it twice."""
    on_time, too_late = desk.topic.publish(at_s=NOW - TOO_LATE_S), desk.topic.publish(at_s=NOW - TOO_LATE_S - 1)
    desk.start()
    await desk.finish(hours=0)
    assert desk.rail.sent == [identifier(on_time)]
    (dead,) = desk.status["dead"]
    assert (dead["identifier"], "35 days" in dead["reason"]) == (identifier(too_late), True)


async def test_a_sender_that_slept_after_its_save_makes_no_call(desk: Desk) -> None:
    """More than a minute after the record nothing is called; the round is put on record again and then sent."""
    desk.topic.publish()
    naps = [SLEPT_S + 1, SLEPT_S]

    async def nap() -> None:
        if naps:
            desk.clock.now_s += naps.pop(0)

    desk.start(after_save=nap)
    assert await desk.drive() == 0
    assert desk.rail.sent == []
    assert desk.status["pending"][0]["in_doubt_since_s"] is None
    assert await desk.drive() == 0
    assert len(desk.rail.sent) == 1


async def test_a_zombie_past_the_window_bills_nothing(desk: Desk) -> None:
    """Frozen for 30 hours between save and call, while a new owner delivered: it wakes, calls nothing, and is fenced."""
    desk.topic.publish(5)
    wake = asyncio.Event()

    async def freeze() -> None:
        await wake.wait()

    zombie = desk.start(after_save=freeze)
    asleep = asyncio.create_task(zombie.sender.drive())
    await turns(lambda: bool(desk.saved))
    desk.start()
    await desk.finish()
    assert desk.rail.billed() == owed(desk.topic)
    desk.clock.now_s += 30 * HOUR_S
    wake.set()
    await asleep
    with pytest.raises(Fatal, match="fenced"):
        await zombie.sender.drive()
    assert desk.rail.billed() == owed(desk.topic)


def test_the_topic_is_taken_once_and_without_gaps() -> None:
    """What was taken is skipped by n; a gap or another log's event is refused: units would be lost."""
    topic, outbox = Topic(), Outbox()
    events = [topic.publish(), topic.publish(), topic.publish(account="a2"), topic.publish()]
    assert outbox.take(events[:2])
    assert outbox.take(events)
    assert outbox.take(events[:1])
    assert outbox.pending == 4
    with pytest.raises(Fatal, match="5 follows 3"):
        outbox.take([{**topic.publish(), "n": 5}])
    with pytest.raises(Fatal, match="another log"):
        outbox.take([{**topic.publish(), "epoch": "1-u"}])


def test_a_full_outbox_takes_nothing_more() -> None:
    """Past PENDING_MAX a batch is refused whole, and nothing of it is remembered; what is known is still skipped."""
    topic, outbox = Topic(), Outbox()
    events = [topic.publish(at_s=T0 + number) for number in range(PENDING_MAX + 1)]
    assert not outbox.take(events)
    assert outbox.pending == 0
    assert outbox.take(events[:-1])
    assert not outbox.take(events[-1:])
    assert outbox.take(events[:100])
    assert outbox.pending == PENDING_MAX


async def test_too_many_dead_letters_stop_their_pairs(desk: Desk) -> None:
    """When all is rejected something else is wrong: past DEAD_MAX events wait with an alarm instead of being given up."""
    for number in range(DEAD_MAX + 2):
        desk.topic.publish(at_s=T0 - 35 * DAY_S + number % 3000, account=f"a{number}")
    desk.start()
    for _ in range(DEAD_MAX // ROUND_MAX + 3):
        await desk.drive()
    assert (len(desk.status["dead"]), len(desk.status["alarms"])) == (DEAD_MAX, 2)
    assert desk.rail.sent == []


def test_back_off_doubles_up_to_its_maximum() -> None:
    """The wait grows with failures, is half chance, and never leaves its bounds."""
    rng = random.Random(1)
    for failures in range(40):
        most = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**failures)
        waits = {backoff_s(failures, rng) for _ in range(200)}
        assert most // 2 <= min(waits) <= max(waits) <= most
    assert len({backoff_s(20, rng) for _ in range(200)}) > 50


async def test_calls_run_side_by_side_up_to_a_bound(desk: Desk) -> None:
    """A round's calls go out together, never more than CALLS_MAX at once."""
    for account in range(ROUND_MAX):
        desk.topic.publish(account=f"a{account}")
    flying, most = 0, 0

    class Counting(Rail):
        async def send(self, *event: Any) -> Any:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            for _ in range(5):
                await asyncio.sleep(0)
            flying -= 1
            return await desk.rail.send(*event)

    desk.start(Counting(desk.clock))
    await desk.drive()
    assert most == CALLS_MAX
    assert len(desk.rail.sent) == ROUND_MAX
