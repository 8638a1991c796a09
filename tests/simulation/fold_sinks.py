"""ClickHouse and Stripe in memory: inserts that stop halfway, tokens that are known, identifiers that are forgotten after a day."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from tests.simulation.fold_loop import Process
from tests.simulation.fold_network import ACK_LOST, Away, Network
from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.embedded.stripe_state import DUPLICATE, ApiError, StripeState
from tollway.connectors.errors import Fatal, Unavailable
from tollway.connectors.stripe import Delivered, Duplicate, Meter, Outcome, Rejected, Retry, Unknown

TOKENS_MAX = 30
"""Insert tokens that a table remembers: few, so that they are no net."""


class ClickHouse:
    """The server: rows by table as they came, and the tokens it remembers."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.away = self.refuses = False
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.heard: Callable[[str, list[dict[str, Any]]], None] = lambda table, rows: None
        self._tokens: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=TOKENS_MAX))

    def insert(self, table: str, rows: list[dict[str, Any]], token: str) -> None:
        """Rows under a known token are dropped without a word."""
        if self.refuses:
            raise Fatal("ClickHouse refuses (code 243): no space")
        if token in self._tokens[table]:
            return
        self._tokens[table].append(token)
        self.rows[table] += rows
        self.heard(table, rows)


COLUMNS = {
    "usage_log": ["epoch", "kafka_partition", "kafka_offset", "append_time", "kind", "record_key", "raw"],
    "usage_events": ["epoch", "kafka_partition", "kafka_offset", "kind", "verdict", "reason", "account", "sequence"],
}


class Store(AuditStore):
    """The product's own grouping, order and tokens, over the network above."""

    def __init__(self, server: ClickHouse) -> None:
        self._server = server
        self.steps: list[tuple[str, list[dict[str, Any]], str]] = []

    def _insert_into(self, table: str, rows: pa.Table, name: str) -> None:
        self.steps.append((table, rows.select(COLUMNS.get(table, rows.column_names)).to_pylist(), name))

    async def insert(self, blocks: Sequence[Any]) -> None:
        """A cancelled call goes on in its thread: that one is of the process, not of its caller."""
        if not blocks:
            return
        self.steps = []
        self._insert(blocks)
        await asyncio.shield(asyncio.get_running_loop().create_task(self._play(self.steps)))

    async def _play(self, steps: list[tuple[str, list[dict[str, Any]], str]]) -> None:
        server = self._server
        for table, rows, name in steps:
            Process.current()
            try:
                await server.network.call(lambda: server.insert(table, rows, name), away=server.away)  # noqa: B023
            except Away as error:
                raise Unavailable(f"ClickHouse does not answer: {error}") from error


class Stripe:
    """Stripe's own rules (the stand-in's) behind the network. `heard` is told of each call that arrives."""

    def __init__(self, network: Network, clock_s: Callable[[], int]) -> None:
        self.network, self.clock_s, self.state = network, clock_s, StripeState()
        self.away = self.busy = self.mute = False
        self.delay_s = 0
        self.heard: Callable[[str], None] = lambda identifier: None

    def open(self, event_names: list[str], customers: list[str]) -> None:
        """Meters and customers that exist."""
        for name in event_names:
            params = {"event_name": name, "display_name": name, "default_aggregation": {"formula": "sum"}}
            self.state.apply(self.state.judge_meter(params, self.clock_s(), f"mtr_{name}")[0])
        for customer in customers:
            self.state.apply(self.state.judge_customer({}, self.clock_s(), customer)[0])

    async def meters(self) -> dict[str, Meter]:
        await self._call(lambda: None)
        return {
            found["event_name"]: Meter(
                found["id"], found["event_name"], "sum", None, "active", False, "stripe_customer_id", "value"
            )
            for found in self.state.meters.values()
        }

    async def send(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        if self.busy and self.network.dice.random() < 0.7:
            return Retry(self.network.dice.choice((None, 3)), "lock_timeout")

        def serve() -> Outcome:
            self.heard(identifier)
            return self._accept(identifier, event_name, customer, units, timestamp_s)

        try:
            fate = ACK_LOST if self.mute else None
            return await self.network.call(serve, away=self.away, fate=fate)  # type: ignore[no-any-return]
        except Away as error:
            return Unknown(str(error))

    def _accept(self, identifier: str, event_name: str, customer: str, units: int, timestamp_s: int) -> Outcome:
        params = {
            "identifier": identifier,
            "event_name": event_name,
            "timestamp": str(timestamp_s),
            "payload": {"stripe_customer_id": customer, "value": str(units)},
        }
        try:
            self.state.apply(self.state.judge_event(params, self.clock_s(), "")[0])
        except ApiError as error:
            return Duplicate(str(error)) if str(error).startswith(DUPLICATE) else Rejected(str(error))
        return Delivered()

    async def summary(self, event_name: str, customer: str, hour_start_s: int) -> int:
        span = {"customer": customer, "start_time": str(hour_start_s), "end_time": str(hour_start_s + 3600)}
        found = await self._call(lambda: self.state.summaries(f"mtr_{event_name}", span, self.clock_s(), self.delay_s))
        return int(found[0]["aggregated_value"])

    async def _call(self, serve: Callable[[], Any]) -> Any:
        try:
            return await self.network.call(serve, away=self.away)
        except Away as error:
            raise Unavailable(f"Stripe does not answer: {error}") from error
