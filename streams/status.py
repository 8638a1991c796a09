"""What the pipeline stands at: groups, partitions, lag, log time, staleness, checkpoints, holes. Read from Kafka alone."""

import time
from typing import Any

from tollway.connectors.kafka import CurrentLog, current_log, ends
from tollway.schemas.topics import DEAD_LETTERS, METER_EVENTS
from tollway.streams.checkpoint import Checkpoint
from tollway.streams.checkpoint_log import newest_checkpoints
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin


async def checkpoints_of(
    settings: Settings, epoch: str, partitions: int, groups: list[str]
) -> dict[tuple[str, int], Checkpoint]:
    """(group, partition) → newest valid checkpoint; those that have none are left out."""
    fenced = {group: group == "stripe" for group in groups}
    newest = await newest_checkpoints(
        settings.kafka_bootstrap, settings.kafka_security(), epoch, fenced, range(partitions)
    )
    return newest.found


async def all_checkpoints(settings: Settings, log: CurrentLog) -> dict[tuple[str, int], Checkpoint]:
    """Those of all three groups: the sender's stay with the first log."""
    found = await checkpoints_of(settings, log.epoch, log.partitions, ["accounts", "audit"])
    return found | await checkpoints_of(settings, log.origin, log.billing_partitions, ["stripe"])


async def status(settings: Settings) -> dict[str, Any]:
    """One object: `groups` with a row a partition, totals a group, and dead letters. Times in ms, ages in seconds."""
    log = await current_log(kafka_admin(settings))
    where = settings.kafka_bootstrap, settings.kafka_security()
    log_ends = await ends(*where, log.topic, range(log.partitions))
    bill_ends = await ends(*where, METER_EVENTS.name, range(log.billing_partitions))
    letters = await ends(*where, DEAD_LETTERS.name, range(log.partitions))
    found = await all_checkpoints(settings, log)
    now_ms = time.time_ns() // 1_000_000
    groups = {
        group: _group([_row(found.get((group, n)), n, end, now_ms) for n, end in sorted(group_ends.items())])
        for group, group_ends in (("accounts", log_ends), ("audit", log_ends), ("stripe", bill_ends))
    }
    return {
        "epoch": log.epoch,
        "partitions": log.partitions,
        "groups": groups,
        "dead_letters": sum(letters.values()),
    }


def _row(found: Checkpoint | None, number: int, end: int, now_ms: int) -> dict[str, Any]:
    if found is None:
        return {"partition": number, "end": end, "next_offset": None, "lag": end}
    row = {
        "partition": number,
        "end": end,
        "next_offset": found.next_offset,
        "lag": max(0, end - found.next_offset),
        "checkpoint_age_s": max(0, now_ms - found.written_ms) // 1000,
        "checkpoint_bytes": found.size,
        **found.stats,
    }
    if found.stats.get("log_time_ms"):
        row["staleness_s"] = max(0, now_ms - found.stats["log_time_ms"]) // 1000
    return row


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    refused: dict[str, int] = {}
    for row in rows:
        for reason, count in row.get("refused", {}).items():
            refused[reason] = refused.get(reason, 0) + count
    return {
        "lag": sum(row["lag"] for row in rows),
        "standing_s": max((row.get("checkpoint_age_s", 0) for row in rows if row["lag"]), default=0),
        "missing": sum(row.get("missing", 0) for row in rows),
        "duplicates": sum(row.get("duplicates", 0) for row in rows),
        "refused": refused,
        "not_open": [row["partition"] for row in rows if row.get("open") is False],
        "partitions": rows,
    }
