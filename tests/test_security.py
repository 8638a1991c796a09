"""TLS, passwords and least rights, on real parts: with the rights of one table every role works, and without one it is told which."""

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka.errors import TopicAuthorizationFailedError
from pydantic import SecretStr

from tests.secured_broker import SecuredBroker, certificates
from tests.secured_site import DEADLINE_S, PARTITIONS, Site, until
from tests.tls_front import TlsFront
from tollway.connectors.control import Signer
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitter
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.kafka import started_producer
from tollway.connectors.redis import APPLY, connect, fly, read_quota
from tollway.connectors.rights import CLICKHOUSE, KAFKA, REDIS, ROLES, KafkaRight, kafka_rights
from tollway.schemas.lane import lane
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, USAGE
from tollway.streams.bootstrap import create
from tollway.streams.control_plane import append_command
from tollway.streams.doctor import examine
from tollway.streams.examination import Finding
from tollway.streams.settings import Settings
from tollway.streams.status import status
from tollway.streams.wiring import audit_store, kafka_admin, stripe_port

EVENTS = 40
OPERATING = Path(__file__).parent.parent / "docs" / "operating.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Every part behind TLS and a password, a user a role, a log made by the control plane, tables."""
    data = tmp_path_factory.mktemp("secured")
    pem = certificates(data / "pem")
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(SecuredBroker(data / "broker"))
        valkey = stack.enter_context(ValkeyServer(data))
        clickhouse = stack.enter_context(ClickHouseServer(data))
        stripe = stack.enter_context(StripeServer(data))
        fronts = [stack.enter_context(TlsFront(port, pem.server)) for port in (valkey.port, clickhouse.port)]
        site = Site(data, broker, pem, valkey, fronts[0], clickhouse, fronts[1], stripe)
        site.make_users()
        asyncio.run(create(site.settings("control")))
        with contextlib.closing(audit_store(site.settings("control"))) as store:
            store.migrate()
        yield site
        for process in site.running.values():
            process.kill()
            process.wait()


def public_key(site: Site) -> str:
    return Signer.read(site.settings("control").data / "control.key").public_key


def faults(findings: list[Finding]) -> list[str]:
    """What is wrong, each with its cure."""
    assert findings
    assert all(bool(finding.cure) != finding.ok for finding in findings)
    return [f"{finding.what}; {finding.cure}" for finding in findings if not finding.ok]


async def told(site: Site, role: str, **changed: Any) -> list[str]:
    """What the doctor finds wrong for a role."""
    settings = site.settings(role, public_key=public_key(site), **changed)
    return faults(await examine(settings, role=role))


async def test_every_role_works_with_its_rights_alone(site: Site) -> None:
    """Usage goes from an emitter over the folds to Redis, ClickHouse and Stripe, each under its own user; the doctor is content."""
    control = site.settings("control")
    port = stripe_port(control)
    await port.ensure_meter("calls")
    customer = await port.ensure_customer("acme")
    for account, kind, body in (
        ("*", "meter.add", {"meter": "calls", "event_name": "calls"}),
        ("acme", "account.open", {}),
        ("acme", "customer.bind", {"customer": customer}),
    ):
        await append_command(control, account, kind, body)
    places = {group: site.start_worker(group, public_key(site)) for group in ("accounts", "audit", "stripe")}
    await asyncio.to_thread(site.wait_healthy, places)
    await _emit(site)
    look = site.settings("look")
    client = connect(look.redis_url.get_secret_value(), ca_file=look.redis_ca_file)
    with contextlib.closing(audit_store(look)) as store:
        await asyncio.to_thread(
            until,
            lambda: store.rows("SELECT count() AS n FROM usage WHERE account = 'acme'")[0]["n"] == EVENTS,
            "ClickHouse does not have all usage",
        )
    end = time.monotonic() + DEADLINE_S
    while not any(row["used"] == EVENTS for row in (await read_quota(client, "acme"))["totals"]):
        assert time.monotonic() < end, "Redis does not have all usage"
        await asyncio.sleep(0.2)
    while not await _at_stripe(port, customer):
        assert time.monotonic() < end, "Stripe does not have all units"
        await asyncio.sleep(0.5)
    for role in ROLES:
        assert await told(site, role) == [], role
    assert (await status(look))["partitions"] == PARTITIONS
    await client.aclose()
    await port.close()
    assert await asyncio.to_thread(site.stop_workers) == {"accounts": 0, "audit": 0, "stripe": 0}


