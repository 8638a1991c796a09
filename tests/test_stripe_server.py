"""The Stripe stand-in refuses what Stripe refuses, and forgets nothing."""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import stripe

from tests.stripe_standin import T0, Billed, Standin, customer_of, kind, number, post
from tollway.connectors.embedded.process import free_port, poll
from tollway.connectors.embedded.stripe_server import MODULE
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.stripe import Delivered, Duplicate, StripePort

DAY_S = 86_400


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("standin")) as server:
        server.set_clock(T0)
        yield server


@pytest.fixture
def standin(running: Standin) -> Iterator[Standin]:
    """One server for the module; every test brings its own customers and identifiers."""
    yield running
    running.heal()


@pytest.fixture
async def billed(standin: Standin) -> AsyncIterator[Billed]:
    async with customer_of(standin) as made:
        yield made


@pytest.fixture
async def client(standin: Standin) -> AsyncIterator[stripe.StripeClient]:
    """Stripe's client as anybody would make it."""
    http = stripe.AIOHTTPClient()
    yield stripe.StripeClient(standin.key, base_addresses={"api": standin.url}, http_client=http)
    await http.close_async()


async def test_units_arrive_once_and_are_in_their_hour(standin: Standin, billed: Billed) -> None:
    """What is delivered is listed with its own value, and the hour of its timestamp counts it."""
    now_s = standin.now_s()
    assert await billed.send("a", 5, now_s) == Delivered()
    assert await billed.send("b", 7, now_s - 3600) == Delivered()
    assert [
        (event["value"], event["timestamp"], event["received_at"]) for event in standin.events(billed.customer)
    ] == [
        ("5", now_s, now_s),
        ("7", now_s - 3600, now_s),
    ]
    assert (await billed.hour(now_s), await billed.hour(now_s - 3600), await billed.hour(now_s - 7200)) == (5, 7, 0)


async def test_an_identifier_is_refused_for_24_hours_and_then_taken_again(standin: Standin, billed: Billed) -> None:
    """The second event of an identifier is a 400 with Stripe's words; a day later it is accepted, as the real one does."""
    now_s = standin.now_s()
    assert await billed.send("a", 5, now_s) == Delivered()
    again = await billed.send("a", 6, now_s)
    assert isinstance(again, Duplicate)
    assert "An event already exists with identifier" in again.reason
    standin.advance(DAY_S - 1)
    assert kind(await billed.send("a", 5, now_s)) == "Duplicate"
    standin.advance(1)
    assert await billed.send("a", 5, now_s) == Delivered()
    assert await billed.hour(now_s) == 10


@pytest.mark.parametrize(
    ("offset_s", "expected"),
    [(-35 * DAY_S, "Delivered"), (-35 * DAY_S - 1, "Rejected"), (300, "Delivered"), (301, "Rejected")],
)
async def test_timestamps_reach_35_days_back_and_5_minutes_ahead(
    standin: Standin, billed: Billed, offset_s: int, expected: str
) -> None:
    """The bounds of a meter event's timestamp are Stripe's, to the second."""
    assert kind(await billed.send("a", 1, standin.now_s() + offset_s)) == expected


@pytest.mark.parametrize(
    ("value", "status"),
    [("999999999999999", 200), ("1000000000000000", 400), ("-3", 200), ("1.5", 400), ("", 400), ("１", 400)],
)
def test_values_are_whole_numbers_of_at_most_15_digits(standin: Standin, value: str, status: int) -> None:
    """Fractions, blanks and a 16th digit are refused; a negative number is not."""
    fields = {"event_name": "any", "payload[stripe_customer_id]": "cus_any", "payload[value]": value}
    assert post(standin, "/v1/billing/meter_events", fields)[0] == status


async def test_unknown_customers_and_meters_are_accepted_reported_and_not_counted(
    standin: Standin, billed: Billed
) -> None:
    """As at Stripe, these are found out later: the answer is 200, an error report follows, no summary has the units."""
    strangers = Billed(billed.port, f"cus_nobody_{number()}", billed.event_name)
    nameless = Billed(billed.port, billed.customer, f"no_meter_{number()}")
    assert [await strangers.send("a"), await nameless.send("b")] == [Delivered(), Delivered()]
    reports = {report["identifier"]: report["error"] for report in standin.admin("error_reports")["data"]}
    assert reports[f"{strangers.customer}-a"] == "meter_event_customer_not_found"
    assert reports[f"{nameless.customer}-b"] == "no_meter"
    assert (await strangers.hour(), await billed.hour()) == (0, 0)


async def test_one_call_at_a_time_for_each_customer_and_meter(standin: Standin, billed: Billed) -> None:
    """Of two calls at once for one pair one is told to come back; another customer is served meanwhile."""
    other = Billed(billed.port, f"cus_other_{number()}", billed.event_name)
    standin.admin("settings", {"latency_ms": 300})
    outcomes = await asyncio.gather(billed.send("a"), billed.send("b"), other.send("c"))
    assert sorted(map(kind, outcomes[:2])) == ["Delivered", "Retry"]
    assert outcomes[2] == Delivered()
    assert len(standin.events(billed.customer)) == 1


