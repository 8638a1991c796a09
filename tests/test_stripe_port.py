"""The port says rightly what happened to a call, reads summaries exactly, and refuses meters that would miscount."""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import stripe

from tests.stripe_standin import T0, Billed, Standin, customer_of, kind, number, post
from tollway.connectors.embedded.process import free_port, poll
from tollway.connectors.errors import Invalid, Refused
from tollway.connectors.stripe import (
    Delivered,
    Duplicate,
    Meter,
    Rejected,
    Retry,
    StripePort,
    Unknown,
    meter_fault,
    outcome,
    whole,
)

STRIPE_MOCK = "github.com/stripe/stripe-mock@v0.203.0"


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


async def test_a_wrong_key_is_told_so_and_nothing_is_taken(standin: Standin, billed: Billed) -> None:
    """Without the right key nothing happens: sending waits for a better key, reading refuses with the cure."""
    wrong = StripePort("sk_test_wrong", standin.url)
    outcome = await wrong.send("x", billed.event_name, billed.customer, 1, T0)
    assert isinstance(outcome, Retry)
    assert "401" in outcome.reason
    with pytest.raises(Refused, match="set one that may"):
        await wrong.meters()
    await wrong.close()
    assert standin.events(billed.customer) == []
    assert post(standin, "/v1/customers", {}, {"Authorization": ""})[0] == 401


async def test_meters_and_customers_are_made_only_once(standin: Standin, billed: Billed) -> None:
    """`ensure_…` finds what is there, also after a restart of the caller."""
    name = f"ensured_{number()}"
    meter, customer = await billed.port.ensure_meter(name), await billed.port.ensure_customer(name)
    standin.advance(2 * 86_400)  # past Stripe's idempotency keys
    later = StripePort(standin.key, standin.url)
    assert (await later.ensure_meter(name), await later.ensure_customer(name)) == (meter, customer)
    await later.close()


GOOD = Meter("mtr_1", "calls", "sum", None, "active", False, "stripe_customer_id", "value")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"formula": "count"}, "formula is count"),
        ({"formula": "last"}, "formula is last"),
        ({"event_time_window": "hour"}, "pre-aggregated by hour"),
        ({"status": "inactive"}, "inactive: reactivate"),
        ({"live": True}, "live meter"),
        ({"customer_key": "user"}, "payload keys"),
        ({"value_key": "tokens"}, "payload keys"),
    ],
)
def test_a_meter_that_would_miscount_is_refused(change: dict[str, Any], fault: str) -> None:
    """Every way in which a meter would not add up our deltas is named with its cure."""
    assert meter_fault(GOOD, live=False) is None
    found = meter_fault(Meter(**{**GOOD.__dict__, **change}), live=False)
    assert found is not None
    assert fault in found


async def test_of_several_meters_with_one_name_the_active_one_counts(standin: Standin, billed: Billed) -> None:
    """A retired meter is passed over for its active successor, and replaced where there is none."""
    retired = await billed.port.ensure_meter(billed.event_name)
    assert post(standin, f"/v1/billing/meters/{retired}/deactivate", {})[0] == 200
    with pytest.raises(Refused, match="inactive"):
        await billed.port.check_meters([billed.event_name], live=False)
    active = await billed.port.ensure_meter(billed.event_name)
    assert (await billed.port.meters())[billed.event_name].meter_id == active != retired
    await billed.port.check_meters([billed.event_name], live=False)
    assert post(standin, f"/v1/billing/meters/{active}/deactivate", {})[0] == 200
    assert post(standin, f"/v1/billing/meters/{retired}/reactivate", {})[0] == 200
    assert (await billed.port.meters())[billed.event_name].meter_id == retired


async def test_the_start_check_reads_the_meters_that_are_there(billed: Billed) -> None:
    """Declared meters pass; one that is not there, or of the other mode, is refused by name."""
    await billed.port.check_meters([billed.event_name], live=False)
    with pytest.raises(Refused, match="Stripe's meter absent: it is not there"):
        await billed.port.check_meters([billed.event_name, "absent"], live=False)
    with pytest.raises(Refused, match=f"{billed.event_name}: it is a test meter"):
        await billed.port.check_meters([billed.event_name], live=True)


def test_a_summary_is_a_whole_number_or_refused() -> None:
    """Stripe's doubles become exact whole numbers up to 2**53; anything else is refused, never rounded."""
    assert [whole(5.0), whole(999_999_999_999_999.0), whole(-3.0)] == [5, 999_999_999_999_999, -3]
    for wrong in (0.5, 2.0**53, float("1e300")):
        with pytest.raises(Invalid):
            whole(wrong)


