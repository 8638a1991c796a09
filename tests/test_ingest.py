"""HTTP ingest: what is answered `accepted` is in the log once; everything else is refused by name, and nothing is lost."""

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.ingest_site import PARTITIONS, SECRET, Edge, Site, edge_of, event
from tests.issuer import Issuer, issuing
from tollway.connectors.cloudevents import BATCH
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.ingest import BODY_BYTES_MAX, EVENTS_MAX
from tollway.streams.bootstrap import create
from tollway.streams.settings import Settings

DEADLINE_S = 60
FUZZED = 40


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with issuing() as found:
        yield found


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as found:
        yield found


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, broker: KafkaBroker, valkey: ValkeyServer, issuer: Issuer
) -> Iterator[Site]:
    data = tmp_path_factory.mktemp("ingest")
    made = Settings(data=data, kafka_bootstrap=broker.bootstrap, partitions=PARTITIONS, replication=1)
    done = asyncio.run(create(made))
    found = Site(data, broker.bootstrap, valkey.url, issuer, done["epoch"])

    async def prepare() -> None:
        await found.tell("acme", "account.open", {})
        await found.tell("acme", "customer.bind", {"customer": "cus_acme"})
        await found.bind("svc", "narrow", operations=())
        await found.bind("narrow", operations=("chat",))

    asyncio.run(prepare())
    return found


@pytest.fixture
async def edge(site: Site) -> AsyncIterator[Edge]:
    await site.bind("svc")
    await site.bind("narrow", operations=("chat",))
    async with edge_of(site) as found:
        yield found


async def verdicts_of(edge: Edge, *ids: str) -> list[tuple[str, str]]:
    """(verdict, reason) of the usage whose attribute `team` is one of these, in the log's order."""
    return [
        (verdict, reason)
        for what, verdict, reason, found in await edge.site.verdicts()
        if what == "usage" and dict(found["attributes"] or {}).get("team") in ids
    ]


async def test_an_accepted_event_is_in_the_log_and_a_repeat_counts_once(edge: Edge) -> None:
    """202 means that the broker has it and admission takes it; sent again, even through another edge, it is a duplicate."""
    one = event(attributes={"team": "once"}, quantities={"tokens": 10**12})
    status, found, _ = await edge.post(one)
    assert (status, found) == (202, {"id": one["id"], "source": "/svc", "status": "accepted"})
    assert (await edge.post([one]))[0] == 202
    async with edge_of(edge.site) as other:
        assert (await other.post(one))[0] == 202
    assert await verdicts_of(edge, "once") == [("accepted", ""), ("duplicate", ""), ("duplicate", "")]


async def test_a_batch_is_answered_event_by_event(edge: Edge) -> None:
    """What can be taken is, what cannot is named with field and reason, in the order of the batch."""
    good, bad = event(attributes={"team": "mixed"}), event(quantities={"tokens": -1})
    status, found, _ = await edge.post([good, bad, 7, event(attributes={"team": "mixed"})])
    assert status == 207
    assert [(row["status"], row.get("reason"), row.get("field")) for row in found["results"]] == [
        ("accepted", None, None),
        ("refused", "negative", "quantities.tokens"),
        ("refused", "bad_event", "event"),
        ("accepted", None, None),
    ]
    assert await verdicts_of(edge, "mixed") == [("accepted", "")] * 2
    assert (await edge.post([bad]))[0] == 422
    assert (await edge.post(bad))[0] == 422
    assert (await edge.post([]))[0] == 202


async def test_a_token_reports_its_account_and_its_operations_alone(edge: Edge) -> None:
    """Another account's usage, an operation that the binding does not name, and a foreign attribute are refused."""
    for data, reason in (
        ({"account": "other"}, "other_account"),
        ({"operation": "delete"}, "forbidden_operation"),
        ({"attributes": {"prompt": "x"}}, "forbidden_attribute"),
        ({"hold": "h1"}, "unknown_field"),
    ):
        token = f"Bearer {edge.site.token('narrow')}"
        status, found, _ = await edge.post(event(**data), Authorization=token)
        assert (status, found["reason"]) == (422, reason)


@pytest.mark.parametrize(
    ("subject", "claims", "status"),
    [("", {}, 401), ("svc", {"exp": 1}, 401), ("svc", {"aud": "other"}, 401), ("stranger", {}, 403)],
)
async def test_who_may_not_record_is_told(edge: Edge, subject: str, claims: dict[str, Any], status: int) -> None:
    """No token, an expired one, one for another service and one bound to no account are problems, and record nothing."""
    token = f"Bearer {edge.site.token(subject, **claims)}" if subject else ""
    found, problem, headers = await edge.post(event(), Authorization=token)
    assert (found, problem["status"], headers["content-type"]) == (status, status, "application/problem+json")


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"x" * (BODY_BYTES_MAX + 1), "", 413, "too_large"),
        (b"[" + b"0," * EVENTS_MAX + b"0]", BATCH, 400, "too_many_events"),
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"{}", BATCH, 400, "bad_batch"),
        (b"[" * 9_000, BATCH, 400, "bad_json"),
        (b'{"id": NaN}', "", 400, "bad_json"),
    ],
)
async def test_a_request_beyond_its_bounds_is_refused_whole(
    edge: Edge, body: bytes, kind: str, status: int, reason: str
) -> None:
    """Size, number, type and form of a body are each a problem of their own."""
    found, problem, _ = await edge.post(body, kind)
    assert (found, problem["title"]) == (status, reason)


