"""Peer: the plain loop in asyncio, aiokafka + fastavro + dictionaries + a Redis pipeline. As exact, and as forgetful, as that."""

import asyncio
import time

from aiokafka import AIOKafkaConsumer, TopicPartition
from redis.asyncio import Redis
from work import BATCH, TOPIC, Stopwatch, Sums, decode, given

NAME = "aiokafka"


async def restored(client: Redis) -> Sums:
    """Sums as Redis has them."""
    sums = Sums()
    async for key in client.scan_iter(match=f"{NAME}:*"):
        found = await client.hgetall(key)
        sums.totals[key.decode().partition(":")[2]] = {f.decode(): int(v) for f, v in found.items()}
    return sums


async def run() -> None:
    arguments = given(__doc__)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=arguments.bootstrap, group_id=f"{NAME}-{time.time_ns()}", enable_auto_commit=False
    )
    await consumer.start()
    partitions = [TopicPartition(TOPIC, number) for number in arguments.starts]
    consumer.assign(partitions)
    for partition in partitions:
        consumer.seek(partition, arguments.starts[partition.partition])
    client = Redis.from_url(arguments.redis)
    sums, left = await restored(client), arguments.events
    watch, safe_at = Stopwatch(), time.monotonic() + arguments.safe_s
    while left:
        for records in (await consumer.getmany(timeout_ms=1_000, max_records=BATCH)).values():
            left -= len(records)
            for record in records:
                event = decode(record.value)
                if event is not None:
                    sums.add(event)
        pipe = client.pipeline(transaction=False)
        for principal, fields in sums.take().items():
            pipe.hset(f"{NAME}:{principal}", mapping=fields)
        await pipe.execute()
        if not left or time.monotonic() >= safe_at:
            await consumer.commit()
            safe_at = time.monotonic() + arguments.safe_s
    watch.tell(arguments.events)
    await consumer.stop()
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(run())
