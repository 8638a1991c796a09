"""Peer: a plain loop, confluent-kafka + fastavro + dictionaries + a Redis pipeline: what one would write in an afternoon.

Sums are in Redis before offsets are committed; a restart reads them back from there. After a crash it counts what came since the
last commit twice; it knows no duplicates and admits everything.
"""

import time

import redis
from confluent_kafka import Consumer, TopicPartition
from work import BATCH, TOPIC, Stopwatch, Sums, decode, given

NAME = "plain"


def restored(client: redis.Redis) -> Sums:
    """Sums as Redis has them."""
    sums = Sums()
    for key in client.scan_iter(match=f"{NAME}:*"):
        sums.totals[key.decode().partition(":")[2]] = {f.decode(): int(v) for f, v in client.hgetall(key).items()}
    return sums


def main() -> None:
    arguments = given(__doc__)
    consumer = Consumer(
        {"bootstrap.servers": arguments.bootstrap, "group.id": f"{NAME}-{time.time_ns()}", "enable.auto.commit": False}
    )
    consumer.assign([TopicPartition(TOPIC, number, offset) for number, offset in arguments.starts.items()])
    client = redis.Redis.from_url(arguments.redis)
    sums, left = restored(client), arguments.events
    messages = consumer.consume(1, 30.0)
    watch, safe_at = Stopwatch(), time.monotonic() + arguments.safe_s
    while True:
        for message in messages:
            event = decode(message.value())
            left -= 1
            if event is not None:
                sums.add(event)
        pipe = client.pipeline(transaction=False)
        for principal, fields in sums.take().items():
            pipe.hset(f"{NAME}:{principal}", mapping=fields)
        pipe.execute()
        if not left or time.monotonic() >= safe_at:
            consumer.commit(asynchronous=False)
            safe_at = time.monotonic() + arguments.safe_s
        if not left:
            break
        messages = consumer.consume(BATCH, 1.0)
    watch.tell(arguments.events)
    consumer.close()


if __name__ == "__main__":
    main()
