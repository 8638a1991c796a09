"""Three brokers: a partition's leader is killed under load, the log goes on without it, and nothing is lost or counted twice."""

from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient

from tests.outage_world import Services, World, until
from tollway.connectors.embedded import outage
from tollway.connectors.embedded.stack import Stack
from tollway.connectors.embedded.supervisor import State, children
from tollway.schemas.lane import lane, partition
from tollway.schemas.topics import TOPICS, USAGE
from tollway.streams.demo_service import ACCOUNTS
from tollway.streams.local import local_stack

SECONDS, RATE = 30.0, 60.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three brokers, all workers."""
    with local_stack(tmp_path_factory.mktemp("failover"), print, test_windows=True, brokers=3) as stack:
        yield stack


def in_sync(stack: Stack, number: int) -> tuple[int, set[int]]:
    """Leader and in-sync replicas of a partition of the log."""
    admin = AdminClient({"bootstrap.servers": stack.endpoints.kafka_bootstrap, "log_level": 0})
    found = admin.list_topics(USAGE.name, timeout=15).topics[USAGE.name].partitions[number]
    return found.leader, set(found.isrs)


def test_the_leader_is_killed_under_load(stack: Stack) -> None:
    """All three copies are in sync, one broker dies and stays away, the log goes on and every unit counts once; it comes back."""
    world = World(stack)
    busiest = partition(lane(ACCOUNTS[0]), world.partitions)
    admin = AdminClient({"bootstrap.servers": stack.endpoints.kafka_bootstrap, "log_level": 0})
    topics = admin.list_topics(timeout=15).topics
    for topic in TOPICS:
        assert all(len(row.replicas) == 3 for row in topics[topic.name].partitions.values())
    services = Services(world.settings, SECONDS, RATE)
    try:
        log = stack.data / "spool"
        until(lambda: all(any(each.iterdir()) for each in log.iterdir()) if log.exists() else False, "they emit")
        leader, copies = in_sync(stack, busiest)
        assert copies == {1, 2, 3}
        name = "kafka" if leader == 1 else f"kafka-{leader}"
        outage.hold(stack.data, name)
        until(lambda: stack.state(name) is State.KILLED, "the leader is dead")
        until(lambda: in_sync(stack, busiest)[0] not in (-1, leader), "another leads")
        reports = services.reports()
        assert stack.pid(name) is None
        assert world.settled(reports) == []
        outage.release(stack.data, name)
        until(lambda: in_sync(stack, busiest)[1] == {1, 2, 3}, "all three are in sync again")
    finally:
        services.kill()
    assert stack.supervisor.failed() == {}
    assert children(stack.data)[name]["restarts"] == 1


def test_a_worker_starts_with_one_broker_away(stack: Stack) -> None:
    """Of three brokers any one may be away, the first too, when a worker is started."""
    outage.hold(stack.data, "kafka")
    until(lambda: stack.state("kafka") is State.KILLED, "the first broker is dead")
    before = stack.supervisor.restarts("worker-accounts")
    stack.kill("worker-accounts")
    until(lambda: stack.supervisor.restarts("worker-accounts") > before, "the worker is started")
    stack.wait_ready("worker-accounts", 120.0)
    assert stack.pid("kafka") is None
