"""The schema registry is a catalogue and a gate. What is compared and said runs always; a real Apicurio with `make registry`."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pydantic import SecretStr

from tests.apicurio import Apicurio
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.registry import Registry
from tollway.schemas.codec import ID_FIRST, header_id
from tollway.schemas.evolution import SchemaError
from tollway.schemas.registry import COMPATIBILITY, committed, faults, mark, newer
from tollway.streams.bootstrap import create
from tollway.streams.schema_registry import publish, refuse_other_schemas, registry_report
from tollway.streams.settings import Settings

DEADLINE_S = 120
SUBJECTS = ["tollway.UsageEvent", "tollway.Command", "tollway.MeterEvent"]


def settings_of(url: str, **more: Any) -> Settings:
    return Settings(schema_registry_url=url, **more)


def command(*argv: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command as a person runs it: never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "tollway.streams.cli", *argv],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def texts() -> dict[str, list[str]]:
    """subject → our schemas, as a registry that has just these would have them."""
    found: dict[str, list[str]] = {}
    for each in committed():
        found.setdefault(each.subject, []).append(each.text)
    return found


def grown(text: str) -> str:
    """The next version: one field more, as evolution allows."""
    schema = json.loads(text)
    schema["fields"].append({"name": "later", "type": ["null", "string"], "default": None})
    return json.dumps(schema)


def test_every_record_has_a_subject() -> None:
    """Each committed version stands under its record's full name: one topic carries several records."""
    assert list(texts()) == SUBJECTS


def test_what_is_compared_is_the_content() -> None:
    """Layout, doc strings and long spellings of a type change nothing; a default, a type or a logical type does."""
    text = committed()[0].text
    schema = json.loads(text)
    schema["doc"] = "other words"
    schema["fields"][0]["type"] = {"type": schema["fields"][0]["type"]}
    assert mark(json.dumps(schema, indent=3)) == mark(text)
    for part, value in (("type", "long"), ("default", None), ("name", "other")):
        changed = json.loads(text)
        changed["fields"][0][part] = value
        assert mark(json.dumps(changed)) != mark(text), part
    assert mark(text.replace("timestamp-micros", "timestamp-millis")) != mark(text)
    with pytest.raises(SchemaError, match="no Avro schema"):
        mark("[1, 2")


def test_what_a_registry_lacks() -> None:
    """A missing subject and a different schema are faults; a version more is none, and is said."""
    ours, well = committed(), texts()
    assert faults(ours, well) == []
    assert newer(ours, well) == []
    missing = {**well, SUBJECTS[1]: []}
    assert faults(ours, missing) == ["tollway.Command is not registered"]
    other = {**well, SUBJECTS[0]: [well[SUBJECTS[0]][0].replace('"long"', '"double"', 1)]}
    assert faults(ours, other) == ["tollway.UsageEvent version 1 is not among the 1 registered, which differ"]
    more = {**well, SUBJECTS[0]: [*well[SUBJECTS[0]], grown(well[SUBJECTS[0]][0])]}
    assert faults(ours, more) == []
    assert newer(ours, more) == ["tollway.UsageEvent"]


async def test_a_registry_that_is_away_stops_nobody() -> None:
    """A worker goes on, for its ids are those of ids.json; a person who asks is told."""
    settings = settings_of(f"http://127.0.0.1:{free_port()}")
    await refuse_other_schemas(settings)
    with pytest.raises(Unavailable, match="no schema registry at http"):
        await registry_report(settings)
    done = command("schema", "check", "--registry", TOLLWAY_SCHEMA_REGISTRY_URL=settings.schema_registry_url)
    assert done.returncode == 1
    assert done.stderr.startswith("tollway: no schema registry at http")


def test_a_command_without_a_registry() -> None:
    """What asks for a registry names the setting; one that is no address is refused by its name."""
    assert "TOLLWAY_SCHEMA_REGISTRY_URL is not set: give" in command("schema", "publish").stderr
    assert (
        "TOLLWAY_SCHEMA_REGISTRY_URL is 'ftp:/"
        in command("schema", "publish", TOLLWAY_SCHEMA_REGISTRY_URL="ftp:/").stderr
    )


@asynccontextmanager
async def answering(handler: Any) -> AsyncIterator[str]:
    """The address of a server that answers each request by a function."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "text", "kind", "said"),
    [
        (401, "", Refused, "correct TOLLWAY_SCHEMA_REGISTRY_USER and _PASSWORD"),
        (403, '{"error_code": 403, "message": "no"}', Refused, "refuses this user"),
        (
            409,
            '{"error_code": 409, "message": "field gone"}',
            Refused,
            "refuses tollway.Command (409: field gone): make it",
        ),
        (404, "<html>nothing here</html>", Refused, "Apicurio's ends with /apis/ccompat/v7"),
        (200, "<html>a page</html>", Refused, "does not answer as a registry"),
        (503, '{"message": "starting"}', Unavailable, "fails (503): starting"),
    ],
)
async def test_what_a_registry_answers(status: int, text: str, kind: type[Exception], said: str) -> None:
    """Each refusal is one sentence with its cure; a failure of the server's own is tried again later."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text)

    async with answering(answer) as url, Registry(url) as registry:
        with pytest.raises(kind) as caught:
            await registry.publish("tollway.Command", "{}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_server_that_never_answers_is_left() -> None:
    """An answer costs no more than its time-out."""

    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async with answering(hang) as url, Registry(url, timeout_s=0.3) as registry:
        with pytest.raises(Unavailable, match="no schema registry"):
            await registry.schemas("tollway.Command")


@pytest.fixture(scope="module")
def apicurio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apicurio]:
    with Apicurio(tmp_path_factory.mktemp("apicurio")) as registry:
        yield registry


