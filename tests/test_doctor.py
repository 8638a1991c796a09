"""`tollway doctor` on real parts: green where all is well; each fault is planted and named with its cure; nothing is written."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)
from pydantic import SecretStr

from tollway.connectors.clickhouse import MIGRATIONS, AuditStore
from tollway.connectors.control import Signer
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.kafka import Admin, ends, epoch_of, started_producer
from tollway.connectors.stripe import Meter, StripePort
from tollway.schemas.topics import CHECKPOINTS, TOPICS, USAGE
from tollway.streams import checkpoint
from tollway.streams.bootstrap import create, log_config
from tollway.streams.doctor import examine, migration_faults, redis_faults, stripe_faults
from tollway.streams.doctor_kafka import broker_faults
from tollway.streams.examination import Finding, split
from tollway.streams.settings import Settings
from tollway.streams.state import FOLD_VERSION, PartitionState
from tollway.streams.wiring import audit_store

PARTITIONS = 2
DEADLINE_S = 60
PARTS = {"data", "kafka", "log", "key", "redis", "clickhouse", "stripe"}
ACLS = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A broker of our own that asks an authorizer."""
    with KafkaBroker(tmp_path_factory.mktemp("broker"), settings=ACLS) as broker:
        yield broker


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, broker: KafkaBroker, valkey: ValkeyServer, clickhouse: ClickHouseServer
) -> Iterator[Settings]:
    """Settings of a whole set with nothing wrong about it: a log, tables, and Stripe's stand-in."""
    data = tmp_path_factory.mktemp("good")
    with StripeServer(data) as stripe:
        settings = Settings(
            data=data,
            kafka_bootstrap=broker.bootstrap,
            partitions=PARTITIONS,
            replication=1,
            redis_url=SecretStr(valkey.url),
            clickhouse_host=clickhouse.host,
            clickhouse_port=clickhouse.port,
            clickhouse_user=clickhouse.user,
            clickhouse_password=SecretStr(clickhouse.password),
            clickhouse_database=f"doctor_{uuid.uuid4().hex}",
            stripe_url=stripe.url,
            stripe_key=SecretStr(stripe.key),
        )
        asyncio.run(create(settings))
        with contextlib.closing(audit_store(settings)) as store:
            store.migrate()
            yield settings
            store.command(f"DROP DATABASE {store.database}")


def but(settings: Settings, **changed: Any) -> Settings:
    """The same settings with some changed."""
    return Settings(**{**dict(settings), **changed})


