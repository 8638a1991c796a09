"""A whole deployment behind TLS and passwords: each role has a user of its own, with the rights of `connectors.rights` alone."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import redis
from pydantic import SecretStr

from tests.secured_broker import Certificates, SecuredBroker
from tests.tls_front import TlsFront
from tollway.connectors.embedded.clickhouse import ClickHouseServer
from tollway.connectors.embedded.process import LOOPBACK, free_port
from tollway.connectors.embedded.stripe_server import StripeServer
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.rights import KAFKA, REDIS
from tollway.streams.settings import Settings

DEADLINE_S = 120
PARTITIONS = 2


def password(role: str) -> str:
    """Of a role's users."""
    return f"pw-{role}"


@dataclass
class Site:
    """Where everything is, and who is running."""

    data: Path
    broker: SecuredBroker
    pem: Certificates
    valkey: ValkeyServer
    valkey_tls: TlsFront
    clickhouse: ClickHouseServer
    clickhouse_tls: TlsFront
    stripe: StripeServer
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def make_users(self) -> None:
        """A user a role, at Kafka and at Redis."""
        for role, rights in KAFKA.items():
            self.broker.user(role, password(role))
            self.broker.allow(role, rights)
        with redis.Redis.from_url(self.valkey.url) as client:
            for role, rules in REDIS.items():
                client.execute_command("ACL", "SETUSER", role, "on", f">{password(role)}", *rules.split())

    def settings(self, role: str, **changed: Any) -> Settings:
        """What a process of this role is told."""
        given: dict[str, Any] = {
            "data": self.data / role,
            "kafka_bootstrap": self.broker.bootstrap,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": role,
            "kafka_sasl_password": password(role),
            "kafka_ca_file": self.broker.pem.ca,
            "partitions": PARTITIONS,
            "replication": 1,
            "redis_url": f"rediss://{role}:{password(role)}@{LOOPBACK}:{self.valkey_tls.port}/0",
            "redis_ca_file": self.pem.ca,
            "clickhouse_port": self.clickhouse_tls.port,
            "clickhouse_user": self.clickhouse.user,
            "clickhouse_password": self.clickhouse.password,
            "clickhouse_secure": True,
            "clickhouse_ca_file": self.pem.ca,
            "stripe_url": self.stripe.url,
            "stripe_key": self.stripe.key,
            "billing_window_s": 10,
            "billing_grace_s": 5,
            "tick_idle_s": 2.0,
            "checkpoint_s": 3.0,
            "session_timeout_ms": 2000,
        }
        return Settings(**{**given, **changed})

    def environment(self, settings: Settings) -> dict[str, str]:
        """The settings as a process gets them."""
        told = {name: getattr(settings, name) for name in settings.model_fields_set}
        plain = {name: each.get_secret_value() if isinstance(each, SecretStr) else each for name, each in told.items()}
        return {**os.environ, **{f"TOLLWAY_{name.upper()}": str(value) for name, value in plain.items()}}

    def run(self, settings: Settings, *argv: str) -> "subprocess.CompletedProcess[str]":
        """A command to its end: never a traceback."""
        done = subprocess.run(
            [sys.executable, "-m", "tollway.streams.cli", *argv],
            env=self.environment(settings),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    def start_worker(self, group: str, public_key: str) -> str:
        """A worker under its own user; returns where it says how it is."""
        port = free_port()
        settings = self.settings(group, public_key=public_key, health_port=port)
        settings.data.mkdir(exist_ok=True)
        with (self.data / f"{group}.log").open("wb") as out:
            self.running[group] = subprocess.Popen(
                [sys.executable, "-m", "tollway.streams.cli", "worker", "--group", group],
                env=self.environment(settings),
                stdout=out,
                stderr=out,
            )
        return f"http://{LOOPBACK}:{port}/health"

    def wait_healthy(self, places: dict[str, str]) -> None:
        """Until each worker folds."""
        until, waiting = time.monotonic() + DEADLINE_S, dict(places)
        while waiting:
            for group, url in list(waiting.items()):
                said = (self.data / f"{group}.log").read_text(errors="replace")[-2000:]
                assert self.running[group].poll() is None, said
                assert time.monotonic() < until, f"{group} is not healthy: {said}"
                if _ok(url):
                    del waiting[group]
            time.sleep(0.2)

    def stop_workers(self) -> dict[str, int]:
        """SIGTERM; their exit codes."""
        for process in self.running.values():
            process.terminate()
        codes = {group: process.wait(DEADLINE_S) for group, process in self.running.items()}
        self.running.clear()
        return codes


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def _ok(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
