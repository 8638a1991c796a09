"""`tollway fold`: by which version each partition is folded, and the command that lets the next one count from a step on.

The version and its step stand in the log, so every worker, and every replay, switches at the same record. A worker that does
not know the version stops at that step (`state.NewerFold`); `change` asks first whether all of them know it.
"""

import hashlib
import time
from collections.abc import Iterable
from typing import Any

from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import current_log, started_producer
from tollway.streams.bootstrap import new_command_id
from tollway.streams.checkpoint import Checkpoint
from tollway.streams.directory import Directory
from tollway.streams.seal import GROUPS
from tollway.streams.settings import Settings
from tollway.streams.state import FOLD_VERSION
from tollway.streams.status import checkpoints_of
from tollway.streams.wiring import kafka_admin

SHOWN_MAX = 8
"""Partitions that a refusal names."""


async def fold_versions(settings: Settings) -> dict[str, Any]:
    """`known` = newest version of this build; a row a partition of each group of the log, as of its newest checkpoint.

    A row: `version` in effect, `changes` (version → time in s) that the log has told, `worker` = newest version that the worker
    knows which wrote the checkpoint. Raises Refused where a checkpoint is missing.
    """
    log = await current_log(kafka_admin(settings))
    found = await checkpoints_of(settings, log.epoch, log.partitions, list(GROUPS))
    places = [(group, number) for group in GROUPS for number in range(log.partitions)]
    if missing := [place for place in places if place not in found]:
        raise Refused(
            f"{_named(missing)}: no checkpoint; run `tollway topics create`, or `tollway rebuild checkpoints`"
        )
    return {
        "epoch": log.epoch,
        "topic": log.topic,
        "known": FOLD_VERSION,
        "partitions": [_row(place, found[place]) for place in places],
    }


def _row(place: tuple[str, int], found: Checkpoint) -> dict[str, Any]:
    directory = Directory.load(found.state["directory"])
    return {
        "group": place[0],
        "partition": place[1],
        "version": directory.fold_version,
        "changes": directory.fold_changes,
        "worker": found.fold_version,
    }


def refusal(shown: dict[str, Any], version: int) -> str | None:
    """Why `version` cannot be the next one, in a sentence with its cure; None where it can. Pure."""
    rows = shown["partitions"]
    if version > shown["known"]:
        return (
            f"VERSION is {version}: this build folds by versions up to {shown['known']}; use the newer build's command"
        )
    newest = max(max(row["changes"], default=1) for row in rows)
    if version not in (newest, newest + 1) or version < 2:
        return f"VERSION is {version}: the log folds by version {newest}, the next is {newest + 1}"
    old = [(row["group"], row["partition"]) for row in rows if row["worker"] < version]
    if old:
        least = min(row["worker"] for row in rows)
        return (
            f"{_named(old)}: written by workers that know versions up to {least}: deploy the newer build to every worker, "
            "wait for a checkpoint (TOLLWAY_CHECKPOINT_S), and say it again"
        )
    return None


async def change_fold(settings: Settings, version: int, in_s: int) -> dict[str, Any]:
    """Sign and append `fold.change` to every partition that lacks it. Raises Refused before anything is written.

    What was interrupted is finished by the next run: with the same command id, and the time that the log has already.
    """
    signer = Signer.read(settings.data / "control.key")
    shown = await fold_versions(settings)
    if (reason := refusal(shown, version)) is not None:
        raise Refused(reason)
    told = [row["changes"][version] for row in shown["partitions"] if version in row["changes"]]
    at_s = max(told, default=int(time.time()) + in_s)
    answer: dict[str, Any] = {"version": version, "at_s": at_s, "offsets": {}}
    if len(told) == len(shown["partitions"]):
        return answer
    command_id = hashlib.sha256(f"{shown['epoch']}|fold.change|{version}".encode()).hexdigest()[:32]
    partitions = len(shown["partitions"]) // len(GROUPS)
    producer = await started_producer(settings.kafka_bootstrap, settings.kafka_security())
    try:
        control = Control(producer, signer, partitions, new_command_id, topic=shown["topic"])
        offsets = await control.broadcast("fold.change", {"version": version, "at_s": at_s}, command_id)
    finally:
        await producer.stop()
    return {**answer, "offsets": offsets}


def _named(places: Iterable[tuple[str, int]]) -> str:
    """Groups and partitions, the first few."""
    numbers: dict[str, list[int]] = {}
    for group, number in places:
        numbers.setdefault(group, []).append(number)
    return "; ".join(
        f"group {group}, partition{'s' if len(found) > 1 else ''} {', '.join(map(str, found[:SHOWN_MAX]))}"
        + (f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else "")
        for group, found in numbers.items()
    )
