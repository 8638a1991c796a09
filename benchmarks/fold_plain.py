"""Contender: a plain loop, confluent-kafka + fastavro + a dict + a Redis pipeline. One 60 s sum per principal and meter.

No de-duplication, no checkpoint, no admission: what one would write in an afternoon. Prints {"events", "cpu_s", "wall_s"}.
"""

import argparse
import io
import json
import time

import fastavro
import redis
from confluent_kafka import Consumer, TopicPartition
from fold_schema import USAGE_HEADER, schema

WINDOW_US = 60_000_000
BATCH = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--starts", required=True, help="JSON: partition → first offset")
    parser.add_argument("--events", type=int, required=True)
    arguments = parser.parse_args()
    consumer = Consumer({"bootstrap.servers": arguments.bootstrap, "group.id": "plain", "enable.auto.commit": False})
    starts = json.loads(arguments.starts)
    consumer.assign([TopicPartition("usage.events", int(number), offset) for number, offset in starts.items()])
    client, parsed, sums, left = redis.Redis.from_url(arguments.redis), schema(), {}, arguments.events
    messages = consumer.consume(1, 30.0)
    cpu, wall = time.process_time(), time.monotonic()
    while left > 0:
        touched = set()
        for message in messages:
            value = message.value()
            if message.error() is not None or value is None or value[:5] != USAGE_HEADER:
                continue
            event = fastavro.schemaless_reader(io.BytesIO(value[5:]), parsed, None)
            start = event["occurred_at"] // WINDOW_US * 60
            for meter, units in event["quantities"].items():
                key = (event["principal"], meter, start)
                sums[key] = sums.get(key, 0) + units
                touched.add(key)
            left -= 1
        pipe = client.pipeline(transaction=False)
        for principal, meter, start in touched:
            pipe.hset(f"plain:{principal}", f"{meter} m:{start}", sums[principal, meter, start])
        pipe.execute()
        messages = consumer.consume(BATCH, 1.0) if left > 0 else []
    print(
        json.dumps(
            {"events": arguments.events - left, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}
        )
    )
    consumer.close()


if __name__ == "__main__":
    main()
