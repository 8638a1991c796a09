"""Peer: Bytewax, its Kafka source and `stateful_batch` keyed by principal, sums to Redis, its recovery store (SQLite) on.

Whole batches at every step: a mapping per event would cost it more. It resumes source offsets and sums from one epoch.
"""

import tempfile
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import redis
from bytewax._bytewax import cli_main
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from work import BATCH, TOPIC, Stopwatch, decode, given, start_of

NAME = "bytewax"
Counted = tuple[int, dict[str, int]]
"""(start of the window, quantities)."""


class From(KafkaSource):  # type: ignore[type-arg]
    """Its Kafka source with a first offset per partition."""

    def __init__(self, bootstrap: str, starts: dict[int, int]) -> None:
        super().__init__([bootstrap], [TOPIC], tail=False, batch_size=BATCH)
        self.starts = starts

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> Any:
        if resume_state is None:
            resume_state = self.starts[int(for_part.partition("-")[0])]
        return super().build_part(step_id, for_part, resume_state)


class Totals(StatefulBatchLogic):  # type: ignore[type-arg]
    """Sums of one principal."""

    def __init__(self, totals: dict[str, int] | None) -> None:
        self.totals = totals or {}

    def on_batch(self, values: list[Counted]) -> tuple[Iterable[dict[str, int]], bool]:
        totals, changed = self.totals, {}
        for start, quantities in values:
            for meter, units in quantities.items():
                field = f"{meter} m:{start}"
                changed[field] = totals[field] = totals.get(field, 0) + units
        return [changed], StatefulBatchLogic.RETAIN

    def snapshot(self) -> dict[str, int]:
        return dict(self.totals)


class Shown(DynamicSink, StatelessSinkPartition):  # type: ignore[type-arg]
    """Sums → Redis."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)

    def build(self, step_id: str, worker_index: int, worker_count: int) -> "Shown":
        return self

    def write_batch(self, items: list[tuple[str, dict[str, int]]]) -> None:
        pipe = self.client.pipeline(transaction=False)
        for principal, fields in items:
            pipe.hset(f"{NAME}:{principal}", mapping=fields)
        pipe.execute()


def main() -> None:
    arguments = given(__doc__)
    watch: list[Stopwatch] = []

    def counted(messages: list[KafkaSourceMessage]) -> list[tuple[str, Counted]]:  # type: ignore[type-arg]
        if not watch:
            watch.append(Stopwatch())
        events = (decode(message.value) for message in messages)
        return [(event["principal"], (start_of(event), event["quantities"])) for event in events if event is not None]

    flow = Dataflow(f"{NAME}_{time.time_ns()}")
    records = op.input("records", flow, From(arguments.bootstrap, arguments.starts))
    usage = op.flat_map_batch("usage", records, counted)
    op.output("shown", op.stateful_batch("sums", usage, Totals), Shown(arguments.redis))
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "recovery"
        store.mkdir()
        init_db_dir(store, 1)
        cli_main(flow, epoch_interval=timedelta(seconds=arguments.safe_s), recovery_config=RecoveryConfig(store))
        watch[0].tell(arguments.events)


if __name__ == "__main__":
    main()
