"""`tollway doctor`: looks at every connection, right, setting and clock. It writes nothing, waits for nothing longer than a
deadline, and names each fault with its cure; a part that is away is a finding, not a failure.
"""

import asyncio
import logging
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tollway.connectors.clickhouse import MIGRATIONS, AuditStore
from tollway.connectors.control import Signer
from tollway.connectors.errors import Refused
from tollway.connectors.redis import check
from tollway.connectors.stripe import Meter, meter_fault
from tollway.schemas.lane import tag
from tollway.streams.doctor_kafka import LogFacts, kafka
from tollway.streams.examination import FAILED, Abandonable, Examination, Finding, one_line, split
from tollway.streams.schema_registry import PUBLISH, registry_report
from tollway.streams.settings import Settings
from tollway.streams.stripe_fold import TEST_KEYS
from tollway.streams.wiring import audit_store, redis_client, stripe_port
from tollway.streams.worker import public_key_of

MEMORY_FULL_PERCENT = 90
TABLES = ("usage_log", "usage_events", "audit_manifest")
EVERYTHING = frozenset({"data", "kafka", "key", "redis", "clickhouse", "registry", "stripe"})
LOOKS = {
    "emitter": frozenset({"kafka"}),
    "accounts": frozenset({"data", "kafka", "key", "redis", "registry"}),
    "audit": frozenset({"data", "kafka", "key", "clickhouse", "registry"}),
    "stripe": frozenset({"data", "kafka", "stripe", "registry"}),
    "gate": frozenset({"redis"}),
    "control": frozenset({"data", "kafka", "key", "registry"}),
    "look": frozenset({"kafka", "redis", "clickhouse"}),
}
"""role → what it is connected to; any other is asked everything."""
NEVER = "~doctor"
"""`~` is in no id: such a key never exists, and deleting a field of it changes nothing but needs the right to write."""
MIGRATE = "run `tollway audit migrate`"


async def examine(settings: Settings, **options: Any) -> list[Finding]:
    """Look at everything; `options` are those of Examination. Never raises for what a part does."""
    asyncio.get_running_loop().set_default_executor(Abandonable())
    for client in ("aiokafka", "clickhouse_connect", "stripe"):
        logging.getLogger(client).setLevel(logging.CRITICAL)  # what they raise says it all
    exam = Examination(settings, **options)
    parts = LOOKS.get(exam.role, EVERYTHING)
    looks = {"kafka": kafka, "redis": redis, "clickhouse": clickhouse, "registry": registry}
    if "data" in parts:
        data_folder(exam)
    facts, *_ = await asyncio.gather(*(look(exam) for part, look in looks.items() if part in parts))
    if "key" in parts and facts is not None:
        keys(exam, facts)
    if "stripe" in parts and facts is not None:
        await stripe(exam, facts.meters)
    return exam.findings


def data_folder(exam: Examination) -> None:
    """The folder for lock files and the key can be written to, and its disk has room."""
    folder = exam.settings.data.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            exam.well("data", f"{folder} can be written to")
    except OSError as error:
        cure = "give this user the folder, or set TOLLWAY_DATA to another one"
        exam.ill("data", f"{folder} cannot be written to ({error.strerror})", cure)
    exam.disk("data", f"the disk of {folder}", shutil.disk_usage(there).free)


def keys(exam: Examination, facts: LogFacts) -> None:
    """The public key we would trust is the log's, and the key we would sign with is known to it."""
    settings, config = exam.settings, facts.config
    try:
        ours = public_key_of(settings)
        path = settings.data / "control.key"
        signer = Signer.read(path) if path.exists() else None
    except (Refused, OSError) as error:
        exam.ill("key", one_line(error), "set TOLLWAY_PUBLIC_KEY to the public key that log.open names")
        return
    if config is None:
        return  # no log to compare with: said already
    if ours != config.public_key:
        what = f"log.open names the public key {config.public_key[:16]}…, ours is {ours[:16]}…"
        exam.ill("key", what, "correct TOLLWAY_PUBLIC_KEY, or TOLLWAY_KAFKA_BOOTSTRAP if this is not the log you mean")
    else:
        exam.well("key", f"log.open names our public key {ours[:16]}…")
    if signer is not None and facts.keys.get(signer.kid) != signer.public_key:
        cure = "sign with the key that the log was opened with, or add this one by the command key.add"
        exam.ill("key", f"{path} is not known to the log: what it signs is refused", cure)
    if settings.deployment != config.deployment:
        what = f"log.open names the deployment {config.deployment}, TOLLWAY_DEPLOYMENT is {settings.deployment}"
        exam.ill("key", what, "correct TOLLWAY_DEPLOYMENT, or TOLLWAY_KAFKA_BOOTSTRAP if this is not the log you mean")


