"""The examples of the docs run as they stand, against real Kafka and a real gate, and leave the usage that they should."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from tests.gate_site import held, limit, may_call
from tests.issuer import issuing
from tests.test_asgi import ask
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.schemas.codec import decode
from tollway.schemas.topics import USAGE
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
LINES_MAX = 40


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker with an open log."""
    folder = tmp_path_factory.mktemp("examples")
    broker = KafkaBroker(folder)
    try:
        broker.start()
        broker.wait_ready()
        asyncio.run(create(settings_module.read(data=folder, kafka_bootstrap=broker.bootstrap, replication=1)))
        yield broker.bootstrap
    finally:
        broker.stop()


@pytest.fixture
def environment(log: str, valkey: ValkeyServer, tmp_path: Path) -> dict[str, str]:
    told = {
        "TOLLWAY_KAFKA_BOOTSTRAP": log,
        "TOLLWAY_REDIS_URL": valkey.url,
        "TOLLWAY_SPOOL_DIR": str(tmp_path / "spool"),
    }
    return {**os.environ, **told, "CLIENT": "c-1"}


async def usage(bootstrap: str, account: str, count: int) -> list[dict[str, Any]]:
    """An account's events in the log, once there are so many."""
    found: list[dict[str, Any]] = []
    consumer = AIOKafkaConsumer(USAGE.name, bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    await consumer.start()
    try:
        async with asyncio.timeout(60):
            while len(found) < count:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    events = [decode(record.value)[1] for record in records if record.key == account.encode()]
                    found += [event for event in events if "operation" in event]
    finally:
        await consumer.stop()
    return sorted(found, key=lambda event: (event["occurred_at"], event["status"]))


@pytest.mark.parametrize("name", ["service", "tools", "job"])
def test_an_example_is_short(name: str) -> None:
    """Each example is under 40 lines."""
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < LINES_MAX


async def test_the_service(environment: dict[str, str], log: str) -> None:
    """Tokens are asked for, rows are granted up to the limit, then refused; all of it is in the log."""
    may_call(environment["TOLLWAY_REDIS_URL"], "acme", limit("acct", 45, meter="rows"))
    with issuing() as issuer, started({**environment, "ISSUER": issuer.url}) as (process, base):
        url = f"{base}/search?q=toll"
        await answering(url, process)
        token = {"authorization": f"Bearer {issuer.token('k1')}"}
        answers = [await ask(url, headers=token) for _ in range(3)]
        assert [(code, body.count(b"toll")) for code, body, _ in answers] == [(200, 30), (200, 15), (429, 0)]
    events = await usage(log, "acme", 3)
    assert [(event["status"], event["quantities"]) for event in events] == [
        ("ok", {"calls": 1, "rows": 30}), ("ok", {"calls": 1, "rows": 15}), ("rate_limited", {"calls": 1}),
    ]  # fmt: skip
    strangers = await usage(log, "public", 1)
    assert {(event["status"], event["operation"]) for event in strangers} == {("denied", "GET /search")}


@contextmanager
def started(environment: dict[str, str]) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The service in a process of its own, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port), "--log-level", "warning"]
    with subprocess.Popen(command, cwd=EXAMPLES, env=environment) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


async def answering(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            assert (await ask(url))[0] == 401
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)
        else:
            return


async def test_the_tools(environment: dict[str, str], log: str) -> None:
    """The MCP server is started by a client; days are granted up to the limit, then the tool is refused."""
    may_call(environment["TOLLWAY_REDIS_URL"], "tools-inc", limit("client", 10, meter="days"))
    environment["ACCOUNT"] = "tools-inc"
    started = StdioServerParameters(command=sys.executable, args=["tools.py"], cwd=EXAMPLES, env=environment)
    async with Client(started) as client:
        answers = [await client.call_tool("forecast", {"city": "Bern", "days": 7}) for _ in range(3)]
    assert [(answer.is_error, len(answer.content)) for answer in answers[:2]] == [(False, 7), (False, 3)]
    assert answers[2].structured_content["status"] == 429
    events = await usage(log, "tools-inc", 3)
    assert [(event["operation"], event["status"], event["quantities"].get("days")) for event in events] == [
        ("forecast", "ok", 7), ("forecast", "ok", 3), ("forecast", "rate_limited", None),
    ]  # fmt: skip


async def test_the_job(environment: dict[str, str], log: str, tmp_path: Path) -> None:
    """The job counts what its account may, says why it stops, and its run is on every event."""
    may_call(environment["TOLLWAY_REDIS_URL"], "job-inc", limit("acct", 8, "L", "words"))
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path in paths:
        path.write_text("one two three four five")
    command = [sys.executable, str(EXAMPLES / "job.py"), *map(str, paths)]
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        env={**environment, "ACCOUNT": "job-inc"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.split()[1::2] == ["5", "3"]
    assert "acct has 0 of 8 words left, the call needs 1" in done.stderr
    events = await usage(log, "job-inc", 3)
    assert [(event["status"], event["quantities"].get("words")) for event in events] == [
        ("ok", 5), ("ok", 3), ("payment_required", None),
    ]  # fmt: skip
    assert {event["agent"] for event in events} == {"word-counter"}
    assert len({event["run"] for event in events}) == 1
    assert held(environment["TOLLWAY_REDIS_URL"], "job-inc") == {"words": 8}