async def _emit(site: Site) -> None:
    security = site.settings("emitter").kafka_security()
    emitter = Emitter(site.broker.bootstrap, spool_dir=site.data / "spool", **security)
    async with emitter:
        for _ in range(EVENTS):
            assert emitter.emit(
                occurred_at=time.time_ns() // 1000,
                surface="rest",
                operation="GET /v1/x",
                account="acme",
                principal_kind="user",
                principal="ada",
                status="ok",
                latency_us=900,
                quantities={"calls": 1},
            )
        assert await emitter.flush(60) == {}


async def _at_stripe(port: Any, customer: str) -> bool:
    hour_s = int(time.time()) // 3600 * 3600
    return (
        await port.summary("calls", customer, hour_s) + await port.summary("calls", customer, hour_s - 3600) == EVENTS
    )


LACKING = [
    ("emitter", KafkaRight("topic", USAGE.name, ("Write",), prefixed=True), "topic usage.events is not there, or this user may not see it"),
    ("accounts", KafkaRight("topic", DEAD_LETTERS.name, ("Write",)), "dead.letters: it is not there, or this user may not see it"),
    ("accounts", KafkaRight("topic", USAGE.name, ("Write",), prefixed=True), "lacks Write on the topic usage.events"),
    ("audit", KafkaRight("topic", USAGE.name, ("DescribeConfigs",), prefixed=True), "the settings of usage.events cannot be read"),
    ("audit", KafkaRight("group", "tollway.audit", ("Read",)), "allow this user Read on the group tollway.audit"),
    ("stripe", KafkaRight("transactional-id", "stripe-", ("Write",), prefixed=True), "lacks Write on the transactional-id"),
    ("stripe", KafkaRight("group", "tollway-folds-", ("Read",), prefixed=True), "allow this user Read on the group tollway-folds-"),
    ("control", KafkaRight("cluster", "kafka-cluster", ("DescribeConfigs",)), "allow this user DescribeConfigs on the cluster"),
    ("control", KafkaRight("topic", USAGE.name, ("AlterConfigs",), prefixed=True), "lacks AlterConfigs on the topic usage.events"),
    ("control", KafkaRight("topic", DEAD_LETTERS.name, ("Alter",)), "lacks Alter on the topic dead.letters"),
    ("look", KafkaRight("topic", CHECKPOINTS.name, ("Read",)), "tollway.checkpoints: it is not there, or this user may not see"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "right", "said"), LACKING, ids=[f"{row[0]} {row[1].kind} {row[1].name}" for row in LACKING]
)
async def test_a_right_that_is_taken_away(site: Site, role: str, right: KafkaRight, said: str) -> None:
    """Each right of the table is needed: without it the doctor names it, with the cure; given back, all is well."""
    (operation,) = right.operations
    assert any(each.name == right.name and operation in each.operations for each in KAFKA[role])
    await asyncio.to_thread(site.broker.forbid, role, right, operation)
    try:
        found = await told(site, role)
    finally:
        await asyncio.to_thread(site.broker.allow, role, [right])
    assert any(said in fault for fault in found), found


async def test_who_may_not_write_cannot(site: Site) -> None:
    """The rights are enforced, not only listed: who looks cannot append to the log, nor an emitter make a topic."""
    with pytest.raises(Refused, match=r"may not write to Kafka at .* allow it Write on its topics"):
        await started_producer(site.broker.bootstrap, site.settings("look").kafka_security())
    producer = await started_producer(site.broker.bootstrap, site.settings("emitter").kafka_security())
    try:
        with pytest.raises(TopicAuthorizationFailedError):
            await producer.send_and_wait(CHECKPOINTS.name, b"x", key=b"x", partition=0)
    finally:
        await producer.stop()
    with pytest.raises(Refused, match="allow this user Create on"):
        await kafka_admin(site.settings("emitter")).create(PARTITIONS, 1)


async def test_the_rights_are_enough_to_grow(site: Site) -> None:
    """Control may close the log for usage and widen what follows it; everybody's rights hold for the next log too."""
    admin = kafka_admin(site.settings("control"))
    limit = (await admin.settings_of(USAGE.name))["max.message.bytes"]
    await admin.set(USAGE.name, "max.message.bytes", limit)
    for topic in (CHECKPOINTS.name, DEAD_LETTERS.name):
        with pytest.raises(Refused, match="INVALID_PARTITIONS"):  # it may; as many as there are is what cannot be
            await admin.widen(topic, PARTITIONS)
    for role, rights in KAFKA.items():
        assert all(right.prefixed for right in rights if right.name == USAGE.name), role


