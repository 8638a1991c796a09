"""Where a group's CPU goes while it drains a full topic: shares by layer, from samples of its stacks. Needs `py-spy` on the path.

`accounts` does the peers' work (5,000 principals, minute sums), then the same under the default policy; `audit` its own.
"""

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import contenders, part
from benchmarks.audit import CALLS
from benchmarks.audit import opened as audited
from benchmarks.machine import say
from benchmarks.part import Size
from benchmarks.site import SAFE_S, Site, Worker, drained, light, wait_for, whole
from benchmarks.traffic import Shape, Traffic
from tollway.connectors.errors import Refused

SIZES = [
    Size("events", 1_000_000, 50_000, "events to drain"),
    Size("seconds", 8.0, 5.0, "of samples"),
]
SAMPLES_A_SECOND = 200
LAYERS = {
    "fetching (aiokafka)": ("aiokafka/",),
    "decoding (Avro → Arrow)": ("streams/decode", "streams/batch"),
    "admission, de-duplication": ("streams/judge", "streams/dedupe", "streams/directory", "streams/bounds", "streams/cutter"),
    "Redis": ("streams/quota_view", "streams/quota_jobs", "streams/quota_lots", "connectors/redis", "/redis/", "streams/bindings_view"),
    "quota": ("streams/quota", "streams/counting", "streams/totals", "streams/windows"),
    "billing": ("streams/billing",),
    "checkpoints": ("streams/checkpoint", "streams/state", "streams/owned"),
    "blocks and hashes": ("streams/audit",),
    "ClickHouse client": ("connectors/clickhouse", "clickhouse_connect/", "urllib3/"),
    "engine": ("streams/engine", "streams/accounts", "streams/hand", "streams/app"),
}  # fmt: skip
"""layer → parts of paths; the frame nearest to the work that is in one of them decides."""


def layer_of(stack: str) -> str:
    """Of a sample, its frames from the outermost inwards."""
    for frame in reversed(stack.split(";")):
        for name, places in LAYERS.items():
            if any(place in frame for place in places):
                return name
    return "event loop and the rest"


def sampled(worker: Worker, seconds: float, folder: Path) -> dict[str, float]:
    """layer → per cent of samples in which a thread of the worker was running."""
    out = folder / "stacks.txt"
    argv = ["py-spy", "record", "--pid", str(worker.pid), "--duration", str(int(seconds)), "--output", str(out)]
    argv += ["--rate", str(SAMPLES_A_SECOND), "--format", "raw", "--full-filenames"]
    subprocess.run(argv, check=True, capture_output=True)
    found: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found[layer_of(stack)] += int(count)
    whole_ = found.total() or 1
    return {name: round(count / whole_ * 100, 1) for name, count in found.most_common()}


def profiled(site: Site, group: str, seconds: float) -> dict[str, float]:
    """While a worker of the group drains what is there."""
    with tempfile.TemporaryDirectory() as folder, Worker(site, group, CHECKPOINT_S=str(SAFE_S)) as worker:
        wait_for(worker.events, "the worker's first events")
        shares = sampled(worker, seconds, Path(folder))
    say(f"{group}: {shares}")
    return shares


def measure(events: int, seconds: float) -> dict[str, Any]:
    """Both groups."""
    if shutil.which("py-spy") is None:
        raise Refused("py-spy is not on the path: pip install py-spy")
    work, free = Traffic(Shape("acct")), Traffic(Shape("free", meters=6), seed=2)
    found: dict[str, Any] = {}
    with light() as site:
        contenders.new_log(site, work.shape)
        drained(site)
        for name, traffic in (("accounts, the peers' work", work), ("accounts, default policy", free)):
            site.append(traffic.events(events, summed=False))
            found[name] = profiled(site, "accounts", seconds)
            drained(site)
    with whole() as site:
        audited(site)
        site.append(Traffic(CALLS, seed=5).events(events // 2, summed=False))
        found["audit"] = profiled(site, "audit", seconds)
    return {"shares": found}


if __name__ == "__main__":
    sys.exit(part.run("profile", __doc__, SIZES, measure))
