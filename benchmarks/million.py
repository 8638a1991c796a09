"""A million live keys: events a CPU second where nearly every event makes new ones, recovery after kill −9, memory a key.

A million principals call in turn, 200 to an account, one 60 s sum per principal and meter: ours beside the plain loop, on one
topic. After the first round there are a million live totals: the worker is killed and its successor timed, from its start as a
process to the first new total in Redis.
"""

import sys
import time
from typing import Any

from redis import Redis

from benchmarks import contenders, part
from benchmarks.contenders import PLAIN, rates
from benchmarks.machine import cpu_s, median, rss_bytes, say
from benchmarks.part import Size
from benchmarks.site import SAFE_S, Site, Worker, drained, light, wait_for
from benchmarks.traffic import METERS, Shape, Traffic
from tollway.schemas.lane import lane, tag

SIZES = [
    Size("events", 450_000, 45_000, "events of ours a round: 2.25 keys each"),
    Size("rounds", 3, 1, "interleaved rounds, and recoveries"),
]
EVEN = Shape("even", principals=1_000_000, each=200, even=True)
PROBE = Shape("probe", principals=64)
KNOWN = 16
"""The sums of one principal in so many are compared."""


def opened(site: Site) -> None:
    """Meters that bill, and the policy of the peers' work; folded before anything is measured."""
    site.command([("*", "meter.add", {"meter": name, "event_name": f"bench_{name}"}) for name in METERS])
    names = [*EVEN.accounts(), *PROBE.accounts()]
    site.command([(name, "policy.set", contenders.MINUTE_SUMS) for name in names])
    drained(site)


def idle_worker(site: Site) -> Worker:
    """One with its partitions and nothing to do."""
    worker = Worker(site, "accounts", CHECKPOINT_S=str(SAFE_S))
    wait_for(worker.ready, "the worker to have its partitions")
    wait_for(worker.folded, "Redis to show all")
    return worker


def recovery(site: Site, probes: Traffic) -> dict[str, float]:
    """kill −9 of an idle worker, then events, then its successor: seconds from its start."""
    idle_worker(site).kill()
    site.append(probes.events(500))
    keys = [f"{tag(lane(name))}s:{name}~user:{name}" for name in probes.sums]
    must = [max(fields.items(), key=lambda item: item[0].partition(":")[2]) for fields in probes.sums.values()]

    def shown() -> bool:
        pipe = client.pipeline(transaction=False)
        for key, (name, _) in zip(keys, must, strict=True):
            pipe.hget(key, f"{name} u")
        return any(int(found or -1) >= total for found, (_, total) in zip(pipe.execute(), must, strict=True))

    with Redis.from_url(site.redis_url) as client, Worker(site, "accounts", CHECKPOINT_S=str(SAFE_S)) as worker:
        wait_for(worker.ready, "the partitions to be loaded")
        loaded = time.monotonic() - worker.started
        wait_for(shown, "the first new total")
        first = time.monotonic() - worker.started
        wait_for(worker.folded, "Redis to show all again")
        return {
            "loaded_s": loaded,
            "first_effect_s": first,
            "all_shown_s": time.monotonic() - worker.started,
            "cpu_s": cpu_s(worker.pid),
            "rss_bytes": rss_bytes(worker.pid),
            "rss_max_bytes": rss_bytes(worker.pid, "VmHWM"),
        }


def measure(events: int, rounds: int) -> dict[str, Any]:
    """Rounds; recoveries stand behind the first."""
    with light() as site:
        opened(site)
        traffic, probes = Traffic(EVEN, one_in=KNOWN), Traffic(PROBE, seed=3, spread_us=1)
        with idle_worker(site) as worker:
            empty = rss_bytes(worker.pid)
        runs: list[dict[str, Any]] = []
        recoveries: list[dict[str, float]] = []
        for turn in range(rounds):
            runs.append({"ours": rates(contenders.run_ours(site, traffic, events))})
            if not turn:
                keys = traffic.quantities
                for _ in range(rounds):
                    recoveries.append(recovery(site, probes))
                    said = ", ".join(
                        f"{key} {recoveries[-1][key]:.2f}" for key in ("loaded_s", "first_effect_s", "all_shown_s")
                    )
                    say(f"recovery of {keys:,} keys: {said}")
            runs[-1]["plain"] = rates(contenders.run_peer(site, PLAIN, sys.executable, traffic, events // 2))
            say(
                f"round {turn + 1}: ours {runs[-1]['ours']['per_cpu_s']:,}, plain {runs[-1]['plain']['per_cpu_s']:,} events a CPU second"
            )
    middle = {name: median([run[name]["per_cpu_s"] for run in runs]) for name in ("ours", "plain")}
    rss = median([each["rss_bytes"] for each in recoveries])
    return {
        "keys": keys,
        "median_per_cpu_s": middle,
        "times_plain": round(middle["ours"] / middle["plain"], 2),
        "exact": all(run[name]["exact"] for run in runs for name in run),
        "recovery": {key: round(median([each[key] for each in recoveries]), 2) for key in recoveries[0]},
        "empty_rss_bytes": empty,
        "bytes_a_key": round((rss - empty) / keys),
        "bytes_a_key_at_most": round((median([each["rss_max_bytes"] for each in recoveries]) - empty) / keys),
        "rounds": runs,
        "recoveries": recoveries,
    }


if __name__ == "__main__":
    sys.exit(part.run("million", __doc__, SIZES, measure))