WRONG = [
    ("kafka", {"kafka_sasl_password": SecretStr("wrong")}, "invalid credentials", "TOLLWAY_KAFKA_SASL_USERNAME, _PASSWORD"),
    ("kafka", {"kafka_sasl_mechanism": "SCRAM-SHA-256"}, "Unsupported SASL mechanism", "_MECHANISM"),
    ("kafka", {"kafka_ca_file": "strangers"}, "certificate verify failed", "TOLLWAY_KAFKA_CA_FILE"),
    ("kafka", {"kafka_ca_file": "missing"}, "No such file", "TOLLWAY_KAFKA_CA_FILE"),
    ("kafka", {"kafka_security_protocol": "PLAINTEXT"}, "no Kafka at", "the other TOLLWAY_KAFKA_ settings"),
    ("redis", {"redis_url": "password"}, "Redis refused user and password", "TOLLWAY_REDIS_URL"),
    ("redis", {"redis_ca_file": "strangers"}, "certificate of Redis is not trusted", "TOLLWAY_REDIS_CA_FILE"),
    ("clickhouse", {"clickhouse_password": SecretStr("wrong")}, "Authentication failed", "TOLLWAY_CLICKHOUSE_PASSWORD"),
    ("clickhouse", {"clickhouse_ca_file": "strangers"}, "not trusted", "TOLLWAY_CLICKHOUSE_CA_FILE"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "changed", "said", "cure"),
    WRONG,
    ids=[f"{row[0]} {next(iter(row[1]))} {next(iter(row[1].values()))}" for row in WRONG],
)
async def test_a_door_that_does_not_open(site: Site, part: str, changed: dict[str, Any], said: str, cure: str) -> None:
    """A wrong user, password, mechanism, protocol or CA is one sentence that names the setting."""
    files = {"strangers": certificates(site.data / "strangers").ca, "missing": site.data / "none.pem"}
    changed = {name: files.get(str(value), value) for name, value in changed.items()}
    if "redis_url" in changed:
        url = site.settings("accounts").redis_url.get_secret_value()
        changed["redis_url"] = SecretStr(url.replace("pw-accounts", "wrong"))
    role = "audit" if part == "clickhouse" else "accounts"
    found = await told(site, role, **changed)
    (fault,) = [each for each in found if said in each]
    assert cure in fault
    assert "\n" not in fault


def test_a_worker_and_a_command_that_are_not_let_in(site: Site) -> None:
    """They end with the same sentence, exit 1, and no traceback."""
    wrong = {"kafka_sasl_password": SecretStr("wrong"), "kafka_admin_timeout_s": 5.0, "public_key": public_key(site)}
    sentence = "correct TOLLWAY_KAFKA_SASL_USERNAME, _PASSWORD and _MECHANISM"
    for settings, argv in (
        (site.settings("audit", **wrong), ("worker", "--group", "audit")),
        (site.settings("control", **wrong), ("topics", "check")),
    ):
        settings.data.mkdir(exist_ok=True)
        done = site.run(settings, *argv)
        assert done.returncode == 1
        assert sentence in done.stderr.splitlines()[-1]


def test_a_certificate_of_our_own(tmp_path: Path) -> None:
    """Certificate and key belong together."""
    alone = Settings(kafka_security_protocol="SSL", kafka_cert_file=tmp_path / "a.pem")
    for security in (alone.kafka_security, alone.admin_security):
        with pytest.raises(Refused, match=r"TOLLWAY_KAFKA_CERT_FILE and TOLLWAY_KAFKA_KEY_FILE belong together"):
            security()