def faults(findings: list[Finding]) -> dict[str, list[str]]:
    """part → what is wrong with it. Each fault must have a cure, and nothing that is well one."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        assert bool(finding.cure) != finding.ok, finding
        if not finding.ok:
            found.setdefault(finding.part, []).append(f"{finding.what}; {finding.cure}")
    return found


async def one_fault(settings: Settings, part: str, **options: Any) -> str:
    """The only fault there is."""
    found = faults(await examine(settings, **options))
    assert list(found) == [part], found
    assert len(found[part]) == 1, found
    return found[part][0]


def environment(settings: Settings) -> dict[str, str]:
    """The settings as a process gets them."""
    told = {**settings.model_dump(), "kafka_ca_file": settings.kafka_ca_file or ""}
    plain = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in told.items()}
    return {**os.environ, **{f"TOLLWAY_{name.upper()}": str(value) for name, value in plain.items() if value != ""}}


def doctor(settings: Settings, *options: str) -> "subprocess.CompletedProcess[str]":
    """The command as a person runs it."""
    argv = [sys.executable, "-m", "tollway.streams.cli", "doctor", *options]
    done = subprocess.run(
        argv, env=environment(settings), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.stderr == ""
    return done


async def test_all_is_well_with_a_good_set(good: Settings) -> None:
    """Every part is looked at, and nothing is wrong."""
    findings = await examine(good)
    assert faults(findings) == {}
    assert {finding.part for finding in findings} == PARTS


def test_the_command_is_green_on_a_good_set(good: Settings) -> None:
    """Exit 0, and one JSON object with the findings."""
    done = doctor(good, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert told["ok"] is True
    assert {finding["part"] for finding in told["findings"]} == PARTS


async def test_nothing_is_written(good: Settings, valkey: ValkeyServer) -> None:
    """Topics end where they ended, Redis and ClickHouse hold what they held."""

    async def state() -> list[Any]:
        topics = [await ends(good.kafka_bootstrap, {}, topic.name, range(PARTITIONS)) for topic in TOPICS]
        with redis.Redis.from_url(valkey.url) as client, contextlib.closing(audit_store(good)) as store:
            parts = store.rows(
                "SELECT table, name, rows FROM system.parts WHERE database = currentDatabase() ORDER BY ALL"
            )
            return [topics, client.dbsize(), parts, sorted(path.name for path in good.data.iterdir())]

    before = await state()
    await examine(good)
    assert await state() == before


def test_parts_that_are_away_are_findings(tmp_path: Path) -> None:
    """With nothing there at all each part is named, with a cure, in the exit code, and without a traceback."""
    port = free_port()
    settings = Settings(
        data=tmp_path,
        kafka_bootstrap=f"127.0.0.1:{port}",
        redis_url=SecretStr(f"redis://127.0.0.1:{port}/0"),
        clickhouse_port=port,
        stripe_url=f"http://127.0.0.1:{port}",
    )
    done = doctor(settings)
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert {line.split()[1].rstrip(":") for line in bad} == PARTS - {"data", "log"}
    assert all("; " in line for line in bad)


def test_parts_that_never_answer_cost_a_deadline(tmp_path: Path) -> None:
    """Servers that take a connection and say nothing do not hold the doctor, whatever their clients do."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        port = silent.getsockname()[1]
        settings = Settings(
            data=tmp_path,
            kafka_bootstrap=f"127.0.0.1:{port}",
            redis_url=SecretStr(f"redis://127.0.0.1:{port}/0"),
            clickhouse_port=port,
            stripe_url=f"http://127.0.0.1:{port}",
        )
        done = doctor(settings, "--json")
    found = faults([Finding(**finding) for finding in json.loads(done.stdout)["findings"]])
    assert found.keys() == PARTS - {"data", "log"}
    assert "no answer within 5 s" in found["clickhouse"][0]


async def test_clocks_apart(good: Settings) -> None:
    """With our clock an hour behind, every part's clock is said to be ahead of it."""
    found = faults(await examine(good, clock_s=lambda: time.time() - 3600))
    assert found.keys() == {"kafka", "redis", "clickhouse"}
    for said in found.values():
        assert "ahead of ours; let a time server keep both clocks" in said[0]


async def test_an_old_log_tells_nothing_about_clocks(good: Settings) -> None:
    """A newest record of an hour ago may be a log at rest: only Redis and ClickHouse can be said to be behind."""
    assert faults(await examine(good, clock_s=lambda: time.time() + 3600)).keys() == {"redis", "clickhouse"}


async def test_a_full_disk(good: Settings) -> None:
    """Too little room is found where the data folder is, and on ClickHouse's disks."""
    found = faults(await examine(good, disk_free_min_bytes=1 << 60))
    assert found.keys() == {"data", "clickhouse"}
    assert "make room" in found["data"][0]


async def test_a_folder_that_cannot_be_written_to(good: Settings, tmp_path: Path) -> None:
    """The data folder lies under a file."""
    (tmp_path / "file").write_text("")
    public_key = Signer.read(good.data / "control.key").public_key
    said = await one_fault(but(good, data=tmp_path / "file" / "data", public_key=public_key), "data")
    assert "cannot be written to" in said
    assert "TOLLWAY_DATA" in said


