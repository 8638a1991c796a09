"""State lost, damaged or wrong, on real parts: a sealed snapshot and the log give it back, or say why they do not."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.audit_batches import store_of
from tests.sinks_site import PARTITIONS, Site, folded, log_of, running, site_of, until, used
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import Admin, read_newest, started_producer
from tollway.connectors.redis import connect, read_quota
from tollway.connectors.snapshots import SnapshotStore
from tollway.schemas import codec
from tollway.schemas.topics import CHECKPOINTS, METER_EVENTS, USAGE
from tollway.streams import checkpoint
from tollway.streams.audit_fold import AuditFold, think_audit
from tollway.streams.checkpoint import Checkpoint
from tollway.streams.engine import Engine
from tollway.streams.failpoint import Failpoints
from tollway.streams.quota_view import QuotaView
from tollway.streams.rebuild import rebuild
from tollway.streams.seal import GROUPS
from tollway.streams.seal_sources import kafka_seals
from tollway.streams.settings import Settings
from tollway.streams.snapshot_copy import SnapshotCopies
from tollway.streams.status import checkpoints_of
from tollway.streams.wiring import audit_store

SNAPSHOT_S, SEALS = 2, 3
DATABASE = "rebuilt"


@dataclasses.dataclass
class History:
    """What the workers had made of the log when they stopped."""

    settings: Settings
    epoch: str
    bill: dict[tuple[str, int], int]
    totals: dict[str, Any]
    checkpoints: dict[tuple[str, int], Checkpoint]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path_factory.mktemp("rebuild-redis")) as found:
        yield found


@pytest.fixture(scope="module")
def history(
    tmp_path_factory: pytest.TempPathFactory, clickhouse: ClickHouseServer, redis_server: ValkeyServer
) -> Iterator[History]:
    """A log of a few boundaries, folded by both groups, its snapshots in ClickHouse."""
    store_of(clickhouse, DATABASE).migrate()
    given: dict[str, Any] = {
        "clickhouse_host": clickhouse.host, "clickhouse_port": clickhouse.port, "clickhouse_user": clickhouse.user,
        "clickhouse_password": clickhouse.password, "clickhouse_database": DATABASE,
        "redis_url": redis_server.url, "snapshot_s": SNAPSHOT_S,
    }  # fmt: skip
    with log_of(tmp_path_factory.mktemp("rebuild"), **given) as settings:
        yield asyncio.run(_made(settings))


async def _made(settings: Settings) -> History:
    async with site_of(settings) as site:
        await site.control.broadcast("meter.add", {"meter": "calls", "event_name": "calls"})
        names = [site.account(number, place) for number in range(PARTITIONS) for place in (0, 1)]
        await site.open(names, lambda name: f"cus_{name}")
        store = audit_store(settings)
        copies = SnapshotCopies(settings.kafka_bootstrap, {}, SnapshotStore(store), site.epoch, look_s=0.3)
        view = QuotaView(connect(settings.redis_url.get_secret_value()), site.epoch)
        await view.start()
        copies.start()
        accounts, audit = site.accounts(view), auditing(site, store, copies)
        async with running(accounts, audit):
            sequence = 1_000_000
            while not await _sealed(SnapshotStore(store), site.epoch):
                for name in names:
                    sequence += 2  # each leaves a hole
                    await site.emit(name, 3)
                    await site.emit(name, sequence=sequence, source=site.source, quantities={"calls": 2})
                await site.producer.send_and_wait(USAGE.name, b"\0poison", key=b"x", partition=1)
                await asyncio.sleep(0.2)
            level = await site.ends()
            await until(lambda: folded(accounts, level))
            assert await view.drained(20)
        await copies.close()
        await view.close()
        store.close()
        found = await checkpoints_of(settings, site.epoch, PARTITIONS, [*GROUPS, "stripe"])
        return History(settings, site.epoch, await _bill(settings), await _totals(settings, names), found)


def auditing(site: Site, store: AuditStore, copies: SnapshotCopies) -> Engine:
    """Group audit, its snapshots copied."""
    think = _at_once(think_audit)
    return site._engine(
        AuditFold(site.epoch, PARTITIONS, site.signer.public_key, think, store, Failpoints(), copies), {}
    )


def _at_once(think: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    async def hand(subject: Any) -> Any:
        return think(subject)

    return hand


async def _sealed(store: SnapshotStore, epoch: str) -> bool:
    """Whether ClickHouse has SEALS snapshots of every group and partition."""
    places = [(group, number) for group in GROUPS for number in range(PARTITIONS)]
    return all([len(await asyncio.to_thread(store.heads, epoch, *place)) >= SEALS for place in places])


async def _bill(settings: Settings) -> dict[tuple[str, int], int]:
    """(account, n) → units of every meter event; two of one identity must be one."""
    bill: dict[tuple[str, int], int] = {}
    found = await read_newest(settings.kafka_bootstrap, {}, METER_EVENTS.name, range(PARTITIONS), None)
    for records in found.values():
        for record in records:
            event = codec.decode(record.value)[1]
            assert bill.setdefault((event["account"], event["n"]), event["units"]) == event["units"]
    return bill


async def _totals(settings: Settings, names: Any) -> dict[str, Any]:
    """What Redis says was used, by account."""
    client = connect(settings.redis_url.get_secret_value())
    try:
        read = {name: await read_quota(client, name) for name in names}
        return {
            name: [(row["scope"], row["window"], row["start"], row["used"]) for row in answer["totals"]]
            for name, answer in read.items()
        }
    finally:
        await client.aclose()


async def rebuilt(history: History, what: str, **options: Any) -> dict[str, Any]:
    given = {"partitions": None, "start": None, "dry_run": False, "progress": print, **options}
    settings = given.pop("settings", history.settings)
    return await rebuild(settings, what, **given)


async def lose_checkpoints(settings: Settings) -> None:
    """Delete the topic and create it again, empty."""
    client = AdminClient({"bootstrap.servers": settings.kafka_bootstrap, "log_level": 0})
    client.delete_topics([CHECKPOINTS.name])[CHECKPOINTS.name].result(30)
    admin = Admin(settings.kafka_bootstrap)
    async with asyncio.timeout(30):
        while CHECKPOINTS.name in await admin.topics():
            await asyncio.sleep(0.1)
    await admin.create(PARTITIONS, 1)
    await admin.new_topic_id(CHECKPOINTS.name)


async def put(settings: Settings, partition: int, records: list[tuple[bytes, bytes | None]]) -> None:
    producer: AIOKafkaProducer = await started_producer(settings.kafka_bootstrap, {})
    try:
        for key, value in records:
            await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=partition)
    finally:
        await producer.stop()


def written(found: Checkpoint, **changed: Any) -> list[tuple[bytes, bytes]]:
    """Records of a checkpoint like this one."""
    names = (
        "group",
        "epoch",
        "partition",
        "slot",
        "next_offset",
        "turn",
        "written_ms",
        "fold_version",
        "stats",
        "state",
    )
    return checkpoint.encode(**{**{name: getattr(found, name) for name in names}, **changed})


async def test_every_boundary_has_the_hash_that_was_sealed(history: History) -> None:
    """From the log's first record and from each snapshot in between: all later hashes, and the checkpoint's, are equal."""
    whole = await rebuilt(history, "checkpoints", dry_run=True, start="log")
    assert whole["ok"], whole
    assert len(whole["partitions"]) == len(GROUPS) * PARTITIONS
    for row in whole["partitions"]:
        assert row["from_offset"] == 0
        assert [each["what"] for each in row["boundaries"]][-1] == "checkpoint"
        assert len(row["boundaries"]) > SEALS
        assert row["wrote"] == ""
    recent = await rebuilt(history, "checkpoints", dry_run=True)
    assert recent["ok"], recent
    assert all(row["from"].startswith("sealed") and len(row["boundaries"]) == 2 for row in recent["partitions"])


async def test_a_group_at_work_is_left_alone(history: History) -> None:
    """What would be written behind a worker's back is refused, with the cure."""
    async with site_of(history.settings) as site, running(site.accounts(tick_idle_s=3600.0)):
        with pytest.raises(Refused, match=r"group accounts has 1 members .* stop its workers"):
            await rebuilt(history, "billing", settings=history.settings.model_copy(update={"session_timeout_ms": 500}))
        assert (await rebuilt(history, "billing", dry_run=True, partitions=[0]))["partitions"]


