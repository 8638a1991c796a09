"""A stack under the demo's load while parts are taken away: what was emitted, what each side holds, and the log without a gap."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.process import poll
from tollway.connectors.embedded.stack import Stack
from tollway.connectors.kafka import Admin, log_partitions, started_producer
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import new_command_id
from tollway.streams.demo import POLICY
from tollway.streams.demo_books import (
    Books,
    differences,
    event_name,
    read_clickhouse,
    read_kafka,
    read_redis,
    read_stripe,
    services_book,
)
from tollway.streams.demo_service import ACCOUNTS, METERS, SERVICES
from tollway.streams.settings import Settings
from tollway.streams.wiring import audit_store, stripe_port

SETTLE_S = 120.0
GAPS_SQL = """
SELECT kafka_partition AS number, count() AS rows, uniqExact(kafka_offset) AS offsets, max(kafka_offset) + 1 AS next
FROM usage_log GROUP BY kafka_partition
"""


def until(condition: Callable[[], bool], what: str, deadline_s: float = 90.0) -> None:
    """Wait for a condition; fail at the deadline."""
    for _ in poll(deadline_s, every_s=0.2):
        if condition():
            return
    pytest.fail(f"not within {deadline_s:.0f} s: {what}")


class Services:
    """The demo's services, each a process of its own with a spool of its own."""

    def __init__(self, settings: Settings, seconds: float, rate: float) -> None:
        self.running = []
        for name in SERVICES:
            argv = [sys.executable, "-m", "tollway.streams.demo_service", "--bootstrap", settings.kafka_bootstrap]
            argv += ["--service", name, "--spool", str(settings.data / "spool" / name)]
            argv += ["--seconds", str(seconds), "--rate", str(rate)]
            self.running.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))

    def reports(self, deadline_s: float = 120.0) -> list[dict[str, Any]]:
        """What they emitted; all of it is acknowledged."""
        found = []
        for process in self.running:
            out, _ = process.communicate(timeout=deadline_s)
            assert process.returncode == 0, out
            found.append(json.loads(out))
        assert [report["refused"] for report in found] == [0] * len(found)
        return found

    def kill(self) -> None:
        """At a test's end."""
        for process in self.running:
            process.kill()
            process.wait()


class World:
    """One stack with its accounts open and its meters declared."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.settings: Settings = settings_module.read(data=stack.data)
        self.since_s = int(time.time())
        self.customers: dict[str, str] = {}
        asyncio.run(self._open())

    async def _open(self) -> None:
        settings, port = self.settings, stripe_port(self.settings)
        self.partitions = await log_partitions(Admin(settings.kafka_bootstrap))
        producer = await started_producer(settings.kafka_bootstrap, {})
        control = Control(producer, Signer.read(settings.data / "control.key"), self.partitions, new_command_id)
        try:
            for meter in METERS:
                await port.ensure_meter(event_name(meter))
                await control.broadcast("meter.add", {"meter": meter, "event_name": event_name(meter)})
            for account in ACCOUNTS:
                self.customers[account] = await port.ensure_customer(account)
                await control.send(account, "account.open", {"name": account.title()})
                await control.send(account, "customer.bind", {"customer": self.customers[account]})
                await control.send(account, "policy.set", POLICY)
        finally:
            await producer.stop()
            await port.close()

    def settled(self, reports: list[dict[str, Any]]) -> list[str]:
        """Wait until Kafka, ClickHouse, Redis and Stripe agree with the services; what still differs then."""
        wrong: list[str] = []
        for _ in poll(SETTLE_S, every_s=2.0):
            books = asyncio.run(self._books(reports))
            wrong = [str(difference) for difference in differences(books)]
            if not wrong:
                break
        return wrong + self.gaps()

    async def _books(self, reports: list[dict[str, Any]]) -> Books:
        port = stripe_port(self.settings)
        try:
            sides = [
                await read_kafka(self.settings, self.partitions),
                await read_clickhouse(self.settings),
                await read_redis(self.settings),
                await read_stripe(port, self.customers, self.since_s, int(time.time())),
            ]
        finally:
            await port.close()
        return Books([services_book(reports, 0), *sides])

    def gaps(self) -> list[str]:
        """Each partition's offsets stand in the audit log once and without a gap. Ticks behind its last event follow later."""
        store = audit_store(self.settings)
        try:
            rows = store.rows(GAPS_SQL)
        finally:
            store.close()
        return [f"usage_log: {row}" for row in rows if not row["rows"] == row["offsets"] == row["next"]]