async def test_a_setting_of_a_topic(good: Settings) -> None:
    """A log whose records would be deleted by age is named with the setting."""
    admin = AdminClient({"bootstrap.servers": good.kafka_bootstrap})

    async def retention(value: str) -> None:
        entry = ConfigEntry("retention.ms", value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, USAGE.name, incremental_configs=[entry])
        await asyncio.to_thread(admin.incremental_alter_configs([resource])[resource].result, DEADLINE_S)

    await retention("604800000")
    try:
        assert "usage.events: retention.ms is 604800000, must be -1" in await one_fault(good, "kafka")
    finally:
        await retention("-1")


@pytest.mark.parametrize(
    ("kind", "name", "operation"),
    [
        (ResourceType.TOPIC, "dead.letters", AclOperation.WRITE),
        (ResourceType.TOPIC, "tollway.checkpoints", AclOperation.READ),
        (ResourceType.GROUP, "tollway.audit", AclOperation.READ),
    ],
)
async def test_a_right_that_is_lacking(good: Settings, kind: ResourceType, name: str, operation: AclOperation) -> None:
    """A user who may do all but one thing is told which, without trying it."""
    admin = AdminClient({"bootstrap.servers": good.kafka_bootstrap})

    def rule(operation: AclOperation, permission: AclPermissionType) -> AclBinding:
        return AclBinding(kind, name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)

    rules = [rule(AclOperation.ALL, AclPermissionType.ALLOW), rule(operation, AclPermissionType.DENY)]
    await asyncio.gather(*(asyncio.to_thread(f.result, DEADLINE_S) for f in admin.create_acls(rules).values()))
    try:
        said = [one for part in faults(await examine(good)).values() for one in part]
        assert any(f"lacks {operation.name.capitalize()} on the" in one and name in one for one in said), said
    finally:
        filters = [filter_of(one) for one in rules]
        await asyncio.gather(*(asyncio.to_thread(f.result, DEADLINE_S) for f in admin.delete_acls(filters).values()))


def filter_of(rule: AclBinding) -> Any:
    """What deletes a rule."""
    from confluent_kafka.admin import AclBindingFilter

    return AclBindingFilter(
        rule.restype,
        rule.name,
        rule.resource_pattern_type,
        rule.principal,
        rule.host,
        rule.operation,
        rule.permission_type,
    )


async def test_a_broker_with_nothing_on_it(good: Settings, tmp_path: Path) -> None:
    """Missing topics, topics without a first checkpoint, unsafe brokers and too few of them are told apart."""
    with KafkaBroker(tmp_path, settings={"auto.create.topics.enable": "true"}) as bare:
        settings = but(good, kafka_bootstrap=bare.bootstrap)
        said = faults(await examine(settings))["kafka"]
        assert sum("is not there, or this user may not see it" in one for one in said) == len(TOPICS)
        assert sum("auto.create.topics.enable is on" in one for one in said) == 1
        await Admin(bare.bootstrap).create(PARTITIONS, 1)
        found = faults(await examine(but(settings, replication=3)))
        assert "has no checkpoint for partition 0; run `tollway topics create`" in found["log"][0]
        assert any("it has 1 brokers, TOLLWAY_REPLICATION is 3" in one for one in found["kafka"])
        assert any("less than 3 copies of a partition" in one for one in found["kafka"])


async def test_tls_without_its_certificates(good: Settings, tmp_path: Path) -> None:
    """A CA file that is not there is named by its setting."""
    settings = but(good, kafka_security_protocol="SSL", kafka_ca_file=tmp_path / "none.pem")
    assert "TOLLWAY_KAFKA_CA_FILE" in faults(await examine(settings))["kafka"][0]


