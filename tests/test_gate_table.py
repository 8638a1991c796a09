"""Every row of the gate's decision table (design §6) on a real Valkey, first match wins."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gate_lane import FoldedLane
from tests.quota_world import until
from tollway.connectors import redis as far
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitted, Emitter
from tollway.connectors.gate import Ask, Decision, Gate, scopes_of
from tollway.schemas.lane import lane

PATIENT_S = 5.0
"""Deadline of gates in tests that are not about deadlines: the machine may be busy."""
USAGE = {"surface": "rest", "operation": "GET /x", "principal_kind": "user", "principal": "u1", "status": "ok"}
USAGE_US: dict[str, Any] = {**USAGE, "latency_us": 5}


@pytest.fixture
async def fold(valkey: ValkeyServer) -> AsyncIterator[FoldedLane]:
    client = far.connect(valkey.url)
    await client.flushdb()
    yield FoldedLane(client)
    await client.aclose()


@pytest.fixture
async def gates(valkey: ValkeyServer) -> AsyncIterator[Callable[..., Gate]]:
    made: list[Gate] = []

    def make(url: str = "", **options: Any) -> Gate:
        made.append(Gate(url or valkey.url, **{"deadline_s": PATIENT_S, **options}))
        return made[-1]

    yield make
    for gate in made:
        await gate.close()


def ask(units: int | tuple[int, int] = 1, *scopes: str, call: str = "", meter: str = "calls", **more: Any) -> Ask:
    return Ask("acme", scopes or ("acct", "user:u1"), {meter: units}, call=call, **more)


def emitted(sequence: int = 1) -> Emitted:
    return Emitted("5" * 32, lane("acme"), sequence)


async def test_row_1_a_known_call_gets_its_earlier_answer_and_no_second_licence(fold: FoldedLane, gates: Any) -> None:
    """The same call id with the same ask: the earlier grant, not allowed, 409, nothing held twice; with another: conflict."""
    await fold.ready(("acct", "calls", "h", 10))
    gate, other = gates(), gates()
    first = await gate.authorize(ask(2, call="c1"))
    again, changed = await other.authorize(ask(2, call="c1")), await other.authorize(ask(3, call="c1"))
    assert first.allowed
    assert (again.verdict, again.allowed, again.status, again.hold) == ("duplicate", False, 409, first.hold)
    assert again.problem()["hold"] == first.hold.id
    assert (changed.verdict, changed.status) == ("conflict", 409)
    assert await fold.held() == 2


async def test_row_1_comes_before_an_outage_of_the_lane(fold: FoldedLane, gates: Any) -> None:
    """A known call is answered while the lane is COLD: the first match wins."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    await gate.authorize(ask(call="c1"))
    await fold.begin()
    assert (await gates().authorize(ask(call="c1"))).verdict == "duplicate"
    assert (await gates().authorize(ask(call="c2"))).reason == "cold"


@pytest.mark.parametrize(("outage", "status", "stamp"), [("closed", 503, {}), ("open", 200, {"gate": "open"})])
async def test_row_2_redis_away_is_answered_by_policy(
    fold: FoldedLane, gates: Any, outage: str, status: int, stamp: dict[str, str]
) -> None:
    """Nothing listens: closed refuses with Retry-After, open allows and stamps the usage."""
    gate = gates(f"redis://127.0.0.1:{free_port()}/0", outage=outage)
    decision = await gate.authorize(ask())
    assert (decision.status, decision.reason, decision.stamp, decision.hold) == (status, "away", stamp, None)
    assert (("Retry-After", "1") in decision.headers()) == (status == 503)


async def test_row_2_a_stopped_redis_is_an_outage_within_the_deadline(tmp_path: Path) -> None:
    """SIGSTOP: the gate answers by the policy it was last told; what Redis grants late is given back when it goes on."""
    server = ValkeyServer(tmp_path)
    server.start()
    try:
        server.wait_ready()
        fold = FoldedLane(far.connect(server.url))
        await fold.ready(("acct", "calls", "h", 10), outage="open")
        async with Gate(server.url, deadline_s=PATIENT_S) as gate:
            assert (await gate.authorize(ask())).source == "gate"
            gate._deadline_s = 0.05
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            decision = await gate.authorize(ask(call="c2"))
            assert (decision.allowed, decision.source, decision.reason) == (True, "open", "slow")
            os.kill(server.pid, signal.SIGCONT)
            gate._deadline_s = PATIENT_S
            await _until_held(fold, 1)
            assert gate.stats()["orphans"] in (0, 1)  # 0 where the connection was given up first
        await fold.client.aclose()
    finally:
        server.stop()