def test_an_idempotency_key_answers_twice_and_acts_once(standin: Standin) -> None:
    """The same key and parameters get the first answer again; other parameters are an idempotency error."""
    key = {"Idempotency-Key": f"k{number()}"}
    customer = f"cus_{number()}"
    fields = {"event_name": "any", "payload[stripe_customer_id]": customer, "payload[value]": "3"}
    first = post(standin, "/v1/billing/meter_events", fields, key)
    second = post(standin, "/v1/billing/meter_events", fields, key)
    assert (first[0], second[0]) == (200, 200)
    assert first[1] == second[1]
    assert second[2]["Idempotent-Replayed"] == "true"
    status, body, _ = post(standin, "/v1/billing/meter_events", {**fields, "payload[value]": "4"}, key)
    assert (status, body["error"]["type"]) == (400, "idempotency_error")
    assert [event["value"] for event in standin.events(customer)] == ["3"]
    standin.advance(DAY_S)
    assert post(standin, "/v1/billing/meter_events", fields, key)[2].get("Idempotent-Replayed") is None


async def test_while_away_nothing_is_answered(standin: Standin, billed: Billed) -> None:
    """Away until a time of its own clock: sends are unknown, reads unavailable; then all is as before."""
    standin.admin("away", {"for_s": 60})
    assert kind(await billed.send("a")) == "Unknown"
    with pytest.raises(Unavailable):
        await billed.hour()
    standin.advance(60)
    assert await billed.send("a") == Delivered()


async def test_summaries_come_late_and_on_their_grid(standin: Standin, billed: Billed) -> None:
    """With a delay an event is counted only after it; times off the grid are refused; hours come one by one."""
    now_s = standin.now_s() // 3600 * 3600 + 3600
    standin.set_clock(now_s)
    standin.admin("settings", {"summary_delay_s": 100})
    await billed.send("a", 5, now_s)
    await billed.send("b", 7, now_s - 3600)
    assert await billed.hour(now_s) == 0
    standin.advance(99)
    assert await billed.hour(now_s) == 0
    standin.advance(1)
    assert await billed.port.summaries(billed.event_name, billed.customer, now_s - 7200, now_s + 3600) == {
        now_s: 5,
        now_s - 3600: 7,
    }
    with pytest.raises(Refused, match="aligned with hour"):
        await billed.port.summary(billed.event_name, billed.customer, now_s + 60)


async def test_pages_follow_each_other_without_overlap(client: stripe.StripeClient) -> None:
    """A list is newest first, in pages of at most `limit`, each item once."""
    made = [(await client.v1.customers.create_async({"name": str(at), "email": "p@x"})).id for at in range(5)]
    page = await client.v1.customers.list_async({"email": "p@x", "limit": 2})
    assert (len(page.data), page.has_more) == (2, True)
    assert [row.id async for row in page.auto_paging_iter()] == made[::-1]


async def test_meters_aggregate_by_their_formula(standin: Standin, client: stripe.StripeClient) -> None:
    """count, last and pre-aggregated windows give other numbers than the sum of what was sent: why they are refused."""
    customer = await client.v1.customers.create_async({"name": "formulas"})
    now_s = standin.now_s() // 3600 * 3600
    found = {}
    for formula, window in (("sum", None), ("count", None), ("last", None), ("sum", "hour")):
        name = f"{formula}_{window}_{number()}"
        params: dict[str, Any] = {"display_name": name, "event_name": name, "default_aggregation": {"formula": formula}}
        meter = await client.v1.billing.meters.create_async(
            {**params, **({"event_time_window": window} if window else {})}
        )
        for units in (5, 9, 7):
            payload = {"stripe_customer_id": customer.id, "value": str(units)}
            await client.v1.billing.meter_events.create_async(
                {"event_name": name, "payload": payload, "timestamp": now_s}
            )
        span = {"customer": customer.id, "start_time": now_s, "end_time": now_s + 60}
        page = await client.v1.billing.meters.event_summaries.list_async(meter.id, span)
        found[formula, window] = page.data[0].aggregated_value
    assert found == {("sum", None): 21, ("count", None): 3, ("last", None): 7, ("sum", "hour"): 7}


async def test_meters_are_made_once_renamed_and_retired(standin: Standin, client: stripe.StripeClient) -> None:
    """One active meter an event name; a name can change, a retired meter takes no events, and can come back."""
    name = f"life_{number()}"
    params: dict[str, Any] = {"display_name": "A", "event_name": name, "default_aggregation": {"formula": "sum"}}
    meter = await client.v1.billing.meters.create_async(params)
    with pytest.raises(stripe.InvalidRequestError, match="already an active meter"):
        await client.v1.billing.meters.create_async(params)
    assert (await client.v1.billing.meters.update_async(meter.id, {"display_name": "B"})).display_name == "B"
    assert (await client.v1.billing.meters.deactivate_async(meter.id)).status == "inactive"
    event = {"event_name": name, "payload": {"stripe_customer_id": "cus_x", "value": "1"}, "identifier": name}
    await client.v1.billing.meter_events.create_async(event)
    assert standin.admin("error_reports")["data"][-1]["error"] == "no_meter"
    assert name not in [
        row.event_name for row in (await client.v1.billing.meters.list_async({"status": "active"})).data
    ]
    assert (await client.v1.billing.meters.reactivate_async(meter.id)).status == "active"
    assert (await client.v1.billing.meters.retrieve_async(meter.id)).display_name == "B"