async def test_while_the_broker_is_silent_nothing_is_accepted_and_nothing_is_lost(
    edge: Edge, broker: KafkaBroker
) -> None:
    """At the deadline the answer is 503, beyond the bound 429, both with Retry-After; repeated later, all count once."""
    edge.ingest.deadline_s, edge.ingest.waiting_max = 1.0, 3
    events = [event(attributes={"team": "silent"}) for _ in range(3)]
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        waiting = asyncio.create_task(edge.post(events))
        async with asyncio.timeout(DEADLINE_S):
            while edge.ingest.waiting < 3:
                await asyncio.sleep(0.01)
        status, problem, headers = await edge.post(event())
        assert (status, problem["title"], headers["Retry-After"]) == (429, "busy", "1")
        status, found, headers = await waiting
        assert (status, {row["status"] for row in found["results"]}) == (503, {"unavailable"})
        assert headers["Retry-After"] == "1"
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    edge.ingest.deadline_s = 30.0
    assert (await edge.post(events))[0] == 202
    taken = [verdict for verdict, _ in await verdicts_of(edge, "silent")]
    assert taken.count("accepted") == 3


DISPUTE = {
    "id": "evt_1", "type": "charge.dispute.created", "created": 1_800_000_000,
    "data": {"object": {"object": "dispute", "id": "dp_1", "customer": "cus_acme", "amount": 500}},
}  # fmt: skip


async def commands(edge: Edge) -> list[tuple[str, Any]]:
    return [(verdict, found) for what, verdict, _, found in await edge.site.verdicts() if what == "command"]


async def test_a_webhook_becomes_a_signed_command_once(edge: Edge) -> None:
    """The delivery stands in the customer's account under its own id; a second delivery is a duplicate."""
    before = len(await commands(edge))
    for _ in range(2):
        status, found = await edge.deliver(DISPUTE)
        assert (status, found["account"]) == (200, "acme")
    after = await commands(edge)
    new = [pair for pair in after if pair[1] is None or pair[1]["kind"] == "rail.event"]
    assert len(after) == before + 2
    assert [verdict for verdict, _ in new][-2:] == ["accepted", "duplicate"]
    (body,) = [found["body"] for _, found in new if found and found["command_id"] == "stripe-evt_1"]
    assert (body["type"], body["customer"], body["object"]["amount"]) == ("charge.dispute.created", "cus_acme", 500)


async def test_a_webhook_of_no_customer_is_everybodys_and_of_a_strangers_nobodys(edge: Edge) -> None:
    """An error report of a meter is in every partition; what concerns a customer that is not bound is answered, not kept."""
    report = {"id": "evt_2", "type": "v1.billing.meter.error_report_triggered", "created": 1, "data": {"reason": {}}}
    assert await edge.deliver(report) == (200, {"status": "recorded", "account": "*", "partitions": PARTITIONS})
    stranger = {**DISPUTE, "id": "evt_3", "data": {"object": {"customer": "cus_other"}}}
    status, found = await edge.deliver(stranger)
    assert (status, found["status"]) == (200, "ignored")


@pytest.mark.parametrize(
    ("delivery", "secret", "ago_s", "reason"),
    [
        (DISPUTE, "whsec_other", 0, "bad_signature"),
        (DISPUTE, SECRET, 301, "bad_signature"),
        ({**DISPUTE, "id": ""}, SECRET, 0, "bad_event"),
        ({**DISPUTE, "created": "now"}, SECRET, 0, "bad_event"),
        ([], SECRET, 0, "bad_event"),
    ],
)
async def test_a_delivery_that_is_not_stripes_is_refused(
    edge: Edge, delivery: Any, secret: str, ago_s: int, reason: str
) -> None:
    """Another secret, an old signature and what is no event are 400, and nothing is written."""
    before = len(await commands(edge))
    status, problem = await edge.deliver(delivery, secret, ago_s)
    assert (status, problem["title"]) == (400, reason)
    assert len(await commands(edge)) == before


@contextmanager
def launch(site: Site, **env: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-m", "tollway.streams.cli", "ingest"],
        env={**os.environ, **site.env, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_told_to_stop(site: Site) -> None:
    """`tollway ingest` says where it listens, answers, and ends at SIGTERM without an error."""
    with launch(site) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1/events")
        with urllib.request.urlopen(f"{url}/health", timeout=DEADLINE_S) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, "Traceback" in errors) == (0, False)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"TOLLWAY_INGEST_ISSUER": ""}, "TOLLWAY_INGEST_ISSUER is empty"),
        ({"TOLLWAY_INGEST_JWKS_URL": "keys"}, "TOLLWAY_INGEST_JWKS_URL is 'keys'"),
        ({"TOLLWAY_DATA": "/nowhere"}, "no signing key at /nowhere/control.key"),
    ],
)
def test_a_wrong_setting_is_one_sentence(site: Site, env: dict[str, str], said: str) -> None:
    """Without the settings that say who may record, it does not start, and says which."""
    with launch(site, **env) as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert said in errors
    assert "Traceback" not in errors


BUT = [positive_data_acceptance]
"""Not held to: the document cannot say which attributes, accounts and pairs of money fields are taken."""


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_sent_is_answered_as_documented(site: Site, mode: GenerationMode) -> None:
    """Fuzzed by its own document, the edge never fails, and answers with the documented codes, types and shapes."""
    asyncio.run(site.bind("svc"))
    with launch(site) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1/events")
        api = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operation = api["/v1/events"]["POST"]
        answered = set()

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=FUZZED, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def fuzzed(case: Any) -> None:
            for sent in case.body if isinstance(case.body, list) else [case.body]:
                if mode is GenerationMode.POSITIVE:
                    sent["time"] = event()["time"]
            token = {"Authorization": f"Bearer {site.token()}"}
            answered.add(case.call_and_validate(headers=token, excluded_checks=BUT).status_code)

        fuzzed()
    assert (202 if mode is GenerationMode.POSITIVE else 422) in answered
