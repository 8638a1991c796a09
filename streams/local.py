"""`tollway up`: the local stack with its topics, tables, meters and workers, supervised until Ctrl-C."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tollway.connectors.embedded.process import LOOPBACK, Child, free_port
from tollway.connectors.embedded.stack import Endpoints, Stack, answers_ok
from tollway.streams import settings as settings_module
from tollway.streams.settings import Settings
from tollway.streams.worker import GROUPS

Progress = Callable[[str], None]

LOCAL_ENVIRONMENT = {
    "TOLLWAY_SESSION_TIMEOUT_MS": "2000",
    "TOLLWAY_TICK_IDLE_S": "2",
    "TOLLWAY_CHECKPOINT_S": "3",
}
"""On one machine: dead workers are noticed sooner, idle partitions close their windows sooner."""
TEST_WINDOWS = {"billing_window_s": 10, "billing_grace_s": 5, "snapshot_s": 60}


def run_up(settings: Settings, *, test_windows: bool, workers: bool) -> None:
    """Start all, say where it is, wait for a signal, stop all. Raises Refused and Fatal in one sentence."""
    progress = timed_progress()
    stack = local_stack(settings.data, progress, test_windows=test_windows, workers=workers)
    with stack:  # a signal that comes before `run_until_signal` listens stops all too
        _say_where(stack, progress)
        stack.run_until_signal()


def _say_where(stack: Stack, progress: Progress) -> None:
    where = stack.endpoints
    progress(
        f"ready: Kafka {where.kafka_bootstrap}, ClickHouse {where.clickhouse_host}:{where.clickhouse_port}, data in {stack.data}"
    )
    progress("press Ctrl-C to stop")


def timed_progress() -> Progress:
    """Sentences with the seconds since the start, on standard error."""
    begun = time.monotonic()

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - begun:6.1f} s  {line}\n")
        sys.stderr.flush()

    return progress


def local_stack(
    data: Path, progress: Progress, *, test_windows: bool = False, workers: bool = True, brokers: int = 1
) -> Stack:
    """The stack of a data folder, not started: parts, then `prepare`, then one worker a group. `brokers`: 1 or 3."""
    data = data.absolute()
    windows = TEST_WINDOWS if test_windows else {}

    def prepare(endpoints: Endpoints) -> None:
        del endpoints  # read back from stack.json, as every other process does
        asyncio.run(prepare_log(settings_module.read(data=data, **windows), progress))

    return Stack(
        data,
        workers=(lambda _: [worker_child(data, group) for group in GROUPS]) if workers else None,
        prepare=prepare,
        progress=progress,
        kafka_settings={"group.min.session.timeout.ms": "500"},
        brokers=brokers,
    )


async def prepare_log(settings: Settings, progress: Progress) -> None:
    """Topics with their first records, and ClickHouse's tables."""
    from tollway.streams.bootstrap import create
    from tollway.streams.wiring import audit_store

    done = await create(settings)
    progress(f"log {done['epoch']}, {done['partitions']} partitions")
    store = audit_store(settings)
    try:
        await asyncio.to_thread(store.migrate)
    finally:
        store.close()


def worker_child(data: Path, group: str, name: str | None = None) -> Child:
    """A worker as a child: ready once its engine answers on its health port."""
    port = free_port()
    return Child(
        name or f"worker-{group}",
        (sys.executable, "-m", "tollway.streams.cli", "worker", "--group", group, "--data", str(data)),
        ready=lambda: answers_ok(f"http://{LOOPBACK}:{port}/health"),
        env={**LOCAL_ENVIRONMENT, "TOLLWAY_HEALTH_PORT": str(port)},
        ready_deadline_s=90.0,
        stop_deadline_s=8.0,
    )
