"""Wrong settings and absent parts: one clear sentence with the cure, a non-zero exit, no traceback."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.schemas.topics import USAGE
from tollway.streams.bootstrap import create
from tollway.streams.settings import Settings

DEADLINE_S = 60
PARTITIONS = 2


@dataclass
class Log:
    """A log on a broker of its own: its data folder, and the environment that leads there."""

    data: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    data = tmp_path_factory.mktemp("log")
    with KafkaBroker(data / "kafka") as broker:
        asyncio.run(create(Settings(data=data, kafka_bootstrap=broker.bootstrap, partitions=PARTITIONS, replication=1)))
        yield Log(data, {"kafka_bootstrap": broker.bootstrap, "replication": "1"})


def refusal(*argv: str, data: Path, **env: str) -> str:
    """What a command that must fail says: one line, exit 1."""
    done = subprocess.run(
        [sys.executable, "-m", "tollway.streams.cli", *argv, "--data", str(data)],
        env={**os.environ, **{f"TOLLWAY_{name.upper()}": value for name, value in env.items()}},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("tollway: ")]
    assert len(said) == 1, done.stderr
    return said[0]


def test_a_wrong_setting_is_named_with_its_value(tmp_path: Path) -> None:
    """A setting that does not parse names the variable and what it holds."""
    said = refusal("status", data=tmp_path, pace_ms="soon")
    assert "TOLLWAY_PACE_MS is 'soon'" in said


def test_kafka_away(tmp_path: Path) -> None:
    """No broker: the address is named."""
    port = free_port()
    said = refusal("topics", "create", data=tmp_path, kafka_bootstrap=f"127.0.0.1:{port}")
    assert f"no Kafka at 127.0.0.1:{port}" in said


def test_an_unwritable_folder(tmp_path: Path) -> None:
    """A data folder that is a file: the folder and the cure are named."""
    taken = tmp_path / "file"
    taken.write_text("")
    assert "is not writable" in refusal("up", data=taken)


def test_a_port_in_use(log: Log) -> None:
    """A health port that another process holds is named."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        said = refusal("worker", "--group", "stripe", data=log.data, **log.env, health_port=str(port))
    assert f"TOLLWAY_HEALTH_PORT is {port}" in said


def test_a_wrong_clickhouse_password(log: Log, clickhouse: ClickHouseServer) -> None:
    """The audit worker says which setting to look at."""
    where = {
        "clickhouse_host": clickhouse.host,
        "clickhouse_port": str(clickhouse.port),
        "clickhouse_user": clickhouse.user,
    }
    said = refusal("worker", "--group", "audit", data=log.data, **log.env, **where, clickhouse_password="wrong")
    assert "TOLLWAY_CLICKHOUSE_PASSWORD" in said


def test_another_log_than_the_checkpoints(log: Log) -> None:
    """The log's topic was deleted and made again: the worker refuses to mix the two."""
    admin = AdminClient({"bootstrap.servers": log.env["kafka_bootstrap"]})
    again = NewTopic(USAGE.name, PARTITIONS, 1, config=USAGE.settings)
    for futures in (admin.delete_topics([USAGE.name]), admin.create_topics([again])):
        for future in futures.values():
            future.result(DEADLINE_S)
    said = refusal("worker", "--group", "stripe", data=log.data, **log.env)
    assert "another log than the checkpoint's" in said


def test_a_meter_with_a_bad_name_is_not_signed(log: Log) -> None:
    """A command that the fold would refuse is refused before anything is written."""
    said = refusal("meter", "add", "Bad-Name", data=log.data, **log.env)
    assert "meter is 'Bad-Name'" in said


def test_an_unknown_group(log: Log) -> None:
    """The groups that there are, are named."""
    assert "accounts, audit, stripe, all" in refusal("worker", "--group", "books", data=log.data, **log.env)


def test_no_signing_key(log: Log, tmp_path: Path) -> None:
    """A folder without the control plane's key cannot sign."""
    assert "no signing key" in refusal("account", "open", "acme", data=tmp_path, **log.env)
