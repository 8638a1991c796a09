"""Where an emitter sends: the latest log whose every partition is open. Asked whenever it connects.

A log that has grown refuses usage (`tollway topics grow`), so an emitter that does not know it is sent here again.
"""

import asyncio

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import UnknownTopicOrPartitionError

from tollway.connectors.errors import Unavailable
from tollway.schemas.topics import USAGE, growths, log_topic

TOPIC_DEADLINE_S = 5.0


async def open_log(producer: AIOKafkaProducer, consumer: AIOKafkaConsumer, topic: str) -> tuple[str, int] | None:
    """(topic, partitions) to send to; None where no log is open yet: usage that stands before `log.open` is refused.

    `topic`: the log's, or another, which is taken as it is. Raises Unavailable where it is not there.
    """
    names = [topic]
    if topic == USAGE.name:
        listed = await producer.client.fetch_all_metadata()
        names = [log_topic(growth) for growth in growths(listed.topics())] or names
    for name in names:
        try:
            async with asyncio.timeout(TOPIC_DEADLINE_S):
                count = len(await producer.partitions_for(name))
        except (UnknownTopicOrPartitionError, TimeoutError) as error:
            raise Unavailable(f"topic {name} is not there: run `tollway topics create`") from error
        ends = await consumer.end_offsets([TopicPartition(name, number) for number in range(count)])
        if all(ends.values()):
            return name, count
    return None