@pytest.fixture(scope="module")
def stripe_mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Stripe's own mock, which checks requests against Stripe's published schema. Skipped where it cannot be had."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go toolchain in PATH: stripe-mock cannot be built")
    folder = tmp_path_factory.mktemp("stripe-mock")
    built = subprocess.run(
        [go, "install", STRIPE_MOCK],
        env={**os.environ, "GOBIN": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if built.returncode:
        pytest.skip(f"{STRIPE_MOCK} cannot be had: {built.stderr.strip().splitlines()[-1]}")
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([folder / "stripe-mock", "-http-port", str(port)], stdout=log, stderr=log)
    try:
        for _ in poll(20):
            if answers(port):
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_every_request_has_the_shape_that_stripe_publishes(stripe_mock: str) -> None:
    """Stripe's own schema takes all that the port sends, and refuses what has one field too many."""
    port = StripePort("sk_test_123", stripe_mock)
    assert await port.send("i", "calls", "cus_1", 5, T0) == Delivered()
    meters = await port.meters()
    (name,) = meters
    assert await port.ensure_meter(f"{name}_new")
    assert await port.ensure_customer("a1")
    assert isinstance(await port.summaries(name, "cus_1", T0, T0 + 3600), dict)
    await port.close()
    http = stripe.AIOHTTPClient()
    client = stripe.StripeClient("sk_test_123", base_addresses={"api": stripe_mock}, http_client=http)
    event = {"event_name": "calls", "payload": {"value": "1"}, "colour": "red"}
    with pytest.raises(stripe.InvalidRequestError, match="additional properties"):
        await client.v1.billing.meter_events.create_async(event)
    await http.close_async()


def test_every_outcome_of_the_sdk_has_its_meaning() -> None:
    """Only what Stripe surely refused is rejected, only what it surely has not is retried; the rest is unknown."""
    assert outcome(stripe.RateLimitError("slow", headers={"Retry-After": "7"})) == Retry(7, "RateLimitError: slow")
    cases: list[tuple[Exception, type]] = [
        (stripe.RateLimitError("slow"), Retry),
        (stripe.AuthenticationError("key"), Retry),
        (stripe.PermissionError("key"), Retry),
        (stripe.InvalidRequestError("An event already exists with identifier x.", None), Duplicate),
        (stripe.InvalidRequestError("Invalid value", None), Rejected),
        (stripe.InvalidRequestError("No such thing: An event already exists with identifier", None), Rejected),
        (stripe.IdempotencyError("in use"), Unknown),
        (stripe.APIError("oops"), Unknown),
        (stripe.APIConnectionError("gone"), Unknown),
        (TimeoutError(), Unknown),
    ]
    assert [type(outcome(error)) for error, _ in cases] == [expected for _, expected in cases]


@pytest.mark.parametrize(
    ("fault", "outcome", "accepted"),
    [
        ("500", "Unknown", 0),
        ("429", "Retry", 0),
        ("drop", "Unknown", 0),
        ("hang", "Unknown", 0),
        ("accept_500", "Unknown", 1),
        ("accept_drop", "Unknown", 1),
        ("accept_hang", "Unknown", 1),
        ("accept_cut", "Unknown", 1),
    ],
)
async def test_what_a_caller_cannot_know_is_called_unknown(
    standin: Standin, billed: Billed, fault: str, outcome: str, accepted: int
) -> None:
    """Whether it was accepted or not, an unanswered call has one outcome; the next try tells the two apart."""
    impatient = Billed(StripePort(standin.key, standin.url, timeout_s=1), billed.customer, billed.event_name)
    standin.fault(fault)
    assert kind(await impatient.send("a")) == outcome
    assert len(standin.events(billed.customer)) == accepted
    assert kind(await impatient.send("a")) == ("Duplicate" if accepted else "Delivered")
    assert len(standin.events(billed.customer)) == 1
    await impatient.port.close()


async def test_more_hours_than_a_page_are_all_listed(standin: Standin, billed: Billed) -> None:
    """Lists are read to their last page."""
    now_s = standin.now_s() // 3600 * 3600
    hours = [now_s - 3600 * back for back in range(130)]
    for hour_s in hours:
        await billed.send(str(hour_s), 1, hour_s)
    found = await billed.port.summaries(billed.event_name, billed.customer, hours[-1], now_s + 3600)
    assert found == dict.fromkeys(hours, 1)


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
