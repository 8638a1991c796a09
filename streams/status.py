"""What the pipeline stands at: groups, partitions, lag, log time, staleness, checkpoints, holes. Read from Kafka alone."""

import time
from typing import Any

from tollway.connectors.kafka import ends, epoch_of, log_partitions
from tollway.schemas.topics import DEAD_LETTERS, METER_EVENTS, USAGE
from tollway.streams.checkpoint import Checkpoint
from tollway.streams.checkpoint_log import newest_checkpoints
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin

GROUP_TOPICS = {"accounts": USAGE.name, "audit": USAGE.name, "stripe": METER_EVENTS.name}


async def checkpoints_of(
    settings: Settings, epoch: str, partitions: int, groups: list[str]
) -> dict[tuple[str, int], Checkpoint]:
    """(group, partition) → newest valid checkpoint; those that have none are left out."""
    fenced = {group: group == "stripe" for group in groups}
    newest = await newest_checkpoints(
        settings.kafka_bootstrap, settings.kafka_security(), epoch, fenced, range(partitions)
    )
    return newest.found


async def status(settings: Settings) -> dict[str, Any]:
    """One object: `groups` with a row a partition, totals a group, and dead letters. Times in ms, ages in seconds."""
    admin = kafka_admin(settings)
    partitions = await log_partitions(admin)
    epoch = epoch_of(await admin.topic_id(USAGE.name))
    security = settings.kafka_security()
    topic_ends = {
        topic: await ends(settings.kafka_bootstrap, security, topic, range(partitions))
        for topic in (USAGE.name, METER_EVENTS.name, DEAD_LETTERS.name)
    }
    found = await checkpoints_of(settings, epoch, partitions, list(GROUP_TOPICS))
    now_ms = time.time_ns() // 1_000_000
    groups = {
        group: _group([_row(found.get((group, n)), n, topic_ends[topic][n], now_ms) for n in range(partitions)])
        for group, topic in GROUP_TOPICS.items()
    }
    letters = sum(topic_ends[DEAD_LETTERS.name].values())
    return {"epoch": epoch, "partitions": partitions, "groups": groups, "dead_letters": letters}


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
