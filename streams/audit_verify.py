"""Is the audit log whole and unchanged? (a) usage_log against the manifest and Kafka, (b) usage_events against usage_log.

(a) costs one pass in the database: record, block and chain hashes are computed again from the rows. (b) reads the raw bytes
back, decodes and judges them as the workers did, and compares every column of every row with what they would have written.
"""

import time
from collections.abc import Callable, Mapping

from tollway.connectors.clickhouse import AuditStore
from tollway.streams.audit_partition import PartitionProof, Rejudge
from tollway.streams.audit_report import Place, Report
from tollway.streams.state import PartitionState

SETTLE_POLL_S = 0.25

Checkpoints = Mapping[Place, tuple[int, bytes]]
"""(epoch, partition) → (next offset, chain hash before it), from the audit group's newest checkpoints in Kafka."""


def verify(
    store: AuditStore,
    checkpoints: Checkpoints | None,
    *,
    rejudge: Rejudge | None,
    partitions: int,
    settle_s: float = 10.0,
    wait: Callable[[float], None] = time.sleep,
    progress: Callable[[int, int], None] | None = None,
    first: Callable[[Place], PartitionState | None] = lambda _: None,
) -> Report:
    """Prove no gap, no double and no change, or name where. Reads only; workers may go on meanwhile.

    Without `checkpoints` a cut tail does not show, without `rejudge` usage_events is not looked at: the report says so.
    `partitions` = the log's partition count. What lay beyond the newest manifest row when this began must be behind one
    within `settle_s`. `progress` gets (records done, records in all). `first`: what a partition was before its first record,
    where that is not nothing. Raises Unavailable or Fatal as the store does.
    """
    report = Report()
    ends = _ends(store)
    places = sorted({place for found in ends.values() for place in found} | set(checkpoints or ()))
    total = sum(end + 1 for end in ends["audit_manifest"].values())
    for place in places:
        born = first(place) or PartitionState(place[1], partitions, place[0])
        PartitionProof(store, report, place, (checkpoints or {}).get(place)).run(rejudge, born)
        report.partitions += 1
        if progress is not None:
            progress(report.records, total)
    _check_places(report, places, checkpoints)
    _check_sealed(store, report, ends, settle_s, wait)
    if rejudge is None:
        report.unproven.append("usage_events: not judged again")
    return report


def _ends(store: AuditStore) -> dict[str, dict[Place, int]]:
    """table → (epoch, partition) → its last offset."""
    columns = {"usage_log": "kafka_offset", "usage_events": "kafka_offset", "audit_manifest": "last_offset"}
    return {
        table: {
            (row["epoch"], row["kafka_partition"]): row["end"]
            for row in store.rows(
                f"SELECT epoch, kafka_partition, max({column}) AS end FROM {table} GROUP BY epoch, kafka_partition"
            )
        }
        for table, column in columns.items()
    }


def _check_places(report: Report, places: list[Place], checkpoints: Checkpoints | None) -> None:
    """Partitions that Kafka does not know: foreign rows where it knows others of the epoch, else an older log."""
    if checkpoints is None:
        report.unproven.append("tails: no checkpoints given")
        return
    epochs = {epoch for epoch, _ in checkpoints}
    for epoch, partition in places:
        if (epoch, partition) in checkpoints:
            continue
        if epoch in epochs:
            end = report.chains.get((epoch, partition), (0, b""))[0]
            report.add(
                "checkpoint", epoch, partition, 0, max(0, end - 1), "Kafka has no audit checkpoint of this partition"
            )
        else:
            report.unproven.append(f"tail of partition {partition} of {epoch}: Kafka has no checkpoint of that log")


def _check_sealed(
    store: AuditStore, report: Report, ends: dict[str, dict[Place, int]], settle_s: float, wait: Callable[[float], None]
) -> None:
    """Rows that lay beyond the manifest at the start are an insert under way, and sealed soon, or nobody's."""
    give_up = time.monotonic() + settle_s
    while True:
        sealed = _ends(store)["audit_manifest"]
        beyond = [
            (table, *place, sealed.get(place, -1) + 1, end)
            for table in ("usage_log", "usage_events")
            for place, end in sorted(ends[table].items())
            if end > sealed.get(place, -1)
        ]
        if not beyond or time.monotonic() > give_up:
            break
        wait(SETTLE_POLL_S)
    for fault in beyond:
        report.add(
            *fault, "rows beyond the newest manifest row: foreign, or of a worker that ended in an insert: start it"
        )
