"""What docker-compose.yml and the Dockerfile say, taken apart, and run on this machine under other addresses."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import Child, free_port
from tollway.connectors.embedded.valkey import binary

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ONCE = {"topics", "schemas", "tables"}
DEADLINE_S = 90


def run(*argv: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """A command to its end, with the tools of this environment first on its path."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as home:  # what the tools keep there is not for this folder
        return subprocess.run(
            [str(arg) for arg in argv],
            env={"PATH": path, "HOME": home, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, in their order, without comments and line ends."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, FROM first."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def entrypoint() -> list[str]:
    """What the image runs, before a service's command."""
    argv: list[str] = json.loads(dict(stages()[-1])["ENTRYPOINT"])
    return argv


def ours(composed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run our image."""
    return {name: service for name, service in composed["services"].items() if "build" in service}


def workers(composed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in ours(composed).items() if name not in ONCE}


def kafka_settings(composed: dict[str, Any]) -> dict[str, str]:
    """The broker's properties as its image makes them of the environment."""
    given = composed["services"]["kafka"]["environment"]
    own = {"KAFKA_HEAP_OPTS"}  # the start script's
    return {name[6:].lower().replace("_", "."): value for name, value in given.items() if name not in own}


class Valkey(Part):
    """A Valkey with the configuration of the file, its folder and port apart."""

    def __init__(self, data: Path, content: str) -> None:
        super().__init__(data)
        self.port = free_port()
        self._file = data / "valkey.conf"
        self._file.write_text(f"{content.replace('dir /data', f'dir {data}')}port {self.port}\nbind 127.0.0.1\n")

    def child(self) -> Child:
        return Child("valkey", (binary(), str(self._file)), ready=self.answers)

    def answers(self) -> bool:
        """Whether it takes connections."""
        import redis

        with redis.Redis(port=self.port) as client:
            try:
                client.ping()
            except redis.AuthenticationError:
                return True
            except redis.ConnectionError:
                return False
        raise AssertionError("it asks for no password")


@dataclass
class Site:
    """Where the parts of the file are on this machine: what stands in the file → what stands here."""

    folder: Path
    composed: dict[str, Any]
    addresses: dict[str, str]
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """A text of the file with this machine's addresses."""
        for there, here in self.addresses.items():
            text = text.replace(there, here)
        return text

    def data(self, service: str) -> Path:
        """The service's own /var/lib/tollway, which is also where it runs."""
        folder = self.folder / service
        folder.mkdir(exist_ok=True)
        return folder

    def environment(self, service: str) -> dict[str, str]:
        given = {name: self.here(value) for name, value in self.composed["services"][service]["environment"].items()}
        if given.get("TOLLWAY_CLICKHOUSE_HOST"):
            given |= {"TOLLWAY_CLICKHOUSE_HOST": "127.0.0.1", "TOLLWAY_CLICKHOUSE_PORT": self.addresses["8123"]}
        if given.get("TOLLWAY_STRIPE_KEY"):
            given["TOLLWAY_STRIPE_URL"] = self.addresses["https://api.stripe.com"]
        if given.get("TOLLWAY_HEALTH_PORT"):
            given["TOLLWAY_HEALTH_PORT"] = str(self.port(service))
        given.pop("TOLLWAY_SCHEMA_REGISTRY_URL", None)  # a real one is another lane: tests/test_registry.py
        return {**given, "TOLLWAY_DATA": str(self.data(service))}

    def port(self, service: str) -> int:
        """Containers have a port 8080 each; here they share one machine."""
        return int(self.addresses.setdefault(f"8080 of {service}", str(free_port())))

    def argv(self, service: str) -> list[str]:
        given = self.composed["services"][service]
        return [*(given["entrypoint"] or entrypoint()), *given["command"]]

    def once(self, service: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a service to its end, as `docker-compose run` does with another command."""
        argv = [*entrypoint(), *command] if command else self.argv(service)
        return run(*argv, env=self.environment(service), cwd=self.data(service))

    def start(self, service: str) -> None:
        env = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **self.environment(service)}
        with (self.data(service) / "out").open("wb") as out:
            self.running[service] = subprocess.Popen(
                self.argv(service), env=env, cwd=self.data(service), stdout=out, stderr=out
            )

    def healthy(self, service: str) -> bool:
        """What the service's own health check says."""
        kind, *argv = self.composed["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        return run(*(arg.replace("8080", str(self.port(service))) for arg in argv)).returncode == 0
