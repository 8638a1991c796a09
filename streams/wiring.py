"""The one place where settings become connections."""

import asyncio
import logging
from typing import Any

from redis.asyncio import Redis

from tollway.connectors.clickhouse import AuditStore
from tollway.connectors.errors import Unavailable
from tollway.connectors.kafka import Admin
from tollway.connectors.redis import connect
from tollway.connectors.snapshots import SnapshotStore
from tollway.connectors.stripe import StripePort
from tollway.streams.bindings_view import BindingsView
from tollway.streams.quota_view import QuotaView
from tollway.streams.settings import Settings
from tollway.streams.snapshot_copy import SnapshotCopies
from tollway.streams.views import Views

log = logging.getLogger(__name__)


def kafka_admin(settings: Settings) -> Admin:
    """Questions about topics, and their making."""
    return Admin(settings.kafka_bootstrap, settings.admin_security(), timeout_s=settings.kafka_admin_timeout_s)


def audit_store(settings: Settings) -> AuditStore:
    """ClickHouse, connected at first use."""
    return AuditStore(
        settings.clickhouse_host,
        settings.clickhouse_port,
        settings.clickhouse_user,
        settings.clickhouse_password.get_secret_value(),
        settings.clickhouse_database,
        secure=settings.clickhouse_secure,
        ca_file=settings.clickhouse_ca_file,
        timeout_s=settings.clickhouse_timeout_s,
    )


def stripe_port(settings: Settings) -> StripePort:
    """Stripe, or the stand-in of the local stack."""
    return StripePort(settings.stripe_key.get_secret_value(), settings.stripe_url)


def redis_client(settings: Settings) -> Redis:
    """Redis or Valkey with a pool that queues instead of failing."""
    return connect(settings.redis_url.get_secret_value(), ca_file=settings.redis_ca_file)


class Parts:
    """What a worker's folds are connected to: made when first asked for, closed together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._view: QuotaView | None = None
        self._bindings: BindingsView | None = None
        self._store: AuditStore | None = None
        self._stripe: StripePort | None = None
        self._copies: SnapshotCopies | None = None

    async def views(self, epoch: str, partitions: int) -> Views:
        """The Redis views of quota totals and of bindings, their tasks running."""
        self._view = QuotaView(redis_client(self._settings), epoch)
        await self._view.start()
        self._bindings = BindingsView(redis_client(self._settings), epoch, partitions)
        await self._bindings.start()
        return Views([self._view, self._bindings])

    async def audit_store(self) -> AuditStore:
        """The audit log's database."""
        self._store = audit_store(self._settings)
        try:
            await asyncio.to_thread(self._store.command, "SELECT 1")
        except Unavailable as error:
            log.warning("%s: blocks wait until it is back", error)
        return self._store

    def snapshot_copies(self, epoch: str, store: AuditStore) -> SnapshotCopies:
        """Brings sealed snapshots to ClickHouse, its task running."""
        settings = self._settings
        self._copies = SnapshotCopies(settings.kafka_bootstrap, settings.kafka_security(), SnapshotStore(store), epoch)
        self._copies.start()
        return self._copies

    async def stripe(self) -> StripePort:
        """The rail."""
        self._stripe = stripe_port(self._settings)
        return self._stripe

    def figures(self) -> dict[str, Any]:
        """name → reader of figures for the health answer."""
        return {
            "view": lambda: self._view.stats() if self._view else {},
            "snapshots": lambda: self._copies.stats() if self._copies else {},
            "bindings": lambda: self._bindings.stats() if self._bindings else {},
        }

    async def close(self) -> None:
        """Let go of everything that was connected."""
        for view in (self._view, self._bindings):
            if view is not None:
                await view.close()
        if self._copies is not None:
            await self._copies.close()
        if self._store is not None:
            self._store.close()
        if self._stripe is not None:
            await self._stripe.close()
