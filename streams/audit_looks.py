"""What the commands that look print from ClickHouse: an account's usage, and the proof over the audit log."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tollway.connectors.kafka import CurrentLog, current_log, epoch_of
from tollway.connectors.snapshots import SnapshotStore
from tollway.schemas.topics import log_topic
from tollway.streams.audit_fold import PARTS
from tollway.streams.audit_report import Report
from tollway.streams.audit_verify import verify
from tollway.streams.judge import judge_block
from tollway.streams.looks import HOUR_S, check_account
from tollway.streams.seal_sources import SealSources
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState
from tollway.streams.status import checkpoints_of
from tollway.streams.usage_queries import usage_report
from tollway.streams.wiring import audit_store, kafka_admin


async def usage_of(settings: Settings, account: str, hours: int) -> list[dict[str, Any]]:
    """ClickHouse's accepted usage of an account in the last `hours`."""
    check_account(account)
    store = audit_store(settings)
    now_s = int(time.time())
    try:
        return await asyncio.to_thread(usage_report, store, account, now_s - hours * HOUR_S, now_s + 60)
    finally:
        store.close()


async def verify_audit(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """The report of `audit verify` over the log that Kafka has now."""
    log = await current_log(kafka_admin(settings))
    counts = await logs_of(settings, log)
    chains = {
        (epoch, number): (each.next_offset, each.state["parts"]["audit"]["chain"])
        for epoch, count in counts.items()
        for (_, number), each in (await checkpoints_of(settings, epoch, count, ["audit"])).items()
    }
    store = audit_store(settings)
    born = await born_states(settings, counts, SnapshotStore(store))

    def prove() -> Report:
        return verify(
            store,
            chains,
            rejudge=judge_block,
            partitions=counts[log.origin],
            first=born.get,
            progress=lambda done, whole: progress(f"{done:,} of {whole:,} records"),
        )

    try:
        report = await asyncio.to_thread(prove)
    finally:
        store.close()
    places = {(epoch, number) for epoch, count in counts.items() for number in range(count)}
    for epoch, number in sorted(places - set(chains)):
        report.unproven.append(f"tail of partition {number} of {epoch}: no audit checkpoint in Kafka")
    return report.to_json()


async def logs_of(settings: Settings, log: CurrentLog) -> dict[str, int]:
    """epoch → partitions, of this log and of those that it has grown from."""
    admin = kafka_admin(settings)
    present = await admin.partitions() if log.growth else {}
    former = {
        epoch_of(await admin.topic_id(log_topic(growth)), growth): present[log_topic(growth)]
        for growth in range(log.growth)
        if log_topic(growth) in present
    }
    return {**former, log.epoch: log.partitions}


async def born_states(
    settings: Settings, counts: dict[str, int], snapshots: SnapshotStore
) -> dict[tuple[str, int], PartitionState]:
    """(epoch, partition) → what the audit group's state was before the first record, of logs that have grown from another."""
    born: dict[tuple[str, int], PartitionState] = {}
    for epoch, count in counts.items():
        if epoch.startswith("0-"):
            continue
        sources = SealSources(settings.kafka_bootstrap, settings.kafka_security(), snapshots, epoch)
        for number in range(count):
            for seal in (await sources.of(number)).get("audit", [])[:1]:
                if not seal.next_offset:
                    state = (await sources.whole(seal)).state
                    born[epoch, number] = PartitionState.load(number, count, epoch, state, PARTS)
    return born