@pytest.mark.registry
async def test_schemas_in_a_real_registry(apicurio: Apicurio) -> None:
    """Empty: all of ours are missing, and a worker is refused. Published, once: equal, protected, and numbered as it likes."""
    settings = settings_of(apicurio.url)
    with pytest.raises(
        Refused, match=r"tollway\.UsageEvent is not registered.*: publish ours with `tollway schema publish`"
    ):
        await refuse_other_schemas(settings)
    rows = await publish(settings)
    assert [row["subject"] for row in rows] == SUBJECTS
    assert all(row["added"] for row in rows)
    assert not any(row["added"] for row in await publish(settings))
    assert await registry_report(settings) == {"faults": [], "newer": []}
    await refuse_other_schemas(settings)
    async with Registry(apicurio.url) as registry:
        assert {subject: len(await registry.schemas(subject)) for subject in SUBJECTS} == dict.fromkeys(SUBJECTS, 1)
        assert {await registry.rule(subject) for subject in SUBJECTS} == {COMPATIBILITY}
    async with ClientSession() as session, session.get(f"{apicurio.url}/subjects/{SUBJECTS[0]}/versions/1") as answer:
        assert (await answer.json())["id"] < ID_FIRST
    framed = b"\x00" + ID_FIRST.to_bytes(4, "big")
    assert header_id(framed) == ID_FIRST


@pytest.mark.registry
async def test_the_registry_is_a_gate(apicurio: Apicurio) -> None:
    """It takes a version that evolution allows and refuses one that drops a field; the newer one stops no worker."""
    settings = settings_of(apicurio.url)
    await publish(settings)
    subject = SUBJECTS[2]
    (text,) = texts()[subject]
    broken = json.loads(text)
    broken["fields"] = [*broken["fields"][1:], {"name": "must", "type": "string"}]
    async with Registry(apicurio.url) as registry:
        with pytest.raises(Refused, match=rf"refuses {subject} \(409: "):
            await registry.publish(subject, json.dumps(broken))
        assert len(await registry.schemas(subject)) == 1
        await registry.publish(subject, grown(text))
    assert await registry_report(settings) == {"faults": [], "newer": [subject]}
    await refuse_other_schemas(settings)


@pytest.mark.registry
async def test_a_rule_that_was_loosened(apicurio: Apicurio) -> None:
    """A subject that takes anything is a fault until it is published again."""
    settings = settings_of(apicurio.url)
    await publish(settings)
    async with Registry(apicurio.url) as registry:
        await registry.set_rule(SUBJECTS[1], "NONE")
    report = await registry_report(settings)
    assert report["faults"] == [f"{SUBJECTS[1]} takes versions that are compatible NONE, must be {COMPATIBILITY}"]
    await publish(settings)
    assert (await registry_report(settings))["faults"] == []


@pytest.mark.registry
async def test_a_worker_beside_another_catalogue(tmp_path: Path) -> None:
    """A worker whose registry has another UsageEvent ends at its start with the reason; commands and doctor name it too."""
    with Apicurio(tmp_path / "registry") as other, KafkaBroker(tmp_path / "broker") as broker:
        settings = Settings(
            data=tmp_path, kafka_bootstrap=broker.bootstrap, partitions=2, replication=1, schema_registry_url=other.url
        )
        await create(settings)
        await publish(settings)
        env = {
            "TOLLWAY_DATA": str(tmp_path),
            "TOLLWAY_KAFKA_BOOTSTRAP": broker.bootstrap,
            "TOLLWAY_REPLICATION": "1",
            "TOLLWAY_SCHEMA_REGISTRY_URL": other.url,
        }
        assert (await asyncio.to_thread(command, "schema", "check", "--registry", **env)).returncode == 0
        async with ClientSession() as session:
            for subject in (f"{other.url}/subjects/{SUBJECTS[0]}",):
                await session.delete(subject)
                await session.delete(f"{subject}?permanent=true")
        async with Registry(other.url) as registry:
            await registry.publish(SUBJECTS[0], texts()[SUBJECTS[0]][0].replace('"long"', '"double"', 1))
        worker = await asyncio.to_thread(command, "worker", "--group", "audit", **env)
        checked = await asyncio.to_thread(command, "schema", "check", "--registry", **env)
    assert worker.returncode == 1
    said = worker.stderr.splitlines()[-1]
    assert said.startswith(
        "tollway: the registry has other schemas than this worker: tollway.UsageEvent version 1 is not among"
    )
    assert checked.returncode == 1
    assert "tollway.UsageEvent" in checked.stdout


@pytest.mark.registry
async def test_a_registry_behind_a_password(apicurio: Apicurio) -> None:
    """User and password of the settings open it; without them the sentence names the settings."""
    expected = f"Basic {base64.b64encode(b'catalogue:s3cret').decode()}"

    async def forward(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != expected:
            return web.Response(status=401, text="who?")
        target = apicurio.url + request.rel_url.path_qs
        kept = {name: value for name, value in request.headers.items() if name in {"Accept", "Content-Type"}}
        async with (
            ClientSession() as session,
            session.request(request.method, target, data=await request.read(), headers=kept) as answer,
        ):
            return web.Response(status=answer.status, text=await answer.text())

    async with answering(forward) as url:
        well = settings_of(url, schema_registry_user="catalogue", schema_registry_password=SecretStr("s3cret"))
        await publish(well)
        assert (await registry_report(well))["faults"] == []
        with pytest.raises(Refused, match="correct TOLLWAY_SCHEMA_REGISTRY_USER and _PASSWORD"):
            await registry_report(settings_of(url))
