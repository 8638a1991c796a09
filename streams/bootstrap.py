"""A new log: its topics, the first checkpoint of every group and partition, then `log.open`, in that order.

Each step looks at what is there, so that a run that was interrupted is finished by the next. A worker that finds no valid
checkpoint refuses to start: it never guesses that a log is new.
"""

import secrets
import time
from typing import Any

from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Refused
from tollway.connectors.kafka import current_log, ends, epoch_of, started_producer
from tollway.schemas.command import LogConfig
from tollway.schemas.ids import uuid7_hex
from tollway.schemas.topics import CHECKPOINTS, USAGE, growths
from tollway.streams import checkpoint
from tollway.streams.accounts import PARTS as ACCOUNTS_PARTS
from tollway.streams.audit_fold import PARTS as AUDIT_PARTS
from tollway.streams.settings import Settings
from tollway.streams.state import FOLD_VERSION, PartitionState
from tollway.streams.stripe_fold import fresh as stripe_fresh
from tollway.streams.topic_faults import refuse_replication, refuse_unsafe
from tollway.streams.wiring import kafka_admin


def new_command_id() -> str:
    """A command's id, from this process's clock and randomness."""
    return uuid7_hex(time.time_ns() // 1_000_000, secrets.randbits(74))


def log_config(settings: Settings, signer: Signer, epoch: str) -> LogConfig:
    """The configuration that `log.open` fixes for ever."""
    return LogConfig(
        epoch=epoch,
        deployment=settings.deployment,
        kid=signer.kid,
        public_key=signer.public_key,
        step_s=settings.step_s,
        billing_window_s=settings.billing_window_s,
        billing_grace_s=settings.billing_grace_s,
        snapshot_s=settings.snapshot_s,
        hold_grace_s=settings.hold_grace_s,
        auto_open=settings.auto_open,
    )


def first_states(epoch: str, partition: int, partitions: int) -> dict[str, dict[str, Any]]:
    """group → dump of a state that has folded nothing."""
    fresh = {
        group: PartitionState(partition, partitions, epoch, parts={name: kind() for name, kind in parts.items()}).dump()
        for group, parts in (("accounts", ACCOUNTS_PARTS), ("audit", AUDIT_PARTS))
    }
    return {**fresh, "stripe": stripe_fresh()}


async def create(settings: Settings) -> dict[str, Any]:
    """Create what is missing. Raises Refused where what is there does not fit or is unsafe. Returns what was done."""
    refuse_replication(settings.replication)
    if settings.partitions & (settings.partitions - 1):
        raise Refused(f"TOLLWAY_PARTITIONS is {settings.partitions}: give a power of two from 1 to 256")
    signer = Signer.read(settings.data / "control.key", create=True)
    if settings.public_key and settings.public_key != signer.public_key:
        raise Refused("TOLLWAY_PUBLIC_KEY is not that of <data>/control.key: log.open could not be signed")
    admin = kafka_admin(settings)
    if any(growths(await admin.partitions())):
        await refuse_unsafe(settings)
        log = await current_log(admin)
        return {"created": [], "epoch": log.epoch, "partitions": log.partitions, "opened": []}
    created = await admin.create(settings.partitions, settings.replication)
    epoch = epoch_of(await admin.new_topic_id(USAGE.name))
    await refuse_unsafe(settings)
    security = settings.kafka_security()
    log_ends = await ends(settings.kafka_bootstrap, security, USAGE.name, range(settings.partitions))
    empty = [number for number, end in sorted(log_ends.items()) if end == 0]
    producer = await started_producer(settings.kafka_bootstrap, security)
    try:
        for number in empty:
            for group, state in first_states(epoch, number, settings.partitions).items():
                for key, value in _first(group, epoch, number, state):
                    await producer.send_and_wait(CHECKPOINTS.name, value, key=key, partition=number)
        if empty:
            body = log_config(settings, signer, epoch).body()
            await Control(producer, signer, settings.partitions, new_command_id).open(body, empty)
    finally:
        await producer.stop()
    return {"created": created, "epoch": epoch, "partitions": settings.partitions, "opened": empty}


def _first(group: str, epoch: str, partition: int, state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    return checkpoint.encode(
        group=group,
        epoch=epoch,
        partition=partition,
        slot=0,
        next_offset=0,
        turn=0,
        written_ms=time.time_ns() // 1_000_000,
        fold_version=FOLD_VERSION,
        stats={},
        state=state,
    )
