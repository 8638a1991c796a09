"""Peer: Faust as its documentation shows it, an agent and a tumbling table in memory with its changelog.

Sums go to Redis from a timer, only what changed: one write an event would be slower by half. It recovers from the changelog,
and after a crash counts what came since the last commit twice.
"""

import asyncio
import logging
import tempfile
import time
from typing import Any

import faust
from confluent_kafka import Consumer, TopicPartition
from faust.serializers import codecs
from redis.asyncio import Redis
from work import TOPIC, WINDOW_S, Stopwatch, decode, given, start_of

NAME = "faust"
SHOW_S = 0.1


class Usage(codecs.Codec):  # type: ignore[misc]
    """Avro by fastavro, at Faust's own place for it."""

    def _loads(self, s: bytes) -> Any:
        return decode(s)


def start_at(bootstrap: str, group: str, starts: dict[int, int]) -> None:
    """Commit where the group begins."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False})
    consumer.commit(
        offsets=[TopicPartition(TOPIC, number, offset) for number, offset in starts.items()], asynchronous=False
    )
    consumer.close()


async def run() -> None:
    arguments = given(__doc__)
    logging.getLogger().setLevel(logging.ERROR)  # else Faust builds a log record per message that it sends
    group = f"{NAME}-{time.time_ns()}"
    start_at(arguments.bootstrap, group, arguments.starts)
    codecs.register("usage", Usage())
    app = faust.App(
        group,
        broker=f"kafka://{arguments.bootstrap}",
        store="memory://",
        datadir=tempfile.mkdtemp(),
        topic_partitions=len(arguments.starts),
        topic_replication_factor=1,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=arguments.safe_s,
        web_enabled=False,
    )
    topic = app.topic(TOPIC, key_type=bytes, value_serializer="usage")
    sums = app.Table("sums", default=int).tumbling(WINDOW_S).relative_to(lambda event: event.value["occurred_at"] / 1e6)
    changed: dict[str, dict[str, int]] = {}
    left, watch, done = arguments.events, Stopwatch(), asyncio.Event()

    @app.agent(topic, name="sum")
    async def add(events: Any) -> None:
        nonlocal left, watch
        async for event in events:
            if left == arguments.events:
                watch = Stopwatch()
            left -= 1
            if event is not None:
                principal, start = event["principal"], start_of(event)
                for meter, units in event["quantities"].items():
                    sums[f"{principal}|{meter}"] += units
                    total = sums[f"{principal}|{meter}"].value()
                    changed.setdefault(principal, {})[f"{meter} m:{start}"] = total
            if not left:
                done.set()

    client = Redis.from_url(arguments.redis)

    async def show() -> None:
        pipe = client.pipeline(transaction=False)
        for principal, fields in changed.items():
            pipe.hset(f"{NAME}:{principal}", mapping=fields)
        changed.clear()
        await pipe.execute()

    app.timer(SHOW_S)(show)
    app.finalize()
    await app.start()
    await done.wait()
    await show()
    await app.consumer.commit()
    watch.tell(arguments.events)
    await app.stop()
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(run())