async def test_keys_that_do_not_agree(good: Settings, tmp_path: Path) -> None:
    """Another public key, no key at all, a signing key that the log does not know, another deployment: each its own sentence."""
    other = Signer.read(tmp_path / "other" / "control.key", create=True)
    ours = Signer.read(good.data / "control.key").public_key
    assert "correct TOLLWAY_PUBLIC_KEY" in await one_fault(but(good, public_key=other.public_key), "key")
    assert "set TOLLWAY_PUBLIC_KEY" in await one_fault(but(good, data=tmp_path / "none"), "key")
    strange = but(good, data=tmp_path / "other", public_key=ours)
    assert "is not known to the log" in await one_fault(strange, "key")
    assert "TOLLWAY_DEPLOYMENT is staging" in await one_fault(but(good, deployment="staging"), "key")


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey that a test may spoil."""
    with ValkeyServer(tmp_path) as server:
        yield server


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"), "maxmemory-policy allkeys-lru; set it to noeviction"),
        (("CONFIG", "SET", "appendonly", "no"), "appendonly no; set it to yes"),
        (("ACL", "SETUSER", "default", "-eval"), "allow this user EVAL"),
        (("CONFIG", "SET", "maxmemory", "1mb"), "raise maxmemory"),
        (("REPLICAOF", "127.0.0.1", "1"), "set TOLLWAY_REDIS_URL to the master"),
    ],
    ids=["evicts", "forgets", "no scripts", "full", "replica"],
)
async def test_a_spoilt_redis(good: Settings, own_valkey: ValkeyServer, command: tuple[str, ...], said: str) -> None:
    """What would lose quota or refuse totals is named with its cure."""
    settings = but(good, redis_url=SecretStr(own_valkey.url))
    assert faults(await examine(settings)) == {}
    with redis.Redis.from_url(own_valkey.url) as client:
        client.execute_command(*command)
    assert said in await one_fault(settings, "redis")


async def test_redis_address_and_password(good: Settings, valkey: ValkeyServer) -> None:
    """A wrong password and a text that is no address name the setting."""
    wrong = f"redis://:wrong@{valkey.host}:{valkey.port}/0"
    for url in (wrong, "127.0.0.1:6379"):
        assert "TOLLWAY_REDIS_URL" in await one_fault(but(good, redis_url=SecretStr(url)), "redis")


def test_redis_whose_file_cannot_be_written() -> None:
    """Redis says itself that its last write to the append-only file failed."""
    well = {"role": "master", "aof_last_write_status": "ok", "used_memory": 10, "maxmemory": 0}
    assert redis_faults(well) == []
    assert "append-only file" in redis_faults({**well, "aof_last_write_status": "err"})[0][0]


async def test_clickhouse_password_and_database(good: Settings) -> None:
    """A wrong password and a database without tables are told apart."""
    said = await one_fault(but(good, clickhouse_password=SecretStr("wrong")), "clickhouse")
    assert "TOLLWAY_CLICKHOUSE" in said
    assert "Authentication failed" in said
    assert "has no tables of Tollway" in await one_fault(but(good, clickhouse_database="elsewhere"), "clickhouse")


@pytest.fixture
def spoilt(good: Settings) -> Iterator[tuple[Settings, AuditStore]]:
    """A migrated database that a test may spoil."""
    settings = but(good, clickhouse_database=f"spoilt_{uuid.uuid4().hex}")
    with contextlib.closing(audit_store(settings)) as store:
        store.migrate()
        yield settings, store
        store.command(f"DROP DATABASE {store.database}")


async def test_clickhouse_tables_of_another_tollway(spoilt: tuple[Settings, AuditStore]) -> None:
    """A database that a newer Tollway made is not written to by an older one."""
    settings, store = spoilt
    store.command("INSERT INTO tollway_schema (version, name, digest) VALUES (9999, '9999_later.sql', '')")
    assert "9999_later.sql of a newer Tollway; upgrade this one" in await one_fault(settings, "clickhouse")


async def test_clickhouse_tables_that_cannot_be_used(spoilt: tuple[Settings, AuditStore]) -> None:
    """A table that is gone cannot be read; one that can be read but not written is told apart."""
    settings, store = spoilt
    store.command("DROP TABLE audit_manifest")
    assert "grant this user SELECT on" in await one_fault(settings, "clickhouse")
    store.command("CREATE VIEW audit_manifest AS SELECT 1 AS one")
    assert f"INSERT on {store.database}.audit_manifest" in await one_fault(settings, "clickhouse")


def test_migrations_that_are_missing_or_changed() -> None:
    """Each numbered file must have been applied as it is."""
    files = sorted(MIGRATIONS.glob("*.sql"))
    taken = {int(path.name[:4]): (path.name, sha256(path.read_bytes()).hexdigest()) for path in files}
    assert migration_faults(taken, MIGRATIONS) == []
    last = max(taken)
    changed = migration_faults({**taken, last: (files[-1].name, "other")}, MIGRATIONS)
    assert [what for what, _ in changed] == [f"it took another {files[-1].name} than ours"]
    missing = migration_faults({version: row for version, row in taken.items() if version != last}, MIGRATIONS)
    assert [what for what, _ in missing] == [f"{files[-1].name} was not applied"]


async def folded(settings: Settings, meters: dict[str, str | None]) -> None:
    """Write the checkpoint of partition 0 that a worker would have written, with these meters in it."""
    epoch = epoch_of(await Admin(settings.kafka_bootstrap).topic_id(USAGE.name))
    state = PartitionState(0, PARTITIONS, epoch, next_offset=1)
    signer = Signer.read(settings.data / "control.key")
    state.directory.config = log_config(settings, signer, epoch)
    state.directory.keys = {signer.kid: signer.public_key}
    state.directory.meters = meters
    records = checkpoint.encode(
        group="accounts",
        epoch=epoch,
        partition=0,
        slot=1,
        next_offset=1,
        turn=0,
        written_ms=time.time_ns() // 1_000_000,
        fold_version=FOLD_VERSION,
        stats={},
        state=state.dump(),
    )
    producer = await started_producer(settings.kafka_bootstrap, {})
    for key, value in records:
        await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=0)
    await producer.stop()


async def test_meters_at_stripe(good: Settings) -> None:
    """A billed meter that Stripe lacks is named; once it is there all is well."""
    await folded(good, {"calls": None, "tokens_in": "tokens_in"})
    try:
        said = await one_fault(good, "stripe")
        assert said == "the meter tokens_in: it is not there; create it with the formula sum"
        port = StripePort(good.stripe_key.get_secret_value(), good.stripe_url)
        await port.ensure_meter("tokens_in")
        await port.close()
        assert faults(await examine(good)) == {}
    finally:
        await folded(good, {})


def test_meters_that_would_not_add_up() -> None:
    """Every billed meter is judged, not the first bad one alone."""
    meter = Meter("mtr_1", "calls", "sum", None, "active", False, "stripe_customer_id", "value")
    meters = {"calls": meter, "last": replace(meter, formula="last"), "off": replace(meter, status="inactive")}
    found = stripe_faults(["calls", "last", "none", "off"], meters, live=False)
    assert [what.split(":")[0] for what, _ in found] == ["the meter last", "the meter none", "the meter off"]
    assert stripe_faults(["calls"], meters, live=True)


async def test_stripe_refuses_the_key(good: Settings) -> None:
    """A key that Stripe does not know is not taken for an outage."""
    said = await one_fault(but(good, stripe_key=SecretStr("sk_test_wrong")), "stripe")
    assert "Stripe refuses the key" in said
    assert "may read and write billing meters" in said


def test_broker_settings_are_judged_by_the_replication_that_is_wanted() -> None:
    """What keeps offsets and transactions must be copied as often as the log."""
    told = {"offsets.topic.replication.factor": "1", "transaction.state.log.replication.factor": "3"}
    told["auto.create.topics.enable"] = "false"
    assert broker_faults({**told}, 1) == []
    assert broker_faults({**told}, 3) == ["offsets.topic.replication.factor is 1, less than TOLLWAY_REPLICATION (3)"]


def test_a_refusal_is_split_at_its_own_cure() -> None:
    """What stands in parentheses is no cure, and a sentence without one is left whole."""
    assert split("Redis does not say (CONFIG GET: no): allow CONFIG GET") == (
        "Redis does not say (CONFIG GET: no)",
        "allow CONFIG GET",
    )
    assert split("nothing to do") == ("nothing to do", "")