async def _until_held(fold: FoldedLane, units: int) -> None:
    deadline = time.monotonic() + 10
    while await fold.held() != units:
        assert time.monotonic() < deadline, await fold.scope()
        await asyncio.sleep(0.01)


async def test_row_2_a_cold_lane_is_an_outage(fold: FoldedLane, gates: Any) -> None:
    """No lane at all, and a lane whose rewrite has not ended: never zero used, always the policy's answer."""
    gate = gates()
    assert ((await gate.authorize(ask())).reason, (await gate.authorize(ask())).status) == ("cold", 503)
    await fold.ready(("acct", "calls", "h", 10), outage="open")
    assert (await gate.authorize(ask())).source == "gate"
    await fold.begin()
    assert [(await gate.authorize(ask())).source, (await gate.authorize(ask())).reason] == ["open", "cold"]


async def test_row_2_another_generation_is_re_asserted_and_asked_again(fold: FoldedLane, gates: Any) -> None:
    """After a rewrite the gate tells its open holds, adopts the generation and retries: one answer to the caller."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    assert (await gate.authorize(ask(3))).allowed
    await fold.begin()
    await fold.apply()
    await fold.end()
    decision = await gate.authorize(ask(2))
    assert decision.allowed
    assert decision.left[0].left == 5
    assert (await fold.held(), gate.stats()["restored"]) == (5, 0)


async def test_row_2_a_clock_far_behind_log_time_is_an_outage(fold: FoldedLane, gates: Any) -> None:
    """Redis' clock more than 60 s behind the lane's log time would name windows of the past."""
    await fold.ready(("acct", "calls", "h", 10))
    await fold.apply(log_ms=int(time.time() * 1000) + 55_000)
    assert (await gates().authorize(ask())).allowed
    await fold.apply(log_ms=int(time.time() * 1000) + 90_000)
    decision = await gates().authorize(ask())
    assert (decision.status, decision.reason) == (503, "clock")


async def test_row_2_a_lease_is_drawn_until_it_is_empty(tmp_path: Path) -> None:
    """A hundredth of the limit, taken beforehand and held in Redis, is what may pass while Redis is away; then closed."""
    server = ValkeyServer(tmp_path)
    server.start()
    try:
        server.wait_ready()
        fold = FoldedLane(far.connect(server.url))
        await fold.ready(("acct", "calls", "h", 300), ("user", "calls", "h", 500), outage="lease")
        async with Gate(server.url, deadline_s=PATIENT_S) as gate:
            assert (await gate.authorize(ask())).allowed
            await until(lambda: gate.stats()["leases"] == 1, "a lease")
            assert await fold.held() == 4
            server.kill()
            answers = [await gate.authorize(ask()) for _ in range(4)]
            assert [answer.allowed for answer in answers] == [True, True, True, False]
            assert [answer.source for answer in answers[:3]] == ["lease"] * 3
            assert (answers[0].stamp, answers[0].hold, answers[3].reason) == ({"gate": "lease"}, None, "no_lease")
            assert not (await gate.authorize(ask(1, "acct", "user:u2"))).allowed
        await fold.client.aclose()
    finally:
        server.stop()


async def test_row_3_frozen_and_unknown_accounts(fold: FoldedLane, gates: Any) -> None:
    """A frozen account: 403, whatever is left. One without a policy: 403, or no limits where development says so."""
    await fold.ready(("acct", "calls", "h", 10), frozen=True)
    assert (await gates().authorize(ask())).verdict == "frozen"
    await fold.client.delete(f"{fold.prefix}p:acme")
    unknown, known = await gates().authorize(ask()), await gates(unknown="default").authorize(ask())
    assert (unknown.verdict, unknown.status, known.allowed) == ("unknown", 403, True)


async def test_row_4_stale_totals_count_only_where_no_hold_enforces(fold: FoldedLane, gates: Any) -> None:
    """A limit on a meter that the call does not ask for rests on the log alone: older than the policy allows is an outage."""
    await fold.ready(("acct", "calls", "h", 10), ("acct", "tokens", "d", 10), max_staleness_s=60)
    await fold.apply(log_ms=int(time.time() * 1000) + 1)
    lagging = int(time.time() * 1000) - 61_000
    await fold.client.hset(f"{fold.prefix}m", "log", str(lagging))
    stale = await gates().authorize(ask())
    assert (stale.status, stale.reason) == (503, "stale")
    both = await gates().authorize(Ask("acme", ("acct",), {"calls": 1, "tokens": 5}))
    assert both.allowed
    assert both.staleness_ms is not None
    assert both.staleness_ms >= 61_000


async def test_row_4_a_meter_that_is_not_asked_for_must_not_be_used_up(fold: FoldedLane, gates: Any) -> None:
    """Metered-only tokens at their limit refuse the call that asks for calls."""
    await fold.ready(("acct", "calls", "L", 10), ("acct", "tokens", "L", 100))
    await fold.apply([("acct", "tokens L:0", 99)])
    assert (await gates().authorize(ask())).allowed
    await fold.apply([("acct", "tokens L:0", 100)])
    decision = await gates().authorize(ask())
    assert (decision.status, decision.refused_by.meter) == (402, "tokens")


async def test_row_5_a_partial_grant_is_the_smallest_that_is_left(fold: FoldedLane, gates: Any) -> None:
    """Every scope has the least, some not all: up to the tightest, held in every scope alike."""
    await fold.ready(("acct", "calls", "h", 10), ("user", "calls", "d", 4))
    decision = await gates().authorize(ask((8, 2)))
    assert (decision.allowed, decision.up_to) == (True, {"calls": 4})
    assert (await fold.held(), await fold.held("user:u1")) == (4, 4)


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        (("user", "calls", "h", 2), 429),
        (("user", "calls", "L", 2), 402),
        (("run", "calls", "L", 2), 403),
        (("sess:s1", "calls", "M", 2), 429),
    ],
)
async def test_row_6_too_little_left_is_refused_by_its_kind(
    fold: FoldedLane, gates: Any, limit: Any, status: int
) -> None:
    """A window 429 with its reset, a balance 402, a budget 403; it names the scope with least left; nothing is written."""
    await fold.ready(("acct", "calls", "h", 5), limit)
    scopes = ("acct", "user:u1", "run:r1", "sess:s1")
    before = await fold.keys()
    decision = await gates().authorize(ask((9, 3), *scopes))
    assert (decision.verdict, decision.status, decision.refused_by.left) == ("denied", status, 2)
    assert decision.refused_by.scope in scopes[1:]
    assert await fold.keys() == before
    problem = decision.problem()
    assert (problem["status"], problem["scope"], problem["left"]) == (status, decision.refused_by.scope, 2)
    names = [name for name, _ in decision.headers()]
    assert names == ["RateLimit-Policy", "RateLimit", *(["Retry-After"] if status == 429 else [])]


async def test_row_6_a_closed_run_does_not_start_again_at_zero(fold: FoldedLane, gates: Any) -> None:
    """The fold's mark of a closed run refuses its id, with 403 and its own words."""
    await fold.ready(("run", "calls", "L", 100))
    await fold.apply([("run:r1", "~closed L:0", 1)])
    decision = await gates().authorize(ask(1, "acct", "run:r1"))
    assert (decision.status, decision.reason, decision.refused_by.scope) == (403, "closed", "run:r1")
    assert "start another one" in decision.problem()["detail"]
    assert (await gates().authorize(ask(1, "acct", "run:r2"))).allowed


