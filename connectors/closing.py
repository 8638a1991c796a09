"""Kafka clients ended for good, also where Kafka is away.

aiokafka's own `stop()` waits for a flush for as long as Kafka is away, and ends in a CancelledError, half closed, where it meets a
fetch that failed: what is left then goes on behind our back, one client more with each outage.
"""

import asyncio
import logging
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

log = logging.getLogger(__name__)

CUT_S = 2.0


async def close(client: AIOKafkaProducer | AIOKafkaConsumer, deadline_s: float) -> None:
    """Stop it; one that has not ended by the deadline is cut off: what it had not sent is not sent. Raises nothing."""
    stopping = asyncio.create_task(client.stop())
    await asyncio.wait({stopping}, timeout=deadline_s)
    if stopping.done() and not stopping.cancelled() and stopping.exception() is None:
        return
    log.warning("%s did not stop by itself and is cut off", type(client).__name__)
    parts: Any = client  # aiokafka has no public way to drop a client
    stopping.cancel()
    ends = [stopping]
    if isinstance(client, AIOKafkaProducer):
        ends.append(asyncio.create_task(parts._sender.close()))
        ends.append(asyncio.create_task(parts.client.close()))
    else:
        ends.append(asyncio.create_task(parts._client.close()))
    for end in (await asyncio.wait(ends, timeout=CUT_S))[0]:
        if not end.cancelled() and (error := end.exception()) is not None:
            log.warning("%s: %r while it was cut off", type(client).__name__, error)