async def test_a_wrong_unit_in_a_checkpoint_is_found_and_put_right(history: History) -> None:
    """A checkpoint that is whole but one unit off differs from what the log gives, and is replaced; later workers load the
    right one though the wrong one stands at a higher offset."""
    newest = await checkpoints_of(history.settings, history.epoch, PARTITIONS, ["accounts"])
    found = newest["accounts", 2]
    wrong = found.state
    wrong["dedupe"]["duplicates"] += 1
    await put(history.settings, 2, written(found, state=wrong, slot=1 - found.slot, written_ms=found.written_ms + 1))
    seen = await rebuilt(history, "billing", dry_run=True, partitions=[2])
    assert not seen["ok"]
    assert [each["equal"] for each in seen["partitions"][0]["boundaries"]] == [True, False]
    done = await rebuilt(history, "billing", partitions=[2])
    assert done["ok"]
    assert done["partitions"][0]["wrote"] == f"checkpoint at {found.next_offset}"
    again = await rebuilt(history, "billing", dry_run=True, partitions=[2])
    assert again["ok"], again
    now = (await checkpoints_of(history.settings, history.epoch, PARTITIONS, ["accounts"]))["accounts", 2]
    assert (now.generation, now.next_offset) == (found.generation + 1, found.next_offset)


