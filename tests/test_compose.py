"""The production shape, without a container engine: Compose itself reads the file, and what the file says is run on real parts.

Kafka runs with the file's settings, Valkey with its configuration; topics, tables, workers and health checks run as written
there, with other addresses.
"""

import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.compose_site import DEADLINE_S, ONCE, ROOT, Site, Valkey, kafka_settings, ours, run, stages, workers
from tollway.connectors.control import Signer
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.kafka import KafkaBroker, server_properties
from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.streams import cli
from tollway.streams.settings import PREFIX, Settings
from tollway.streams.worker import GROUPS

FILE = ROOT / "docker-compose.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STRIPE_KEY = "rk_test_compose"


def config(
    variables: dict[str, str], *options: str, files: tuple[Path, ...] = (FILE,)
) -> "subprocess.CompletedProcess[str]":
    """What Compose makes of a file, or of several over each other."""
    given = [part for file in files for part in ("--file", file)]
    return run("docker-compose", "--env-file", os.devnull, *given, "config", *options, env=variables)


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The secrets, made by the very commands at the head of the file."""
    head = FILE.read_text(encoding="utf-8").partition("\nname:")[0]
    script = "\n".join(line.removeprefix("#   ") for line in head.splitlines() if line.startswith("#   "))
    folder = tmp_path_factory.mktemp("secrets")
    made = run("bash", "-euc", script, cwd=folder)
    assert made.returncode == 0, made.stderr
    lines = (folder / ".env").read_text(encoding="utf-8").splitlines()
    return {**dict(line.split("=", 1) for line in lines), "TOLLWAY_STRIPE_KEY": STRIPE_KEY}


@pytest.fixture(scope="module")
def composed(variables: dict[str, str]) -> dict[str, Any]:
    """The file as Compose understands it."""
    done = config(variables, "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compose_takes_the_file(variables: dict[str, str], tmp_path: Path) -> None:
    """Compose reads it without a word and the public schema agrees; both see a misspelt key."""
    done = config(variables, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert schema_check(FILE).returncode == 0
    spoilt = tmp_path / "docker-compose.yml"
    spoilt.write_text(FILE.read_text(encoding="utf-8").replace("depends_on:", "depends_onn:", 1), encoding="utf-8")
    assert config(variables, "--quiet", files=(spoilt,)).returncode != 0
    assert schema_check(spoilt).returncode != 0


def schema_check(file: Path) -> "subprocess.CompletedProcess[str]":
    return run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_nothing_starts_without_its_secrets(variables: dict[str, str]) -> None:
    """Each secret that is missing is asked for by name."""
    for name in variables:
        done = config({key: value for key, value in variables.items() if key != name}, "--quiet")
        assert done.returncode != 0
        assert f"required variable {name} is missing a value: " in done.stderr


def test_the_keys_that_the_head_makes_are_a_pair(variables: dict[str, str], tmp_path: Path) -> None:
    """The public key that workers trust is that of the key that signs."""
    (tmp_path / "control.key").write_text(variables["CONTROL_KEY"])
    assert Signer.read(tmp_path / "control.key").public_key == variables["TOLLWAY_PUBLIC_KEY"]


def test_every_setting_it_sets_is_one(composed: dict[str, Any]) -> None:
    """Each TOLLWAY_ variable is a setting, and takes its value."""
    for name, service in ours(composed).items():
        given = {key.removeprefix(PREFIX).lower(): value for key, value in service["environment"].items()}
        assert given
        assert given.keys() <= Settings.model_fields.keys(), name
        Settings(**given)


def test_every_command_it_runs_is_one(composed: dict[str, Any]) -> None:
    """Commands parse, there is one worker a group, and an unknown command would be seen."""
    for service in ours(composed).values():
        assert not service["entrypoint"]
        assert CliRunner().invoke(cli.app, [*service["command"], "--help"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["topics", "creat", "--help"]).exit_code != 0
    assert {tuple(service["command"]) for service in workers(composed).values()} == {
        ("worker", "--group", group) for group in GROUPS
    }


def test_nothing_listens_but_on_this_host(composed: dict[str, Any]) -> None:
    """Every port is published on loopback alone, and nothing of the host is mounted."""
    services = composed["services"].values()
    ports = [port for service in services for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert len(ports) == 4
    assert {mount["type"] for service in services for mount in service.get("volumes", [])} == {"volume"}
    assert not any(service.get("privileged") or service.get("network_mode") for service in services)


def test_images_are_public_and_pinned(composed: dict[str, Any]) -> None:
    """No image comes from a registry of somebody's own, none floats, and ours has this version."""
    for service in composed["services"].values():
        name, _, tag = service["image"].partition(":")
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", tag), service["image"]
        assert not re.search(r"[.:]", name.partition("/")[0]), service["image"]
    assert {service["image"] for service in ours(composed).values()} == {f"tollway:{PROJECT['version']}"}


