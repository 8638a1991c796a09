"""Every knob of workers and CLI, read once: environment (TOLLWAY_…), else the running stack's file, else the default."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tollway.connectors.errors import Refused

PREFIX = "TOLLWAY_"


class Settings(BaseSettings):
    """Settings of a worker, the control plane and the CLI. Each is TOLLWAY_<NAME> in the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    data: Path = Field(Path(".tollway"), description="folder of the local stack, the signing key and lock files")
    deployment: str = Field(
        "local", description="name of this deployment: part of every identity at the rail", pattern=r"^[a-z0-9-]{1,32}$"
    )
    public_key: str = Field(
        "",
        description="Ed25519 public key of the control plane, 64 hex digits; must agree with log.open; default: that of <data>/control.key",
    )

    kafka_bootstrap: str = Field("127.0.0.1:9092", description="Kafka brokers, host:port[,host:port]")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to Kafka"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="SASL mechanism"
    )
    kafka_sasl_username: str = Field("", description="SASL user")
    kafka_sasl_password: SecretStr = Field(SecretStr(""), description="SASL password")
    kafka_ca_file: Path | None = Field(
        None, description="CA certificates for Kafka over TLS, PEM; default: the system's"
    )
    kafka_cert_file: Path | None = Field(
        None, description="our own certificate for Kafka, PEM, where brokers ask for one"
    )
    kafka_key_file: Path | None = Field(None, description="the key of that certificate, PEM, without a passphrase")
    kafka_admin_timeout_s: float = Field(15.0, gt=0, description="how long a question about topics may take")
    replication: int = Field(
        3,
        ge=1,
        description="copies of each topic, at least 3; 1 declares a single broker, whose disk is the only copy (a local stack's is 1)",
    )
    partitions: int = Field(16, ge=1, le=256, description="partitions of new topics: a power of two; 64 in production")

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey that gates read, with user and password; rediss:// talks TLS",
    )
    redis_ca_file: Path | None = Field(
        None, description="CA certificates for Redis over TLS, PEM; default: the system's"
    )
    clickhouse_host: str = Field("127.0.0.1", description="ClickHouse host")
    clickhouse_port: int = Field(8123, description="ClickHouse HTTP port")
    clickhouse_user: str = Field("default", description="ClickHouse user")
    clickhouse_password: SecretStr = Field(SecretStr(""), description="ClickHouse password")
    clickhouse_database: str = Field("tollway", description="ClickHouse database", pattern=r"^[a-z_][a-z0-9_]*$")
    clickhouse_secure: bool = Field(False, description="talk TLS to ClickHouse")
    clickhouse_ca_file: Path | None = Field(
        None, description="CA certificates for ClickHouse over TLS, PEM; default: a built-in list"
    )
    clickhouse_timeout_s: float = Field(300.0, gt=0, description="how long an answer of ClickHouse may take")
    stripe_key: SecretStr = Field(
        SecretStr("sk_test_local"), description="Stripe key: restricted, meter events write, meters read"
    )
    stripe_url: str = Field("https://api.stripe.com", description="Stripe's address; the stand-in's in the local stack")

    schema_registry_url: str = Field(
        "",
        description="schema registry with Confluent's API; workers then compare its schemas with theirs at start; default: none",
        pattern=r"^(https?://.+)?$",
    )
    schema_registry_user: str = Field("", description="user of the schema registry (HTTP Basic)")
    schema_registry_password: SecretStr = Field(SecretStr(""), description="password of the schema registry")
    schema_registry_ca_file: Path | None = Field(
        None, description="CA certificates for the schema registry over TLS, PEM; default: the system's"
    )

    replica: str = Field(
        "",
        description="fixed name of this worker's place in its groups; default: a free slot's lock file in the data folder",
    )
    pace_ms: int = Field(100, ge=1, le=1000, description="shortest time between two turns of a fold's loop")
    session_timeout_ms: int = Field(6000, ge=500, description="Kafka group session timeout")
    max_poll_interval_ms: int = Field(300_000, ge=5000, description="Kafka max.poll.interval of a fold's consumer")
    checkpoint_s: float = Field(10.0, gt=0, description="time between two checkpoints of a partition")
    checkpoint_records: int = Field(
        500_000, ge=1, description="records between two checkpoints of a partition, at most"
    )
    tick_idle_s: float = Field(10.0, gt=0, description="an idle partition gets a tick after this long")
    health_port: int = Field(0, ge=0, le=65535, description="loopback port of /health; 0 = none")

    ingest_host: str = Field("127.0.0.1", description="address that `tollway ingest` listens on; TLS is a proxy's work")
    ingest_port: int = Field(8420, ge=1, le=65535, description="port that `tollway ingest` listens on")
    ingest_issuer: str = Field("", description="ingest: `iss` of the tokens that may record usage")
    ingest_audience: str = Field("", description="ingest: `aud` of these tokens")
    ingest_jwks_url: str = Field("", description="ingest: where the issuer's keys are", pattern=r"^(https?://.+)?$")
    ingest_attributes: str = Field(
        "", description="ingest: names of attributes that may travel, with commas between; default: none"
    )
    stripe_webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="ingest: signing secret of the webhook endpoint at Stripe (whsec_…); default: no webhooks, and no signing key needed",
    )

    step_s: int = Field(5, ge=1, description="log.open of a new log: length of a step")
    billing_window_s: int = Field(
        3600, ge=1, description="log.open of a new log: usage window of meter events; divides 3600"
    )
    billing_grace_s: int = Field(
        600, ge=0, description="log.open of a new log: how long a window stays open for late usage"
    )
    snapshot_s: int = Field(86_400, ge=1, description="log.open of a new log: time between sealed snapshots")
    hold_grace_s: int = Field(
        900, ge=0, description="log.open of a new log: how long past expiry an uncaptured hold stays"
    )
    auto_open: bool = Field(False, description="log.open of a new log: accounts open on first usage (development)")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over environment; the stack's file comes in as defaults through `read`."""
        return init_settings, env_settings

    def kafka_security(self) -> dict[str, Any]:
        """aiokafka's arguments for TLS and SASL."""
        if self.kafka_security_protocol == "PLAINTEXT":
            return {}
        from aiokafka.helpers import create_ssl_context

        security: dict[str, Any] = {"security_protocol": self.kafka_security_protocol}
        if "SSL" in self.kafka_security_protocol:
            ca, cert, key = (path and str(path) for path in (self.kafka_ca_file, *self._certificate()))
            security["ssl_context"] = create_ssl_context(cafile=ca, certfile=cert, keyfile=key)
        if "SASL" in self.kafka_security_protocol:
            security |= {
                "sasl_mechanism": self.kafka_sasl_mechanism,
                "sasl_plain_username": self.kafka_sasl_username,
                "sasl_plain_password": self.kafka_sasl_password.get_secret_value(),
            }
        return security

    def _certificate(self) -> tuple[Path | None, Path | None]:
        """Our certificate and its key. Raises Refused where one of them is given without the other."""
        if (self.kafka_cert_file is None) != (self.kafka_key_file is None):
            raise Refused("TOLLWAY_KAFKA_CERT_FILE and TOLLWAY_KAFKA_KEY_FILE belong together: give both, or neither")
        return self.kafka_cert_file, self.kafka_key_file

    def admin_security(self) -> dict[str, Any]:
        """librdkafka's properties for TLS and SASL."""
        if self.kafka_security_protocol == "PLAINTEXT":
            return {}
        security: dict[str, Any] = {"security.protocol": self.kafka_security_protocol}
        if self.kafka_ca_file:
            security["ssl.ca.location"] = str(self.kafka_ca_file)
        if self.kafka_cert_file:
            cert, key = self._certificate()
            security |= {"ssl.certificate.location": str(cert), "ssl.key.location": str(key)}
        if "SASL" in self.kafka_security_protocol:
            security |= {
                "sasl.mechanism": self.kafka_sasl_mechanism,
                "sasl.username": self.kafka_sasl_username,
                "sasl.password": self.kafka_sasl_password.get_secret_value(),
            }
        return security


def read(**given: Any) -> Settings:
    """The settings, with the local stack's endpoints where the environment names no others. Raises Refused in one sentence."""
    try:
        first = Settings(**given)
        stack = first.data / "stack.json"
        if not stack.exists():
            return first
        told: dict[str, Any] = json.loads(stack.read_text(encoding="utf-8")).get("endpoints", {})
        key = first.data / "stripe" / "key"
        if key.exists():
            told["stripe_key"] = key.read_text(encoding="utf-8").strip()
        fields = Settings.model_fields.keys() - first.model_fields_set
        if "kafka_bootstrap" in fields:
            told.setdefault("replication", 1)  # one broker, declared so: a real one must be said to be
        from_stack = {name: value for name, value in told.items() if name in fields}
        return Settings(**{**from_stack, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        name = PREFIX + "_".join(str(part) for part in fault["loc"]).upper()
        raise Refused(f"{name} is {fault.get('input')!r}: {fault['msg']}") from error
    except (OSError, ValueError) as error:
        raise Refused(f"settings cannot be read: {error}") from error
