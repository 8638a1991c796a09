"""A broker that has just come back knows no broker yet, itself neither: clients wait for it as for one that is away."""

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest

from tollway.connectors.errors import Unavailable
from tollway.connectors.kafka import started_producer

VERSIONS = {18: (0, 2), 3: (0, 1), 10: (0, 1), 22: (0, 0)}
"""API key → versions: ApiVersions, Metadata, FindCoordinator, InitProducerId."""


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Kafka's protocol as far as a client gets: versions, then metadata without a broker and without a topic."""
    while size := await reader.read(4):
        request = await reader.readexactly(struct.unpack(">i", size)[0])
        key, _, correlation = struct.unpack(">hhi", request[:8])
        if key == 18:
            rows = b"".join(struct.pack(">hhh", name, *found) for name, found in VERSIONS.items())
            body = struct.pack(">hi", 0, len(VERSIONS)) + rows
        else:
            body = struct.pack(">iii", 0, -1, 0)
        writer.write(struct.pack(">ii", len(body) + 4, correlation) + body)
    writer.close()


@pytest.fixture
async def bootstrap() -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    yield f"{host}:{port}"
    server.close()
    await server.wait_closed()


async def test_a_broker_that_names_no_broker_is_unavailable(bootstrap: str) -> None:
    """aiokafka asserts there that it knows one: that is no reason for the sender's worker to end."""
    with pytest.raises(Unavailable, match=f"no Kafka at {bootstrap}"):
        await started_producer(bootstrap, {}, transactional_id="stripe-0")
