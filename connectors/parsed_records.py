"""Records as aiokafka's parser in C gives them, without a second object around each (decision 0012).

A consumer asks for them with `value_deserializer=as_parsed`. Attributes: `offset, timestamp, timestamp_type, key, value,
headers, checksum`; there is no topic and no partition, `getmany` says both. Where aiokafka builds its records in another way
one day, the same consumers get its `ConsumerRecord`, which has the same attributes.
"""

from typing import Any

from aiokafka.consumer import fetcher


def as_parsed(value: bytes | None) -> bytes | None:
    """Asks for parsed records; as a deserializer it changes nothing."""
    return value


class ParsedRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """One fetch of one partition."""

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        if self._value_deserializer is as_parsed:
            return record
        return super()._consumer_record(tp, record)


fetcher.PartitionRecords = ParsedRecords