async def test_a_hash_that_is_another_one_is_refused(history: History) -> None:
    """A snapshot whose state the log does not give: ClickHouse's copy contradicts it; without that, the fold does."""
    settings = history.settings
    store = audit_store(settings)
    copied = {row.day for row in SnapshotStore(store).heads(history.epoch, "audit", 3)}
    store.close()
    found = await kafka_seals(settings.kafka_bootstrap, {}, history.epoch, 3)
    seal = [seal for seal in found if seal.group == "audit" and seal.day in copied][-1]
    false = dataclasses.replace(seal, hash=bytes(32))
    away = settings.model_copy(update={"clickhouse_port": 1})
    await put(settings, 3, [(key, value) for _, _, key, value, _ in false.messages() if value])
    with pytest.raises(
        Refused, match=f"sealed snapshot {seal.day} of group audit, partition 3: Kafka has hash 0000.*{seal.hash.hex()}"
    ):
        await rebuilt(history, "checkpoints", partitions=[3], start="log", dry_run=True)
    seen = await rebuilt(history, "checkpoints", partitions=[3], start="log", dry_run=True, settings=away)
    assert not seen["ok"]
    with pytest.raises(
        Refused, match=f"partition 3: folded from .* at sealed {seal.day} .*{seal.hash.hex()}, not 0000"
    ):
        await rebuilt(history, "checkpoints", partitions=[3], start="log", settings=away)
    await put(settings, 3, [(key, value) for _, _, key, value, _ in seal.messages() if value])


def flipped(value: bytes) -> bytes:
    return value[:40] + bytes([value[40] ^ 1]) + value[41:]