async def test_row_7_a_grant_says_what_is_held_left_and_until_when(fold: FoldedLane, gates: Any) -> None:
    """All scopes at once; `at` is Redis' time, the hold ends after its ttl, left is what remains behind this call."""
    await fold.ready(("acct", "calls", "h", 10), ("user", "calls", "d", 20))
    decision = await gates().authorize(ask(3, ttl_s=30))
    seconds, micros = await fold.client.time()
    assert decision.hold is not None
    assert 0 <= seconds * 1_000_000 + micros - decision.hold.at_us < 10_000_000
    assert decision.hold.expires_at_ms == decision.hold.at_us // 1000 + 30_000
    assert [(row.scope, row.window, row.left) for row in decision.left] == [("acct", "h", 7), ("user:u1", "d", 17)]
    assert decision.problem() == {}
    assert dict(decision.headers())["RateLimit-Policy"] == '"acct-calls-h";q=10;w=3600, "user-calls-d";q=20;w=86400'


async def test_capture_void_and_extend_end_where_they_should(fold: FoldedLane, gates: Any) -> None:
    """Extend holds more, capture what was used, a second one changes nothing; void frees the call id too."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    first = (await gate.authorize(ask(2, call="c1"))).hold
    longer = await gate.extend(first, {"calls": 6})
    assert (longer.granted, await fold.held()) == (True, 6)
    refused = await gate.extend(first, {"calls": 11})
    assert (refused.granted, refused.reason, await fold.held()) == (False, "deny", 6)
    assert [await gate.capture(longer.hold, {"calls": 4}, emitted()) for _ in range(2)] == ["captured", "captured"]
    assert await gate.capture(longer.hold, {"calls": 4}, emitted(2)) == "conflict"
    assert (await fold.held(), await gate.void(first)) == (4, "captured")
    second = await gate.authorize(ask(2, call="c2"))
    assert (await gate.void(second.hold), await fold.held()) == ("voided", 4)
    assert (await gate.authorize(ask(2, call="c2"))).allowed


async def test_settle_emits_first_and_then_captures(fold: FoldedLane, gates: Any) -> None:
    """The usage names the hold and the grant's time; its close by the fold ends the hold, a later capture is `closed`."""
    await fold.ready(("acct", "calls", "h", 10))
    emitter = Emitter("127.0.0.1:1", durability="memory")
    gate = gates(emitter=emitter)
    decision: Decision = await gate.authorize(ask(5))
    found = await gate.settle(decision, **USAGE_US, quantities={"calls": 3})
    assert (found, await fold.held()) == (Emitted(found.source, lane("acme"), 1), 3)
    failed = await gate.settle(await gate.authorize(ask(5)), **{**USAGE_US, "status": "denied"})
    assert (failed.sequence, await fold.held()) == (2, 3)
    assert decision.hold is not None
    await fold.apply(closes=[decision.hold.id])
    assert await fold.held() == 0
    assert await gate.capture(decision.hold, {"calls": 3}, found) == "closed"


