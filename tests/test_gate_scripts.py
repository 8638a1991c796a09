"""The gate's scripts at the edges: windows, the largest amounts, declared keys, scopes that share one field."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgpack
import pytest
import redis

from tests.gate_lua import Real, authorized, policy_fields, read
from tests.simulation.gate_model import Policy
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.gate_calls import Me, authorize_call, capture_call, extend_call, granted, void_call
from tollway.connectors.gate_decision import Ask, Hold
from tollway.connectors.gate_wire import AUTHORIZE, CAPTURE, EXTEND, VOID
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END
from tollway.schemas.lane import lane, tag

ACCOUNT, NUMBER = "acme", lane("acme")
ME = Me("g1", "", 0, 900_000)
MOST = 9 * 10**18


def at(text: str) -> int:
    """Microseconds since 1970 of a UTC time."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1_000_000)


class Bench:
    """A READY lane with a clock of the test's."""

    def __init__(self, client: Any) -> None:
        self.client, self.real, self.off = client, Real(client, NUMBER), 0

    def ready(self, when: str, full: bool = False, **limits: int) -> None:
        self.real.now_us = at(when)
        gen = self.real.fold(REWRITE_BEGIN, "0-log", self.off)[3]
        named = {name.replace("__", "|"): limit for name, limit in limits.items()}
        self.apply(policies=[policy_fields(ACCOUNT, Policy(1, named, full=full))])
        assert self.real.fold(REWRITE_END, "0-log", gen, self.off)[0] == "OK"

    def apply(self, totals: list[Any] = [], closes: list[str] = [], policies: list[Any] = []) -> None:  # noqa: B006
        self.off += 1
        body = msgpack.packb([totals, [], policies, closes])
        log_ms = self.real.now_us // 1000
        assert self.real.fold(APPLY, "0-log", self.off, f"t{self.off}", 0, "", "", log_ms, body)[0] == "OK"

    def authorize(self, units: Any, *scopes: str, hold: str = "h1", meter: str = "calls") -> tuple[Any, ...]:
        ask = Ask(ACCOUNT, scopes or ("acct",), {meter: units}, call=f"c{hold}")
        return authorized(self.real.run(AUTHORIZE, *authorize_call(ME, ask, ask.call, hold, "")))

    def hold(self, found: tuple[Any, ...]) -> Hold:
        fields = tuple((row[0], row[1], row[5]) for row in found[12])
        return Hold(found[8], ACCOUNT, f"c{found[8]}", found[9], found[10], fields)

    def capture(self, hold: Hold, used: int, meter: str = "calls") -> str:
        return str(self.real.run(CAPTURE, *capture_call(ME, hold, {meter: used}, "5" * 32, 1))[0])

    def fields(self, scope: str = "acct") -> dict[str, int]:
        found = self.client.hgetall(f"{tag(NUMBER)}s:{ACCOUNT}~{scope}")
        return {name.decode(): int(value) for name, value in found.items()}


@pytest.fixture
def bench(valkey: ValkeyServer) -> Iterator[Bench]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as client:
        client.flushdb()
        yield Bench(client)