async def redis(exam: Examination) -> None:
    """Redis answers, forgets nothing, runs scripts, has room, and knows the time."""
    try:
        client = redis_client(exam.settings)
    except ValueError as error:
        exam.ill("redis", f"TOLLWAY_REDIS_URL is no address: {one_line(error)}", "write redis://:password@host:port/0")
        return
    cure = "start it, or correct TOLLWAY_REDIS_URL"
    if await exam.ask("redis", check(client, allow_volatile=True), cure) is FAILED:
        return
    exam.well("redis", "it answers and takes the password")
    fold, gate = exam.role not in ("gate", "look"), exam.role != "look"
    if fold and await exam.ask("redis", check(client), cure) is not FAILED:
        exam.well("redis", "it evicts no keys and keeps an append-only file")
    asked_s = exam.clock_s()
    now = await exam.ask("redis", client.time(), "allow this user the command TIME")
    if now is not FAILED:
        exam.clock("redis", now[0] + now[1] / 1e6, asked_s)
    told: Any = await exam.ask("redis", client.info(), "allow this user the command INFO") if fold else FAILED
    for what, cure in redis_faults(told) if told is not FAILED else []:
        exam.ill("redis", what, cure)
    if gate and (told is FAILED or told.get("role") == "master"):
        await _redis_writes(exam, client, ("p:", "s:") if fold else ("s:",))
    await client.aclose()


async def _redis_writes(exam: Examination, client: Redis, kinds: tuple[str, ...]) -> None:
    """Scripts run, and keys of the lanes can be written; nothing is."""
    cure = "allow this user EVAL, EVALSHA and SCRIPT LOAD: totals are written by scripts"
    if await exam.ask("redis", client.eval("return 1", 0), cure) is not FAILED:
        exam.well("redis", "it runs scripts")
    for kind in kinds:
        cure = (
            f"allow this user to write keys like tw:{{???}}:{kind}*, as `ACL SETUSER` of the role in docs/operating.md"
        )
        if await exam.ask("redis", client.hdel(f"{tag(0)}{kind}{NEVER}", NEVER), cure) is FAILED:
            return
    exam.well("redis", "this user may write what its role writes")


def redis_faults(told: dict[str, Any]) -> list[tuple[str, str]]:
    """(fault, cure) of what INFO says: it must be a master, with a file that can be written and memory left."""
    faults = []
    if told.get("role") != "master":
        faults.append((f"it is a {told.get('role')}: nothing can be written", "set TOLLWAY_REDIS_URL to the master"))
    if told.get("aof_last_write_status", "ok") != "ok":
        faults.append(
            ("its append-only file could not be written", "make room on its disk: it refuses writes until then")
        )
    used, most = told.get("used_memory", 0), told.get("maxmemory", 0)
    if most and used * 100 > most * MEMORY_FULL_PERCENT:
        faults.append(
            (f"it uses {used >> 10} of {most >> 10} KiB, and refuses writes when they are full", "raise maxmemory")
        )
    return faults


async def clickhouse(exam: Examination) -> None:
    """ClickHouse answers, knows the time, has room, this Tollway's tables, and lets us read and write them."""
    settings = exam.settings
    place = f"{settings.clickhouse_host}:{settings.clickhouse_port}"
    server = audit_store(settings.model_copy(update={"clickhouse_database": "system"}))  # which is always there
    asked_s = exam.clock_s()
    told = await exam.ask(
        "clickhouse",
        asyncio.to_thread(server.rows, "SELECT version() AS version, toUnixTimestamp64Milli(now64(3)) AS now_ms"),
        "start it, or correct TOLLWAY_CLICKHOUSE_HOST, _PORT, _USER, _PASSWORD and _SECURE",
    )
    if told is FAILED:
        return  # not closed: that would wait for the call that hangs
    exam.well("clickhouse", f"{told[0]['version']} answers at {place} and takes the password")
    exam.clock("clickhouse", told[0]["now_ms"] / 1000, asked_s)
    sql = "SELECT name, free_space FROM system.disks WHERE type = 'Local'"
    disks = await exam.ask("clickhouse", asyncio.to_thread(server.rows, sql), "grant this user SELECT on system.disks")
    for row in disks if disks is not FAILED else []:
        exam.disk("clickhouse", f"its disk {row['name']}", row["free_space"])
    store = audit_store(settings)
    if await _migrated(exam, server, store):
        for table in TABLES:
            await _table_rights(exam, store, table, writes=exam.role != "look")