async def test_a_capture_that_redis_does_not_take_is_queued_and_told_later(tmp_path: Path) -> None:
    """Redis dies between grant and capture: the caller goes on, the gate tells it when Redis is back."""
    server = ValkeyServer(tmp_path)
    server.start()
    try:
        server.wait_ready()
        fold = FoldedLane(far.connect(server.url))
        await fold.ready(("acct", "calls", "h", 10))
        async with Gate(server.url, deadline_s=PATIENT_S) as gate:
            decision = await gate.authorize(ask(5))
            await fold.client.config_set("appendfsync", "always")
            await fold.client.incr("last")
            server.kill()
            assert await gate.capture(decision.hold, {"calls": 2}, emitted()) == "queued"
            await fold.client.aclose()
            server.start()
            server.wait_ready()
            fold = FoldedLane(far.connect(server.url))
            await _until_held(fold, 2)
            await until(lambda: gate.stats()["waiting"] == 0, "the gate has heard that it was taken")
        await fold.client.aclose()
    finally:
        server.stop()


async def test_a_flushed_redis_is_cold_until_rewritten_and_told_its_holds(fold: FoldedLane, gates: Any) -> None:
    """FLUSHALL: no grant until the fold has written all; then the open holds are there again, and their number is said."""
    await fold.ready(("acct", "calls", "h", 10))
    gate, other = gates(), gates()
    held = [(await each.authorize(ask(2))).hold for each in (gate, gate, other)]
    assert await gate.capture(held[0], {"calls": 1}, emitted()) == "captured"
    await fold.client.flushdb()
    assert [(await gate.authorize(ask())).reason for _ in range(2)] == ["cold", "cold"]
    await fold.begin()
    await fold.apply(policy=fold.fields([("acct", "calls", "h", 10)]))
    await until(lambda: gate.stats()["restored"] == 2 and other.stats()["restored"] == 1, "holds told again")
    await fold.end()
    assert await fold.held() == 5
    assert [(await gate.authorize(ask(n))).allowed for n in (6, 5)] == [False, True]


async def test_a_grant_stands_while_its_gate_has_yet_to_tell_its_holds(fold: FoldedLane, gates: Any) -> None:
    """A call that was asked before its gate knew the lane is granted after a rewrite: it waits for no re-assertion, its hold is
    remembered, and the keeper tells the older one."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    await gate.authorize(ask(2))
    memory = gate._memory.lane("acme")
    former, memory.gen = memory.gen, ""  # as in a gate's first call
    await fold.client.flushdb()
    await fold.ready(("acct", "calls", "h", 10))
    late = asyncio.create_task(gate.authorize(ask(3)))
    await asyncio.sleep(0)  # it is packed
    memory.gen = former  # another call's answer came first
    decision = await late
    assert (decision.allowed, gate.stats()["open"]) == (True, 2)
    await until(lambda: gate.stats()["restored"] == 1, "the older hold is told")
    assert await fold.held() == 5


async def test_an_older_copy_of_redis_is_noticed_by_the_first_gate_that_misses_a_write(
    fold: FoldedLane, gates: Any
) -> None:
    """A snapshot without an acknowledged hold comes back: the gate marks the lane COLD, and its hold is told again."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    await gate.authorize(ask(2))
    older = await fold.keys()
    lost = await gate.authorize(ask(7))
    await fold.restore(older)
    assert await fold.held() == 2
    assert (await gate.authorize(ask())).reason == "cold"
    assert (await fold.held(), gate.stats()["restored"]) == (9, 1)
    await fold.begin()
    await fold.apply()
    await fold.end()
    assert [(await gate.authorize(ask(n))).allowed for n in (2, 1)] == [False, True]
    assert lost.allowed


