"""The contenders: each over events of its own on the same topic, its sums compared with what they must be."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from benchmarks.site import DEADLINE_S, SAFE_S, Site, drained, our_sums, peer_sums, without_zeros
from benchmarks.traffic import METERS, Shape, Sums, Traffic

PEERS = Path(__file__).parent / "peers"
MINUTE_SUMS = {"counts": [{"meter": meter, "windows": ["m"], "scopes": ["principal"]} for meter in METERS]}
"""The policy under which our group does what the peers do."""


@dataclass(frozen=True)
class Peer:
    """A script in `peers/`; `share` of a round's events is enough to measure it; `sums` = whether it shows any."""

    name: str
    script: str
    share: float
    title: str
    extra: tuple[str, ...] = ()
    sums: bool = True


PLAIN = Peer("plain", "plain.py", 0.5, "plain loop: confluent-kafka, fastavro, Redis")
AIOKAFKA = Peer("aiokafka", "aio.py", 0.5, "plain loop: aiokafka, fastavro, Redis")
FAUST = Peer("faust", "faust_naive.py", 0.03, "Faust as documented, table in memory")
QUIX = Peer("quix", "quix.py", 0.15, "Quix Streams, windowed sum")
QUIX_LEAST = Peer("quix_least", "quix.py", 0.25, "Quix Streams, no changelog, no sink", ("--least",), sums=False)
BYTEWAX = Peer("bytewax", "bytewax_flow.py", 0.35, "Bytewax, Redis sink, recovery store")


def new_log(site: Site, *shapes: Shape) -> None:
    """Meters that nobody bills, and for each shape's accounts the policy of the peers' work."""
    site.command([("*", "meter.add", {"meter": meter, "event_name": None}) for meter in METERS])
    site.command([(name, "policy.set", MINUTE_SUMS) for shape in shapes for name in shape.accounts()])


def run_peer(site: Site, peer: Peer, python: str, traffic: Traffic, events: int) -> dict[str, Any]:
    """Append events and let a peer sum them; `exact` = each sum is what it must be. Raises RuntimeError where it fails."""
    before: Sums = {name: dict(fields) for name, fields in traffic.sums.items()}
    starts = site.append(traffic.events(events))
    url = site.redis_url.removesuffix("/0") + "/1"
    with Redis.from_url(url) as client:
        client.flushdb()
    argv = [python, str(PEERS / peer.script), "--bootstrap", site.bootstrap, "--redis", url, *peer.extra]
    argv += ["--starts", json.dumps(starts), "--ends", json.dumps(site.ends()), "--safe-s", str(SAFE_S)]
    with tempfile.TemporaryDirectory() as folder:  # where some leave a folder of state
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer.script} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if peer.sums:
        must = without_zeros(difference(traffic.sums, before))
        found["exact"] = exactly(without_zeros(peer_sums(url, peer.name)), must, traffic.one_in)
    return found


def run_ours(site: Site, traffic: Traffic, events: int) -> dict[str, Any]:
    """Append events and let group accounts fold all that it has not yet; its sums are those of everything so far."""
    site.append(traffic.events(events))
    shape, must = traffic.shape, without_zeros(traffic.sums)

    def exact() -> bool:
        return without_zeros(our_sums(site.redis_url, shape, range(0, shape.principals, traffic.one_in))) == must

    return drained(site, exact)


def exactly(shown: Sums, must: Sums, one_in: int) -> bool:
    """Whether what is known is shown; where all is known, nothing else is."""
    return shown == must if one_in == 1 else all(shown.get(name) == fields for name, fields in must.items())


def difference(after: Sums, before: Sums) -> Sums:
    """What came between."""
    return {
        name: {field: units - before.get(name, {}).get(field, 0) for field, units in fields.items()}
        for name, fields in after.items()
    }


def rates(run: dict[str, Any]) -> dict[str, Any]:
    """A run with its events per CPU second and per second."""
    return {
        **run,
        "per_cpu_s": round(run["events"] / run["cpu_s"]),
        "per_s": round(run["events"] / run["wall_s"]),
    }


def pythons(quix: str, bytewax: str) -> Callable[[Peer], str]:
    """Which interpreter runs a peer; '' = its environment was not named."""
    own = {QUIX.script: quix, BYTEWAX.script: bytewax}
    return lambda peer: own.get(peer.script, sys.executable)
