"""A partition's log over many boundaries: usage, copies, holes, commands, poison and ticks; and a fold driven over it."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from random import Random
from typing import Any

import msgpack

from tests.load import emitted_fields, midway, opening, traffic, world
from tests.records import CONFIG, PARTITIONS, SIGNER, Raw, command, raw, source
from tollway.connectors.clickhouse import AuditStore
from tollway.schemas.lane import lane
from tollway.schemas.topics import TICK_KEY
from tollway.streams.bootstrap import first_states
from tollway.streams.owned import as_records
from tollway.streams.refold import Row, folds
from tollway.streams.seal import Seal
from tollway.streams.state import PartitionState

T0_MS = 1_790_000_010_000
SNAPSHOT_S = 60
SHORT = dataclasses.replace(CONFIG, billing_window_s=10, billing_grace_s=5, snapshot_s=SNAPSHOT_S, step_s=2)
NOWHERE = AuditStore("127.0.0.1", 1, "", "")
"""Never asked."""


class Writer:
    """Appends the records of one partition; the broker's clock moves with each."""

    def __init__(self, seed: int, partition: int) -> None:
        self.random, self.partition = Random(seed), partition
        self.now_ms, self.rows, self.sequences = T0_MS, list[Row](), defaultdict[int, int](int)
        self.source = source(seed, T0_MS - 60_000)

    def append(self, record: Raw) -> None:
        key, value, headers, _ = record
        self.rows.append(Row(len(self.rows), self.now_ms, key, value, headers))

    def command(self, account: str, kind: str, body: dict[str, Any]) -> None:
        self.append(command(account, kind, body, self.now_ms, number=len(self.rows)))

    def usage(self, call: dict[str, Any]) -> Raw:
        """The record of a call, in sequence."""
        fields = emitted_fields(call, self.now_ms * 1000)
        self.sequences[lane(fields["account"])] += 1
        event = {
            "event_id": source(self.random.getrandbits(60), self.now_ms),
            "source": self.source,
            "sequence": self.sequences[lane(fields["account"])],
            **fields,
        }
        return raw(event, self.now_ms)

    def here(self, account: str) -> bool:
        return account == "*" or lane(account) % PARTITIONS == self.partition


def written(seed: int, partition: int = 0, calls: int = 900) -> list[Row]:
    """The partition's records: about `calls` / 3 of them, over three boundaries and more."""
    writer, made = Writer(seed, partition), world(seed, 40, 4)
    chance = writer.random
    writer.command("*", "log.open", SHORT.body())
    for account, kind, body in opening(made):
        if writer.here(account):
            writer.command(account, kind, body)
    late: list[Raw] = []
    for number, call in enumerate(traffic(made, seed, "w", 0, calls, 1)):
        if number % (calls // 3) == calls // 6:
            writer.now_ms += SNAPSHOT_S * 1000  # however few records there are: boundaries
        if number == calls // 2:
            for account, kind, body in midway(made):
                if writer.here(account):
                    writer.command(account, kind, body)
        if not writer.here(call["account"]):
            continue
        writer.now_ms += chance.randrange(3_000)
        record = writer.usage(call)
        if chance.random() < 0.05:
            late.append(record)  # a hole until it comes
        else:
            writer.append(record)
        if chance.random() < 0.05:
            writer.append(record)
        if chance.random() < 0.02:
            writer.append((b"x", b"\0poison", (), 0))
        if chance.random() < 0.05 and late:
            writer.append(late.pop(chance.randrange(len(late))))
        if chance.random() < 0.02:
            for _ in range(chance.randrange(12)):  # silence: only ticks move log time
                writer.now_ms += 10_000
                writer.append((TICK_KEY, None, (), 0))
    return writer.rows


def fresh(group: str, partition: int = 0) -> dict[str, Any]:
    """Dump of a state that has folded nothing."""
    return first_states(CONFIG.epoch, partition, PARTITIONS)[group]


async def folded(
    group: str, rows: list[Row], cuts: Iterable[int] = (), *, restarts: Iterable[int] = (), partition: int = 0
) -> tuple[PartitionState, list[Seal]]:
    """Fold in stretches that end at `cuts`; at `restarts` the state goes through its checkpoint's bytes and back."""
    fold = folds(CONFIG.epoch, PARTITIONS, SIGNER.public_key, NOWHERE)[group]
    state, sealed, stash, stops = fold.load(partition, fresh(group, partition)), list[Seal](), list[Row](), {*restarts}
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        stash += rows[start:end]
        while count := fold.ready(state, stash):
            sealed += (await fold.take(state, as_records(stash[:count]))).seals
            del stash[:count]
        if number in stops:
            fold = folds(CONFIG.epoch, PARTITIONS, SIGNER.public_key, NOWHERE)[group]
            bytes_of_checkpoint = msgpack.packb(state.dump())
            state = fold.load(partition, msgpack.unpackb(bytes_of_checkpoint, strict_map_key=False))
            stash = rows[state.next_offset : end]
    return state, sealed