async def test_a_certificate_that_brokers_ask_for(tmp_path: Path) -> None:
    """Where brokers know their clients by certificate, both clients of ours show theirs; a stranger's is refused."""
    broker = SecuredBroker(tmp_path / "broker", client_certificates=True)
    ours, strangers = broker.pem.server, certificates(tmp_path / "strangers").server
    with broker:
        given = {
            "kafka_bootstrap": broker.bootstrap,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_ca_file": broker.pem.ca,
        }
        given |= {"kafka_sasl_username": "admin", "kafka_sasl_password": broker.password, "kafka_admin_timeout_s": 5.0}
        known = Settings(**given, kafka_cert_file=ours, kafka_key_file=ours)
        assert await kafka_admin(known).topics() == {}
        await (await started_producer(broker.bootstrap, known.kafka_security())).stop()
        with pytest.raises((Refused, Unavailable)):
            await kafka_admin(Settings(**given)).topics()
        stranger = Settings(**given, kafka_cert_file=strangers, kafka_key_file=strangers)
        with pytest.raises(Unavailable):
            await started_producer(broker.bootstrap, stranger.kafka_security())


async def test_the_gate_cannot_write_what_it_reads(site: Site) -> None:
    """The fold's user may apply; the gate's reads quota but can write neither limits nor the lane's state; who looks writes nothing."""
    number = lane("other")
    call = APPLY.call(number, "0-x", "1", "t", "", "", "1", b"\x94\x90\x90\x90\x90")
    clients = {role: connect(site.settings(role).redis_url.get_secret_value(), ca_file=site.pem.ca) for role in REDIS}
    try:
        for role in ("gate", "look"):
            with pytest.raises(Unavailable, match=r"(?i)permission"):
                await fly(clients[role], [call])
            assert (await read_quota(clients[role], "acme"))["account"] == "acme"
        assert (await fly(clients["accounts"], [call]))[0][0] in (b"LOST", b"EPOCH")  # not its lane, but it was let in
        await clients["gate"].hset("tw:{001}:s:acme~acct", "calls d:1 h", "1")
        await clients["gate"].hdel("tw:{001}:s:acme~acct", "calls d:1 h")
        for key in ("tw:{001}:p:acme", "tw:{001}:m", "other"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                await clients["gate"].hset(key, "x", "1")
        for command in ("FLUSHALL", "KEYS *", "CONFIG SET maxmemory 1", "SCRIPT FLUSH", "ACL WHOAMI"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                await clients["accounts"].execute_command(*command.split())
    finally:
        for client in clients.values():
            await client.aclose()


async def test_a_fold_without_the_right_to_write_limits(site: Site) -> None:
    """The doctor of the accounts worker finds that its Redis user is the gate's."""
    gate = site.settings("gate").redis_url
    found = await told(site, "accounts", redis_url=gate)
    assert any("allow this user to write keys like tw:{???}:p:*" in fault for fault in found), found


def test_the_tables_in_the_documents_are_these() -> None:
    """docs/operating.md lists each role's rights as they were applied here, and nothing else."""
    text = OPERATING.read_text(encoding="utf-8")
    rights = text[text.index("## Rights") : text.index("## A schema registry")]
    listed = re.findall(r"^\| (\w+) \| (.*) \|$", rights, re.MULTILINE)[1:]
    assert listed == [(role, "; ".join(str(right) for right in rights)) for role, rights in KAFKA.items()]
    users = re.findall(r"^ACL SETUSER (\w+) on >PASSWORD (.*)$", rights, re.MULTILINE)
    assert users == list(REDIS.items())
    assert all(f"`{role}`, {what}" in rights for role, what in ROLES.items())
    for statements in CLICKHOUSE.values():
        for statement in statements:
            assert f"{statement};" in text


def test_the_grants_are_clickhouse_s(site: Site) -> None:
    """The engine here keeps no users, but parses each statement as ClickHouse does."""
    with contextlib.closing(audit_store(site.settings("control"))) as store:
        for statement in [each for some in CLICKHOUSE.values() for each in some]:
            assert store.rows("SELECT formatQuerySingleLine({text:String}) AS told", text=statement)[0][
                "told"
            ].startswith("GRANT ")


def test_rights_of_several_roles_are_one_a_resource() -> None:
    """Roles that share a user need the union, without doubles."""
    union = kafka_rights(KAFKA)
    assert len({(right.kind, right.name) for right in union}) == len(union)
    usage = next(right for right in union if right.name == USAGE.name)
    assert set(usage.operations) == {"Create", "Read", "Write", "AlterConfigs", "Describe", "DescribeConfigs"}


def test_an_unknown_role() -> None:
    """The roles that there are, are named."""
    done = subprocess.run(
        [sys.executable, "-m", "tollway.streams.cli", "doctor", "--role", "king"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert f"--role is 'king': give one of {', '.join(ROLES)}, all" in done.stderr