async def _migrated(exam: Examination, server: AuditStore, store: AuditStore) -> bool:
    """Whether the tables are those of this Tollway."""
    known = "SELECT name FROM system.tables WHERE database = {database:String} AND name = 'tollway_schema'"
    there = await exam.ask("clickhouse", asyncio.to_thread(server.rows, known, database=store.database), MIGRATE)
    if there is FAILED:
        return False
    if not there:
        exam.ill("clickhouse", f"database {store.database} has no tables of Tollway that this user can see", MIGRATE)
        return False
    sql = "SELECT version, name, digest FROM tollway_schema FINAL"
    applied = await exam.ask("clickhouse", asyncio.to_thread(store.rows, sql), "grant this user SELECT on the database")
    if applied is FAILED:
        return False
    faults = migration_faults({row["version"]: (row["name"], row["digest"]) for row in applied}, MIGRATIONS)
    for what, cure in faults:
        exam.ill("clickhouse", f"database {store.database}: {what}", cure)
    if not faults:
        exam.well("clickhouse", f"database {store.database} has this version's tables")
    return True


def migration_faults(applied: dict[int, tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """(fault, cure) of what a database has taken (version → name, digest) against the numbered files."""
    files = {int(path.name[:4]): path for path in sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.sql"))}
    faults = []
    for version, path in files.items():
        if version not in applied:
            faults.append((f"{path.name} was not applied", MIGRATE))
        elif applied[version][1] != sha256(path.read_bytes()).hexdigest():
            faults.append(
                (f"it took another {path.name} than ours", "run the version of Tollway that made it, or newer")
            )
    newer = [name for version, (name, _) in sorted(applied.items()) if version not in files]
    return faults + [(f"it has {name} of a newer Tollway", "upgrade this one") for name in newer]


async def _table_rights(exam: Examination, store: AuditStore, table: str, *, writes: bool) -> None:
    """Reading and writing are asked for with no rows in them, which stores nothing."""
    asked = [("SELECT", f"SELECT 1 FROM {table} LIMIT 0")]
    if writes:
        asked.append(("INSERT", f"INSERT INTO {table} SELECT * FROM {table} WHERE 0"))
    for right, sql in asked:
        cure = f"grant this user {right} on {store.database}.{table}"
        if await exam.ask("clickhouse", asyncio.to_thread(store.command, sql), cure) is FAILED:
            return
    exam.well("clickhouse", f"{table} can be read{' and written' if writes else ''}")


async def registry(exam: Examination) -> None:
    """Where a schema registry is set, it has our schemas and protects them."""
    settings = exam.settings
    if not settings.schema_registry_url:
        return
    report = await exam.ask("registry", registry_report(settings), "start it, or correct TOLLWAY_SCHEMA_REGISTRY_URL")
    if report is FAILED:
        return
    for what in report["faults"]:
        exam.ill("registry", what, PUBLISH)
    for subject in report["newer"]:
        exam.ill(
            "registry", f"{subject} has a version that this Tollway does not know", "deploy workers before emitters"
        )
    if not report["faults"] and not report["newer"]:
        exam.well("registry", f"{settings.schema_registry_url} has this version's schemas")


async def stripe(exam: Examination, declared: dict[str, str | None] | None) -> None:
    """Stripe takes the key and adds up what the meters of the log would send. `declared`: meter → event name."""
    port = stripe_port(exam.settings)
    cure = "see that TOLLWAY_STRIPE_URL can be reached from here"
    meters = await exam.ask("stripe", port.meters(), cure)
    await port.close()
    if meters is FAILED:
        return
    exam.well("stripe", f"{exam.settings.stripe_url} takes the key")
    if declared is None:
        exam.ill("stripe", "its meters were not compared: the log does not say which are billed", "cure Kafka first")
        return
    billed = sorted({name for name in declared.values() if name})
    faults = stripe_faults(billed, meters, live=not exam.settings.stripe_key.get_secret_value().startswith(TEST_KEYS))
    for what, cure in faults:
        exam.ill("stripe", what, cure)
    if not faults:
        exam.well("stripe", f"{len(billed)} billed meters are there and add up" if billed else "no meter is billed yet")


def stripe_faults(billed: list[str], meters: dict[str, Meter], *, live: bool) -> list[tuple[str, str]]:
    """(fault, cure) of each event name whose meter would not add up deltas."""
    faults = [(name, meter_fault(meters.get(name), live)) for name in billed]
    return [split(f"the meter {name}: {fault}") for name, fault in faults if fault]