async def test_an_event_can_be_cancelled_within_24_hours(
    standin: Standin, billed: Billed, client: stripe.StripeClient
) -> None:
    """A cancelled event is in no summary any more; after a day it cannot be cancelled."""
    now_s = standin.now_s()
    await billed.send("a", 5, now_s)
    await billed.send("b", 7, now_s)
    cancel = {"event_name": billed.event_name, "type": "cancel", "cancel": {"identifier": f"{billed.customer}-a"}}
    done = await client.v1.billing.meter_event_adjustments.create_async(cancel)
    assert (done.status, await billed.hour(now_s)) == ("complete", 7)
    standin.advance(DAY_S + 1)
    cancel["cancel"] = {"identifier": f"{billed.customer}-b"}
    with pytest.raises(stripe.InvalidRequestError, match="within 24 hours"):
        await client.v1.billing.meter_event_adjustments.create_async(cancel)
    assert await billed.hour(now_s) == 7


async def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    """Killed while sixteen callers send, it has every delivered event afterwards, its clock, its meters and settings."""
    with Standin(tmp_path) as server:
        server.set_clock(T0)
        port = StripePort(server.key, server.url, timeout_s=5)
        await port.ensure_meter("m")
        customer = await port.ensure_customer("c")
        server.admin("settings", {"summary_delay_s": 7})
        delivered: set[str] = set()
        enough = asyncio.Event()

        async def caller(name: int) -> None:
            for count in range(1_000):
                identifier = f"{name}-{count}"
                # A pair of its own for each caller; the first has a customer that exists.
                outcome = await port.send(identifier, "m", customer if name == 0 else f"cus_{name}", 1, T0)
                if outcome != Delivered():
                    return
                delivered.add(identifier)
                if len(delivered) >= 200:
                    enough.set()

        callers = [asyncio.create_task(caller(name)) for name in range(16)]
        await asyncio.wait_for(enough.wait(), 30)
        server.kill()
        await asyncio.gather(*callers)
        server.start()
        server.wait_ready()
        kept = {event["identifier"] for event in server.events()}
        assert delivered <= kept
        assert len(kept - delivered) <= 16
        assert server.now_s() == T0
        assert kind(await port.send("0-0", "m", customer, 1, T0)) == "Duplicate"
        assert server.admin("settings", {})["summary_delay_s"] == 7
        server.advance(7)
        assert await port.summary("m", customer, T0) == sum(identifier.startswith("0-") for identifier in kept)
        await port.close()


async def test_what_a_crash_cut_off_is_dropped_and_damage_is_not(tmp_path: Path) -> None:
    """Half a last line was answered to nobody and goes; a broken line before it stops the start with one sentence."""
    server = Standin(tmp_path)
    with server:
        port = StripePort(server.key, server.url)
        assert await port.send("whole", "m", "c", 1, server.now_s()) == Delivered()
        await port.close()
    journal = tmp_path / "stripe" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'[{"kind":"event","identifier":"half')
    with Standin(tmp_path) as server:
        assert [event["identifier"] for event in server.events()] == ["whole"]
    assert b"half" not in journal.read_bytes()
    journal.write_bytes(b"[{]\n" + journal.read_bytes())
    ended = command("--port", str(free_port()), "--data", str(tmp_path / "stripe"))
    assert ended.returncode == 1
    assert re.fullmatch(r".*line 1 is damaged: .*\n", ended.stderr)


async def test_its_clock_runs_as_fast_as_it_is_told(tmp_path: Path) -> None:
    """A day passes in moments at a high rate, and a restart keeps time and rate."""
    server = Standin(tmp_path)
    with server:
        server.admin("clock", {"set_s": T0, "rate": 100_000})
        for _ in poll(20):
            if server.now_s() >= T0 + DAY_S:
                break
        assert server.now_s() >= T0 + DAY_S
        server.admin("clock", {"set_s": T0, "rate": 0})
    with Standin(tmp_path) as server:
        assert server.now_s() == T0


def test_a_port_or_folder_in_use_is_one_clear_sentence(standin: Standin, tmp_path: Path) -> None:
    """A second server on the same port or folder ends with 1 and says what to change."""
    folder = command("--port", str(free_port()), "--data", str(standin.data / "stripe"))
    assert folder.returncode == 1
    assert re.fullmatch(r"\S+journal.jsonl is in use by another server: .*--data.*\n", folder.stderr)
    port = command("--port", str(standin.port), "--data", str(tmp_path))
    assert port.returncode == 1
    assert re.fullmatch(rf"port {standin.port} cannot be used .*--port\n", port.stderr)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", MODULE, *arguments], capture_output=True, text=True, timeout=30)