def test_each_waits_for_what_it_needs(composed: dict[str, Any]) -> None:
    """What is waited for can be waited for; what runs for ever is checked, restarted and stopped in time."""
    services = composed["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            healthy = how["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in services[other]), f"{name} waits for {other}"
            assert healthy or how["condition"] == "service_completed_successfully"
        assert ("healthcheck" in service) == (name not in ONCE)
        assert service["restart"] == ("on-failure:5" if name in ONCE else "unless-stopped")
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert all("stop_grace_period" in services[name] for name in {*workers(composed), "kafka", "valkey", "clickhouse"})


def test_each_knows_only_its_own_secrets(composed: dict[str, Any], variables: dict[str, str]) -> None:
    """The key that signs reaches `topics` alone; a worker gets the passwords of what it writes to."""
    who = {
        name: {key for key, value in variables.items() if value in json.dumps(service)}
        for name, service in workers(composed).items()
    }
    log = {"TOLLWAY_PUBLIC_KEY", "TOLLWAY_DEPLOYMENT"}
    assert who == {
        "accounts": log | {"REDIS_PASSWORD"},
        "audit": log | {"CLICKHOUSE_PASSWORD"},
        "stripe": log | {"TOLLWAY_STRIPE_KEY"},
    }
    assert [name for name, service in composed["services"].items() if "secrets" in service] == ["topics"]
    assert variables["CONTROL_KEY"] not in json.dumps(composed["services"])


def test_workers_run_with_nothing_they_do_not_need(composed: dict[str, Any]) -> None:
    """No capabilities, no new privileges, a root file system that cannot be written to."""
    for service in ours(composed).values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for service in workers(composed).values():
        assert service["read_only"] is True
        assert {mount.partition(":")[0] for mount in service["tmpfs"]} == {"/var/lib/tollway", "/tmp"}


def test_a_further_worker_extends_one(variables: dict[str, str], tmp_path: Path) -> None:
    """A worker that is to come, with a port and a folder of its own, is a few lines beside the file, and gets no other's secret."""
    more = tmp_path / "more.yml"
    more.write_text(
        f"""
services:
  further:
    extends: {{file: {FILE}, service: stripe}}
    command: [worker, --group, all]
    environment: {{TOLLWAY_STRIPE_KEY: !reset null, TOLLWAY_SPOOL_DIR: /var/lib/tollway/spool}}
    ports: ["127.0.0.1:8080:8080"]
    volumes: ["spool:/var/lib/tollway/spool"]
volumes: {{spool: }}
""",
        encoding="utf-8",
    )
    done = config(variables, "--format", "json", files=(FILE, more))
    assert done.returncode == 0, done.stderr
    further = json.loads(done.stdout)["services"]["further"]
    assert further["read_only"] is True
    assert further["depends_on"]["topics"]["condition"] == "service_completed_successfully"
    assert {key for key, value in variables.items() if value in json.dumps(further)} == {
        "TOLLWAY_PUBLIC_KEY",
        "TOLLWAY_DEPLOYMENT",
    }


def test_ingest_is_there_where_it_is_asked_for(variables: dict[str, str], composed: dict[str, Any]) -> None:
    """With its profile there is the HTTP edge too, with Redis' secret alone and a health check on its own port."""
    assert "ingest" not in composed["services"]
    done = config({**variables, "COMPOSE_PROFILES": "ingest"}, "--format", "json")
    assert done.returncode == 0, done.stderr
    ingest = json.loads(done.stdout)["services"]["ingest"]
    (port,) = ingest["ports"]
    assert f":{port['target']}/health" in ingest["healthcheck"]["test"][-1]
    assert port["host_ip"] == "127.0.0.1"
    assert {key for key, value in variables.items() if value in json.dumps(ingest)} == {
        "TOLLWAY_PUBLIC_KEY",
        "TOLLWAY_DEPLOYMENT",
        "REDIS_PASSWORD",
    }


def test_the_registry_is_asked_by_all_workers(composed: dict[str, Any]) -> None:
    """Schemas are published before any worker compares, at the registry's own address."""
    services = composed["services"]
    port = next(port["target"] for port in services["registry"]["ports"])
    for name in (*workers(composed), "schemas", "topics"):
        url = services[name]["environment"]["TOLLWAY_SCHEMA_REGISTRY_URL"]
        assert url == f"http://registry:{port}/apis/ccompat/v7"
    for name in workers(composed):
        assert services[name]["depends_on"]["schemas"]["condition"] == "service_completed_successfully"


