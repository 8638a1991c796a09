"""What the commands that look print from ClickHouse: an account's usage, and the proof over the audit log."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tollway.connectors.kafka import epoch_of, log_partitions
from tollway.schemas.topics import USAGE
from tollway.streams.audit_report import Report
from tollway.streams.audit_verify import verify
from tollway.streams.judge import judge_block
from tollway.streams.looks import HOUR_S, check_account
from tollway.streams.settings import Settings
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
    admin = kafka_admin(settings)
    partitions = await log_partitions(admin)
    epoch = epoch_of(await admin.topic_id(USAGE.name))
    found = await checkpoints_of(settings, epoch, partitions, ["audit"])
    chains = {
        (epoch, number): (each.next_offset, each.state["parts"]["audit"]["chain"])
        for (_, number), each in found.items()
    }

    def prove() -> Report:
        return verify(
            store,
            chains,
            rejudge=judge_block,
            partitions=partitions,
            progress=lambda done, whole: progress(f"{done:,} of {whole:,} records"),
        )

    store = audit_store(settings)
    try:
        report = await asyncio.to_thread(prove)
    finally:
        store.close()
    for number in sorted(set(range(partitions)) - {place for _, place in chains}):
        report.unproven.append(f"tail of partition {number}: no audit checkpoint in Kafka")
    return report.to_json()
