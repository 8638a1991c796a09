"""Events a CPU second: our accounts group beside its peers, interleaved on one topic, each its own share of the same traffic.

All do the same work: one 60 s sum by event time per principal and meter (5,000 principals by Zipf's law, 2.25 quantities an
event), decoded from Avro, shown in Redis, made safe every two seconds; every sum is compared. Ours admits, de-duplicates and
bills besides. Then ours alone under the default policy with six meters. CPU seconds are those of the contender's process.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import contenders, part
from benchmarks.contenders import AIOKAFKA, BYTEWAX, FAUST, PLAIN, QUIX, QUIX_LEAST, Peer, pythons, rates
from benchmarks.machine import median, peer_versions, say
from benchmarks.part import Size, python_of
from benchmarks.site import Site, drained, light
from benchmarks.traffic import MORE_METERS, Shape, Traffic

SIZES = [
    Size("events", 300_000, 40_000, "events of ours a round; peers get their share"),
    Size("rounds", 3, 1, "interleaved rounds"),
    Size("principals", 5_000, 300, "who call"),
    python_of("quix"),
    python_of("bytewax"),
]
CUSTOMERS_ONE_IN = 10


def opened(site: Site, shape: Shape) -> None:
    """Meters that bill, customers, and the policy of the peers' work; folded before anything is measured."""
    site.command([("*", "meter.add", {"meter": name, "event_name": f"bench_{name}"}) for name in MORE_METERS])
    names = shape.accounts()
    site.command([(name, "account.open", {"name": name}) for name in names[::CUSTOMERS_ONE_IN]])
    site.command([(name, "customer.bind", {"customer": f"cus_{name}"}) for name in names[::CUSTOMERS_ONE_IN]])
    site.command([(name, "policy.set", contenders.MINUTE_SUMS) for name in names])
    say("policies are in the log; the worker digests them")
    drained(site)


def measure(events: int, rounds: int, principals: int, quix_python: str, bytewax_python: str) -> dict[str, Any]:
    """All rounds."""
    python = pythons(quix_python, bytewax_python)
    peers = [peer for peer in (PLAIN, AIOKAFKA, BYTEWAX, QUIX, QUIX_LEAST, FAUST) if python(peer)]
    with light() as site:
        work = Traffic(Shape("acct", principals))
        free = Traffic(Shape("free", principals, meters=6), seed=2)
        opened(site, work.shape)
        found = [one_round(site, peers, python, work, free, events, turn) for turn in range(rounds)]
    names = ["ours", "ours_default", *(peer.name for peer in peers)]
    runs = {name: [each[name] for each in found] for name in names}
    middle = {
        name: {key: median([run[key] for run in of]) for key in ("per_cpu_s", "per_s")} for name, of in runs.items()
    }
    ours = middle["ours"]["per_cpu_s"]
    return {
        "versions": {name: version for python_, name in ((quix_python, "quixstreams"), (bytewax_python, "bytewax"))
                     if python_ for name, version in peer_versions(python_, (name,)).items()},
        "median": middle,
        "times": {peer.name: round(ours / middle[peer.name]["per_cpu_s"], 2) for peer in peers},
        "exact": all(run.get("exact", True) for of in runs.values() for run in of),
        "rounds": runs,
    }  # fmt: skip


def one_round(
    site: Site, peers: list[Peer], python: Any, work: Traffic, free: Traffic, events: int, turn: int
) -> dict[str, dict[str, Any]]:
    """Every contender once, in an order that changes from round to round."""

    def default() -> dict[str, Any]:
        site.append(free.events(events, summed=False))
        return drained(site)

    def turn_of(peer: Peer) -> dict[str, Any]:
        return contenders.run_peer(site, peer, python(peer), work, max(1_000, int(events * peer.share)))

    # Ours folds what the peers have had since its last turn, too; the default policy's events come when nothing else waits.
    ours = {"ours": lambda: contenders.run_ours(site, work, events), "ours_default": default}
    turns: list[dict[str, Callable[[], dict[str, Any]]]] = [ours]
    turns += [{peer.name: partial(turn_of, peer)} for peer in peers]
    found = {}
    for some in turns[turn % len(turns) :] + turns[: turn % len(turns)]:
        for name, run in some.items():
            found[name] = rates(run())
            exact = {True: "exact", False: "NOT EXACT", None: ""}[found[name].get("exact")]
            say(f"round {turn + 1}: {name:12} {found[name]['per_cpu_s']:>9,} events a CPU second  {exact}")
    return found


if __name__ == "__main__":
    sys.exit(part.run("fold", __doc__, SIZES, measure))