async def test_a_stopped_fold_makes_the_gate_stricter_never_looser(fold: FoldedLane, gates: Any) -> None:
    """Log time stands: holds far past their time stay held, captured usage stays counted; what goes on frees them."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates(grace_s=0)
    open_one = (await gate.authorize(ask(4, ttl_s=1))).hold
    used = (await gate.authorize(ask(3))).hold
    await gate.capture(used, {"calls": 3}, emitted())
    await fold.sweep()
    assert await fold.held() == 7
    assert not (await gate.authorize(ask(4))).allowed
    await fold.apply(log_ms=open_one.expires_at_ms)
    assert (await fold.sweep()).unsettled == [open_one.id]
    assert (await fold.held(), (await gate.authorize(ask(4))).allowed) == (3, True)
    await fold.apply(log_ms=open_one.expires_at_ms + 60_000)
    assert (used.id, emitted().source, 1) in (await fold.sweep()).asked


async def test_a_late_capture_of_an_expired_hold_counts(fold: FoldedLane, gates: Any) -> None:
    """The money was spent: after expiry the actual is held again, also beyond the limit, until its usage is folded."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates(grace_s=0)
    hold = (await gate.authorize(ask(8, ttl_s=1))).hold
    await fold.apply(log_ms=hold.expires_at_ms)
    await fold.sweep()
    assert (await gate.authorize(ask(9))).allowed
    assert await gate.capture(hold, {"calls": 6}, emitted()) == "late"
    assert (await fold.held(), gate.stats()["late"]) == (15, 1)


async def test_a_services_clock_wrong_by_an_hour_changes_nothing(fold: FoldedLane, gates: Any) -> None:
    """Windows, expiry and `at` are Redis' time: nothing double, nothing dodged."""
    await fold.ready(("acct", "calls", "h", 10))
    wrong = gates(clock_ms=lambda: int(time.time() * 1000) + 3_600_000)
    right = gates()
    one, two = await wrong.authorize(ask(4)), await right.authorize(ask(4))
    assert [row.start_s for row in one.left] == [row.start_s for row in two.left]
    assert abs(one.hold.at_us - two.hold.at_us) < 60_000_000
    assert not (await wrong.authorize(ask(4))).allowed


async def test_scopes_beyond_the_bound_share_one(fold: FoldedLane, gates: Any) -> None:
    """A full account: a scope that has no fields yet is held in `other~`, together with all such; known ones stay."""
    await fold.ready(("acct", "calls", "h", 100), ("user", "calls", "h", 5))
    gate = gates()
    assert (await gate.authorize(ask(2, "acct", "user:u1"))).allowed
    await fold.apply(policy=fold.fields([("acct", "calls", "h", 100), ("user", "calls", "h", 5)], full=True))
    assert [(await gate.authorize(ask(3, "acct", f"user:{u}"))).allowed for u in ("u1", "new1", "new2")] == [
        True, True, False,
    ]  # fmt: skip
    assert (await fold.held("user:u1"), await fold.held("other~"), await fold.held("user:new1")) == (5, 3, 0)


async def test_open_holds_beyond_the_memory_are_not_granted(fold: FoldedLane, gates: Any) -> None:
    """A gate that cannot remember a hold could not tell it again: it takes none, and says so."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates(holds_max=2)
    assert [(await gate.authorize(ask())).reason for _ in range(3)] == ["", "", "busy"]


async def test_what_the_account_did_is_forgotten_only_when_folded(fold: FoldedLane, gates: Any) -> None:
    """Voided holds leave the memory at once, captured ones stay until their usage stands behind the lane's offset."""
    await fold.ready(("acct", "calls", "h", 10))
    gate = gates()
    first, second = [(await gate.authorize(ask())).hold for _ in range(2)]
    await gate.void(first)
    await gate.capture(second, {"calls": 1}, emitted())
    assert gate.stats()["open"] == 1


def test_scopes_are_those_that_the_fold_counts() -> None:
    """Account, principal by kind, agent, session and run, in the fold's words."""
    assert scopes_of("anonymous", "web:3", agent="a", session="s", run="r") == (
        "acct", "anon:web:3", "agent:a", "sess:s", "run:r",
    )  # fmt: skip
