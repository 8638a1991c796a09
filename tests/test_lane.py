"""Lanes are where any client with Kafka's standard partitioner puts the key."""

import random
import uuid

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from confluent_kafka import Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from hypothesis import given
from hypothesis import strategies as st

from tollway.schemas.lane import LANES, lane, murmur2, partition, tag

KEYS = ["a", "acct-1", "é", "日本語", "Ω≈ç√∫", "😀😀", "x" * 128, "org:eu/west.1@tollway-test_9"]


@given(st.binary(max_size=200))
def test_murmur2_is_kafkas(data: bytes) -> None:
    """Our murmur2 equals aiokafka's on any bytes."""
    assert murmur2(data) == aiokafka_murmur2(data)


@given(st.text(max_size=128), st.sampled_from([1, 2, 4, 16, 64, 256]))
def test_partition_is_the_default_partitioners(account: str, partitions: int) -> None:
    """lane mod P is the partition that aiokafka's default partitioner gives the key, for every allowed P."""
    every = list(range(partitions))
    assert partition(lane(account), partitions) == DefaultPartitioner()(account.encode(), every, every)


def test_partition_is_librdkafkas(kafka: str) -> None:
    """librdkafka with `murmur2_random` produces every key, non-ASCII ones too, to lane mod P."""
    topic, partitions = f"lane-{uuid.uuid4().hex}", 32
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result(30)
    rng = random.Random(7)
    keys = KEYS + ["".join(chr(rng.randrange(33, 0x2FFF)) for _ in range(rng.randrange(1, 40))) for _ in range(500)]
    found: dict[str, int | None] = {}

    def delivered(error: object, message: Message) -> None:
        assert error is None
        key = message.key()
        assert isinstance(key, bytes)
        found[key.decode()] = message.partition()

    producer = Producer({"bootstrap.servers": kafka, "partitioner": "murmur2_random"})
    for key in keys:
        producer.produce(topic, key=key.encode(), value=b"", on_delivery=delivered)
    assert producer.flush(60) == 0
    assert found == {key: partition(lane(key), partitions) for key in keys}


@pytest.mark.parametrize("partitions", [0, 3, 512, -1])
def test_partition_counts_are_powers_of_two(partitions: int) -> None:
    """A partition count that would tear lanes apart is refused by name."""
    with pytest.raises(ValueError, match="power of two from 1 to 256"):
        partition(1, partitions)


def test_tags_are_one_slot_a_lane() -> None:
    """Every lane has its own three-digit Redis hash tag."""
    assert tag(42) == "tw:{042}:"
    assert len({tag(n) for n in range(LANES)}) == LANES
