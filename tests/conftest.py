"""One real broker, one real Valkey, one real ClickHouse engine a test run; each starts when a test first asks for it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.valkey import ValkeyServer

settings.register_profile("shared machine", deadline=None)  # an example that is slow once is no failure
settings.load_profile("shared machine")

LONG_FIRST = (
    "test_prove.py", "test_failover.py", "test_kafka_away.py", "test_security.py", "test_crash.py",
    "test_clickhouse_away.py", "test_redis_away.py", "test_rebuild.py", "test_compressed_day.py", "test_demo.py",
    "test_hard_emitters.py",
    "test_doctor.py", "test_embedded.py", "test_ingest.py", "test_compose.py", "test_stripe_away.py",
    "test_engine.py",
)  # fmt: skip
"""Files that take long, begun before the others, so that no process ends alone with one of them; the two that kill a whole
stack not beside each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same order each time: long files first, the rest as it was found."""
    rank = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def parts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and logs of the parts below: the place to look when one does not start."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="session")
def kafka_broker(parts_folder: Path) -> Iterator[KafkaBroker]:
    broker = KafkaBroker(parts_folder)
    try:
        broker.start()
        broker.wait_ready()
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def kafka(kafka_broker: KafkaBroker) -> str:
    """The broker's address."""
    return kafka_broker.bootstrap


@pytest.fixture(scope="session")
def valkey(parts_folder: Path) -> Iterator[ValkeyServer]:
    """Has host, port, password, url. Shared: use keys of your own, or flush it."""
    server = ValkeyServer(parts_folder)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def clickhouse(parts_folder: Path) -> Iterator[ClickHouseServer]:
    """Has host, port, user, password, database. Shared: use a database or tables of your own."""
    server = ClickHouseServer(parts_folder)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of as many KiB as the test asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk takes the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