DAMAGE: dict[str, Callable[[Checkpoint], list[tuple[bytes, bytes]]]] = {
    "a byte": lambda found: [(key, flipped(value)) for key, value in written(found)],
    "cut short": lambda found: [(key, value[: len(value) // 2]) for key, value in written(found)],
    "another log": lambda found: [
        (key, value) for (key, _), (_, value) in zip(written(found), written(found, epoch="0-other"), strict=True)
    ],
    "a part missing": lambda found: written(found, part_bytes_max=200)[:-1],
}


async def test_a_damaged_slot_is_passed_over_and_two_are_refused(history: History) -> None:
    """Each kind of damage in one slot: the other one is loaded. In both: the worker stops with the command that helps."""
    settings, (one, other, *_) = (
        history.settings,
        [history.checkpoints["accounts", number] for number in range(PARTITIONS)],
    )
    await lose_checkpoints(settings)
    for kind, damaged in DAMAGE.items():
        await put(
            settings,
            0,
            [*written(one, slot=0), *damaged(dataclasses.replace(one, slot=1, next_offset=one.next_offset + 1))],
        )
        found = await checkpoints_of(settings, history.epoch, PARTITIONS, ["accounts"])
        assert found["accounts", 0].next_offset == one.next_offset, kind
        await put(settings, 1, [record for slot in (0, 1) for record in damaged(dataclasses.replace(other, slot=slot))])
        assert ("accounts", 1) not in await checkpoints_of(settings, history.epoch, PARTITIONS, ["accounts"]), kind
    async with site_of(settings) as site:
        with pytest.raises(Refused, match=r"no valid checkpoint for partition 1 .*`tollway rebuild checkpoints`"):
            await site.accounts().work()


async def test_a_lost_topic_is_rebuilt_to_the_same_bill_and_the_same_totals(history: History) -> None:
    """Checkpoints deleted, all of them, and what lies behind the newest snapshots no longer in Kafka: rebuilt from ClickHouse's copies,
    both groups go on; no meter event has another content, no total another value, and new usage counts behind them."""
    settings = history.settings
    await lose_checkpoints(settings)
    copies = SnapshotStore(store := audit_store(settings))
    first = {
        number: min(copies.heads(history.epoch, group, number)[-1].next_offset for group in GROUPS)
        for number in range(PARTITIONS)
    }
    store.close()
    client = AdminClient({"bootstrap.servers": settings.kafka_bootstrap, "log_level": 0})
    for future in client.delete_records(
        [TopicPartition(USAGE.name, n, offset) for n, offset in first.items()]
    ).values():
        future.result(30)
    done = await rebuilt(history, "checkpoints")
    assert done["ok"], done
    assert done["compared"] >= len(GROUPS) * PARTITIONS
    assert all(row["wrote"] for row in done["partitions"])
    client_of = connect(settings.redis_url.get_secret_value())
    await client_of.flushall()
    await client_of.aclose()
    async with site_of(settings) as site:
        view = QuotaView(connect(settings.redis_url.get_secret_value()), site.epoch)
        await view.start()
        store = audit_store(settings)
        accounts, audit = site.accounts(view), site.audit(store)
        async with running(accounts, audit):
            level = {
                number: found.next_offset
                for (group, number), found in history.checkpoints.items()
                if group == "accounts"
            }
            await until(lambda: folded(accounts, level))
            assert await view.drained(20)
            now = await _totals(settings, history.totals)
            assert now == history.totals
            name = site.account(1)
            before = used(accounts, name)
            await site.emit(name, 4, source=_other_source())
            await until(lambda: used(accounts, name) == before + 4)
        await view.close()
        store.close()
    after = (await checkpoints_of(settings, history.epoch, PARTITIONS, ["accounts"]))["accounts", 1]
    assert (after.generation, after.next_offset > level[1]) == (1, True)  # later checkpoints rank with the rebuilt one
    bill = await _bill(settings)
    assert {identity: bill[identity] for identity in history.bill} == history.bill
    whole = await rebuilt(history, "checkpoints", dry_run=True, start="log")
    assert whole["ok"], whole


def _other_source() -> str:
    from tests.records import source

    return source(99, time.time_ns() // 1_000_000)


async def test_redis_is_written_anew(history: History) -> None:
    """A wrong total, one that nobody used and a lost one: after the rebuild Redis says what the log says, and nothing else."""
    settings = history.settings
    assert (await rebuilt(history, "redis"))["ok"]
    before = await _totals(settings, history.totals)
    client = connect(settings.redis_url.get_secret_value())
    keys = sorted([key async for key in client.scan_iter(match="tw:*:s:*")])
    field = next(name for name in await client.hkeys(keys[0]) if name.endswith(b" u"))
    await client.hset(keys[0], field, "999999")
    await client.hset(keys[1], "calls d:0 u", "7")
    await client.delete(keys[2])
    assert await _totals(settings, history.totals) != before
    done = await rebuilt(history, "redis")
    assert done["ok"], done
    assert await _totals(settings, history.totals) == before
    await client.aclose()


async def test_what_is_not_there_is_said_in_one_sentence(history: History) -> None:
    """A partition or a snapshot that does not exist: refused, with those that do."""
    with pytest.raises(Refused, match=r"--partition is 99: this log has partitions 0 to 3"):
        await rebuilt(history, "redis", partitions=[99])
    with pytest.raises(Refused, match=r"--from is 7: partition 0 has sealed snapshots \d+, .*and `log`"):
        await rebuilt(history, "billing", dry_run=True, start="7")