def test_kafka_is_set_as_in_the_local_stack(composed: dict[str, Any]) -> None:
    """Both brokers take the same records and make no topics by themselves; each listener has an address and a protocol."""
    local, here = server_properties(Path(), 1, 2, {}), kafka_settings(composed)
    for name in ("message.max.bytes", "replica.fetch.max.bytes", "auto.create.topics.enable", "process.roles"):
        assert here[name] == local[name]
    listeners = {each.partition(":")[0] for each in here["listeners"].split(",")}
    assert listeners == {each.partition(":")[0] for each in here["listener.security.protocol.map"].split(",")}
    advertised = dict(each.split("://") for each in here["advertised.listeners"].split(","))
    assert advertised.keys() == listeners - {here["controller.listener.names"]}
    assert here["inter.broker.listener.name"] in advertised
    (port,) = composed["services"]["kafka"]["ports"]
    assert advertised["HOST"] == f"{port['host_ip']}:{port['published']}"
    assert f"HOST://:{port['target']}" in here["listeners"].split(",")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, composed: dict[str, Any]) -> Iterator[Site]:
    """Kafka and Valkey as the file sets them, ClickHouse with its user and password, Stripe's stand-in for Stripe."""
    folder = tmp_path_factory.mktemp("site")
    placed = re.compile(r"listener|process\.roles|node\.id|controller\.quorum|log\.dirs")
    settings = {name: value for name, value in kafka_settings(composed).items() if not placed.search(name)}
    password = composed["services"]["clickhouse"]["environment"]["CLICKHOUSE_PASSWORD"]
    parts: dict[str, Any] = {
        "kafka": KafkaBroker(folder, settings=settings),
        "valkey": Valkey(tmp_path_factory.mktemp("valkey"), composed["configs"]["valkey"]["content"]),
        "clickhouse": ClickHouseServer(folder, user="tollway", password=password, database="default"),
        "stripe": StripeServer(folder, key=STRIPE_KEY),
    }
    addresses = {
        "kafka:9092": parts["kafka"].bootstrap,
        "valkey:6379": f"127.0.0.1:{parts['valkey'].port}",
        "8123": str(parts["clickhouse"].port),
        "https://api.stripe.com": parts["stripe"].url,
    }
    site = Site(folder, composed, addresses)
    try:
        for part in parts.values():
            part.start()
        for part in parts.values():
            part.wait_ready(DEADLINE_S)
        yield site
    finally:
        for process in site.running.values():
            process.kill()
            process.wait()
        for part in reversed(parts.values()):
            part.stop()


def test_the_set_starts_is_well_and_stops(site: Site, variables: dict[str, str]) -> None:
    """Topics, tables and a worker a group start in the file's order, the doctor finds nothing, and SIGTERM ends them cleanly."""
    mount = site.composed["services"]["topics"]["secrets"][0]
    assert Path(mount["target"]) == Path("/var/lib/tollway/control.key")
    (site.data("topics") / "control.key").write_text(variables["CONTROL_KEY"])
    for name in ("topics", "tables"):
        done = site.once(name)
        assert done.returncode == 0, done.stderr
    for name in workers(site.composed):
        assert not site.healthy(name)
        site.start(name)
    waiting, until = set(site.running), time.monotonic() + DEADLINE_S
    while waiting:
        assert time.monotonic() < until, f"not healthy: {waiting}"
        for name in waiting:
            assert site.running[name].poll() is None, (site.data(name) / "out").read_text()
        waiting = {name for name in waiting if not site.healthy(name)}
    told = json.loads(site.once("topics", "doctor", "--json").stdout)
    assert [finding for finding in told["findings"] if not finding["ok"]] == []
    for process in site.running.values():
        process.terminate()
    assert {name: process.wait(DEADLINE_S) for name, process in site.running.items()} == dict.fromkeys(GROUPS, 0)


def test_the_workers_only_writable_folder_is_the_images(composed: dict[str, Any]) -> None:
    """Data, work folder and the workers' tmpfs are one place, which belongs to the image's user."""
    _, last = stages()
    env = dict(pair.split("=", 1) for pair in shlex.split(dict(last)["ENV"]))
    assert env["TOLLWAY_DATA"] == dict(last)["WORKDIR"]
    owner = dict(last)["USER"].split(":")
    for service in workers(composed).values():
        assert f"{env['TOLLWAY_DATA']}:uid={owner[0]},gid={owner[1]}," in service["tmpfs"][0]