def test_a_hold_counts_in_the_hour_that_it_named(bench: Bench) -> None:
    """Held at 11:59:59.9, settled at 12:00:01: eleven o'clock's hour has it, twelve o'clock's has all of its limit."""
    bench.ready("2026-03-01 11:59:59.900", acct__calls__h=5)
    hold = bench.hold(bench.authorize(3))
    assert hold.at_us == at("2026-03-01 11:59:59.900")
    bench.real.now_us = at("2026-03-01 12:00:01")
    eleven, noon = (at(f"2026-03-01 {hour}:00") // 1_000_000 for hour in (11, 12))
    assert bench.authorize(6, hold="h2")[0] == "DENY"
    assert bench.authorize(5, hold="h3")[0] == "OK"
    assert bench.capture(hold, 2) == "OK"
    assert bench.fields() == {f"calls h:{eleven} h": 2, f"calls h:{noon} h": 5}
    bench.apply([[f"{ACCOUNT}~acct", f"calls h:{eleven} u", "2"]], [hold.id])
    assert bench.fields() == {f"calls h:{eleven} u": 2, f"calls h:{eleven} h": 0, f"calls h:{noon} h": 5}


@pytest.mark.parametrize(
    ("when", "start", "end"),
    [
        ("2026-01-31 23:59:59.999999", "2026-01-01", "2026-02-01"),
        ("2026-02-01 00:00:00", "2026-02-01", "2026-03-01"),
        ("2028-02-29 12:00:00", "2028-02-01", "2028-03-01"),
        ("2100-02-28 23:59:59", "2100-02-01", "2100-03-01"),
        ("2026-12-31 23:00:00", "2026-12-01", "2027-01-01"),
    ],
)
def test_a_month_is_the_calendars(bench: Bench, when: str, start: str, end: str) -> None:
    """Start and end of the calendar month, UTC, leap years and centuries too."""
    bench.ready(when, acct__calls__M=5)
    row = bench.authorize(1)[12][0]
    assert row[1:3] == (f"calls M:{at(start) // 1_000_000}", at(end) // 1_000_000)


@pytest.mark.parametrize("used", [0, 1, 10**9 - 1, 10**9, 2**53 + 1, MOST - 10**9, MOST - 1])
def test_amounts_are_exact_to_nine_times_ten_to_the_eighteenth(bench: Bench, used: int) -> None:
    """One unit more than is left is refused, what is left is granted, and then nothing is left: no double is in between."""
    bench.ready("2026-03-01", acct__usd__L=MOST)
    bench.apply([[f"{ACCOUNT}~acct", "usd L:0 u", str(used)]])
    left = MOST - used
    refused = bench.authorize(min(left + 1, MOST), meter="usd") if used else None
    assert refused is None or (refused[0], refused[7][4]) == ("DENY", left)
    assert bench.authorize(left, meter="usd", hold="h2")[0] == "OK"
    assert bench.authorize((2, 1), meter="usd", hold="h3")[7][4] == 0
    bench.apply([[f"{ACCOUNT}~acct", "usd L:0 u", str(used + 7)]])
    assert bench.authorize((2, 1), meter="usd", hold="h4")[7][4] == -7


def test_scopes_that_share_a_field_are_held_and_checked_together(bench: Bench) -> None:
    """In a full account two new scopes are one field: each may take its part, both together no more than is left."""
    bench.ready("2026-03-01", full=True, user__calls__L=5, run__calls__L=5)
    assert bench.authorize(3, "user:u1", "run:r1")[0] == "DENY"
    assert bench.authorize(2, "user:u1", "run:r1", hold="h2")[0] == "OK"
    assert bench.fields("other~") == {"calls L:0 h": 4}
    assert bench.authorize(1, "user:u3", hold="h3")[0] == "OK"
    assert bench.authorize(1, "user:u4", hold="h4")[0] == "DENY"


def test_a_lane_full_of_scopes_that_gates_made_takes_no_new_ones(bench: Bench) -> None:
    """Invented runs that never emit are bounded too: beyond the bound they share `other~`."""
    bench.ready("2026-03-01", run__calls__L=3)
    for n in range(5):
        ask = Ask(ACCOUNT, (f"run:r{n}",), {"calls": 1}, call=f"c{n}")
        reply = bench.real.run(AUTHORIZE, *authorize_call(ME, ask, ask.call, f"h{n}", "", scopes_max=2))
        assert reply[0] == "OK"
    assert [len(bench.fields(scope)) for scope in ("run:r0", "run:r1", "run:r2", "other~")] == [1, 1, 0, 1]
    assert bench.client.hget(f"{tag(NUMBER)}n", ACCOUNT) == b"2"


@pytest.mark.parametrize("script", ["capture", "void", "extend"])
def test_a_scope_that_is_not_declared_is_refused_before_anything_is_written(bench: Bench, script: str) -> None:
    """While a cluster slot moves, an undeclared key would leave half a write: the script looks before it writes."""
    bench.ready("2026-03-01", acct__calls__h=5, user__calls__h=5)
    whole = bench.hold(bench.authorize(2, "acct", "user:u1"))
    half = Hold(whole.id, ACCOUNT, whole.call, whole.at_us, whole.expires_at_ms, whole.fields[:1])
    before = read(bench.client, NUMBER)
    if script == "capture":
        found = bench.capture(half, 1)
    elif script == "void":
        found = bench.real.run(VOID, *void_call(half))[0]
    else:
        found = bench.real.run(EXTEND, *extend_call(ME, half, {"calls": 3}, 60))[0]
    assert found == "KEYS"
    assert read(bench.client, NUMBER) == before


def _at(text: str, bench: Bench) -> str:
    """A script whose clock is the bench's."""
    return text.replace("redis.call('TIME')", f"{{'{bench.real.now_us // 1_000_000}', '0'}}")


def test_an_answers_rows_are_read_as_they_were_sent(bench: Bench) -> None:
    """From the script's reply to the values that a caller sees."""
    bench.ready("2026-03-01 10:00:00", acct__calls__h=5, acct__tokens__L=9)
    ask = Ask(ACCOUNT, ("acct",), {"calls": 1, "tokens": (7, 2)}, call="c1")
    keys, arguments = authorize_call(ME, ask, "c1", "h1", "")
    seconds = bench.real.now_us // 1_000_000
    raw = bench.client.eval(_at(AUTHORIZE.text, bench), len(keys), *keys, *arguments)
    found = granted(ask, "c1", raw[7])
    assert (found.hold.id, found.up_to) == ("h1", {"calls": 1, "tokens": 7})
    assert found.hold.fields == ((f"{ACCOUNT}~acct", f"calls h:{seconds}", 1), (f"{ACCOUNT}~acct", "tokens L:0", 7))
    assert [(row.meter, row.left, row.end_s) for row in found.left] == [
        ("calls", 4, seconds + 3_600),
        ("tokens", 2, None),
    ]


@pytest.mark.parametrize("limits", [{}, {"acct__calls__h": 5}])
def test_an_ask_for_nothing_is_read_too(bench: Bench, limits: dict[str, int]) -> None:
    """An empty table has no type in Lua: no amounts and no limits are an empty answer, not an unreadable one."""
    bench.ready("2026-03-01", **limits)
    keys, arguments = authorize_call(ME, Ask(ACCOUNT, ("acct",), {}, call="c1"), "c1", "h1", "")
    raw = bench.client.eval(_at(AUTHORIZE.text, bench), len(keys), *keys, *arguments)
    found = granted(Ask(ACCOUNT, ("acct",), {}, call="c1"), "c1", raw[7])
    assert (found.up_to, found.hold.fields, len(found.left)) == ({}, (), len(limits))


def test_a_call_is_remembered_for_an_hour(bench: Bench) -> None:
    """The call id, and with it the earlier answer, outlives every retry that makes sense: no less than an hour."""
    bench.ready("2026-03-01", acct__calls__h=5)
    bench.authorize(1)
    assert 3_500_000 < bench.client.pttl(f"{tag(NUMBER)}i:{ACCOUNT}~ch1") <= 3_600_000


@pytest.mark.parametrize("text", ["plain", "grün", "", "a\r\nb", 7])
def test_a_call_is_packed_as_redis_reads_it(bench: Bench, text: str | int) -> None:
    """Lengths are of bytes, whatever is sent."""
    packed = AUTHORIZE.pack(["k"], [text])
    data = str(text).encode()
    assert packed.endswith(b"$1\r\n1\r\n$1\r\nk\r\n$%d\r\n%b\r\n" % (len(data), data))
    assert packed.startswith(b"*5\r\n$7\r\nEVALSHA\r\n$40\r\n" + AUTHORIZE.sha.encode())
