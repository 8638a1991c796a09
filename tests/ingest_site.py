"""The ingest endpoints over real HTTP, on a log, bindings and an issuer of their own; and the log's verdict on what they wrote."""

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from tests.issuer import AUDIENCE, Issuer
from tollway.connectors.bindings import BindingsWriter, Told
from tollway.connectors.cloudevents import BATCH, SINGLE
from tollway.connectors.embedded.process import free_port
from tollway.connectors.ingest import Ingest
from tollway.connectors.kafka import read_newest
from tollway.connectors.redis import connect
from tollway.schemas.topics import USAGE
from tollway.streams.batch import VERDICTS
from tollway.streams.control_plane import append_command
from tollway.streams.ingest import ingest_of
from tollway.streams.judge import cut, judge
from tollway.streams.owned import as_records
from tollway.streams.settings import Settings
from tollway.streams.state import PartitionState

PARTITIONS = 2
SECRET = "whsec_test"
CALL: dict[str, Any] = {
    "surface": "rest", "operation": "chat", "principal_kind": "user", "principal": "u1", "status": "ok", "latency_us": 5,
}  # fmt: skip


class Site:
    """One log and what leads to it."""

    def __init__(self, data: Path, bootstrap: str, redis_url: str, issuer: Issuer, epoch: str) -> None:
        self.issuer, self.epoch = issuer, epoch
        self.settings = Settings(
            data=data,
            kafka_bootstrap=bootstrap,
            redis_url=redis_url,
            replication=1,
            partitions=PARTITIONS,
            ingest_issuer=issuer.url,
            ingest_audience=AUDIENCE,
            ingest_jwks_url=issuer.jwks_url,
            ingest_attributes="team, region",
            ingest_port=free_port(),
            stripe_webhook_secret=SECRET,
        )

    @property
    def env(self) -> dict[str, str]:
        """The same settings for a process."""
        given = self.settings.model_dump(include=self.settings.model_fields_set)
        return {
            f"TOLLWAY_{name.upper()}": getattr(value, "get_secret_value", lambda v=value: str(v))()
            for name, value in given.items()
        }

    async def bind(self, *subjects: str, account: str = "acme", operations: tuple[str, ...] = ()) -> None:
        """Clients' tokens, bound as the fold binds them."""
        client = connect(self.settings.redis_url.get_secret_value())
        writer = BindingsWriter(client, self.epoch, PARTITIONS)
        now_ms = time.time_ns() // 1_000_000
        told = [
            Told(self.issuer.url, "client", name, account, name, [], operations, now_ms, place)
            for place, name in enumerate(subjects)
        ]
        for partition in range(PARTITIONS):
            await writer.write(partition, told if partition == 0 else [], "0")
        await client.aclose()

    def token(self, subject: str = "svc", **claims: Any) -> str:
        return self.issuer.token("k1", **{"sub": subject, "client_id": subject, **claims})

    async def tell(self, account: str, kind: str, body: dict[str, Any]) -> None:
        await append_command(self.settings, account, kind, body)

    async def verdicts(self) -> list[tuple[str, str, str, Any]]:
        """(what, verdict, reason, usage or command) of every record of the log, judged from its beginning."""
        settings = self.settings
        found = await read_newest(settings.kafka_bootstrap, {}, USAGE.name, range(PARTITIONS), None)
        judged: list[tuple[str, str, str, Any]] = []
        for number, records in found.items():
            state = PartitionState(number, PARTITIONS, self.epoch)
            rest = as_records(records)
            while len(rest):
                end = cut(state, rest)
                batch = judge(state, rest.part(0, end))
                rest = rest.part(end, len(rest))
                usages = batch.usage.to_pylist()
                for place, row in enumerate(batch.row.tolist()):
                    reason = batch.reasons.get(row, ("", ""))[0]
                    judged.append(("usage", VERDICTS[batch.verdict[row]], reason, usages[place]))
                if not usages and batch.records.values[0] is not None:
                    reason = batch.reasons.get(0, ("", ""))[0]
                    judged.append(("command", VERDICTS[batch.verdict[0]], reason, batch.command))
        return judged


class Edge:
    """A running edge and a client of it."""

    def __init__(self, site: Site, ingest: Ingest, session: aiohttp.ClientSession, url: str) -> None:
        self.site, self.ingest, self.url, self._session = site, ingest, url, session

    async def post(
        self, body: Any, kind: str = "", path: str = "/v1/events", **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """(status, JSON, headers). `body` is bytes or an object; without `kind` it is a batch if it is a list."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Content-Type": kind or (BATCH if isinstance(body, list) else SINGLE)}
        named |= {"Authorization": f"Bearer {self.site.token()}", **headers}
        named = {name: value for name, value in named.items() if value}
        async with self._session.post(self.url + path, data=data, headers=named) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    async def deliver(self, event: Any, secret: str = SECRET, ago_s: int = 0) -> tuple[int, Any]:
        """A webhook's delivery, signed as Stripe signs."""
        body, at = json.dumps(event).encode(), int(time.time()) - ago_s
        signature = hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
        header = {"Stripe-Signature": f"t={at},v1={signature}"}
        status, found, _ = await self.post(body, "application/json", "/v1/webhooks/stripe", Authorization="", **header)
        return status, found


def event(id_: str = "", *, ago_s: float = 0, **data: Any) -> dict[str, Any]:
    """A CloudEvent of one call."""
    return {
        "specversion": "1.0",
        "id": id_ or uuid.uuid4().hex,
        "source": "/svc",
        "type": "tollway.usage.v1",
        "time": datetime.fromtimestamp(time.time() - ago_s, UTC).isoformat(),
        "data": {**CALL, **data},
    }


@asynccontextmanager
async def edge_of(site: Site) -> AsyncIterator[Edge]:
    """The edge in this loop, behind uvicorn."""
    async with ingest_of(site.settings) as ingest, aiohttp.ClientSession() as session:
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(ingest.app(), port=port, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
        yield Edge(site, ingest, session, f"http://127.0.0.1:{port}")
        server.should_exit = True
        await task
