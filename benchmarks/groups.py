"""All groups together, each a worker, beside broker, Valkey, ClickHouse and the Stripe stand-in on the same machine.

First they drain a full topic; then they follow producers that send events encoded beforehand. Events have all usual fields
(344 bytes), 500 accounts of ten principals count `calls` by the default policy, three meters are billed, a hundred accounts
have a customer, and bills go out every minute, sixty times as often as by default.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import part
from benchmarks.live import SERVICES, producers
from benchmarks.machine import cpu_s, median, say
from benchmarks.part import Size
from benchmarks.site import SAFE_S, Site, Worker, sent, wait_for, whole
from benchmarks.traffic import METERS, Traffic

SIZES = [
    Size("events", 500_000, 60_000, "events to drain a round"),
    Size("rounds", 3, 1, "times that a full topic is drained"),
    Size("rate", 40_000, 5_000, "live: events a second"),
    Size("seconds", 45.0, 10.0, "live: how long"),
    Size("producers", 1, 1, "live: producer processes"),
]
GROUPS = ("accounts", "audit", "stripe")
CUSTOMERS = 100
SETTLED = 0.25
"""The first quarter of a live run is start, not steady state."""
BILLS = {"billing_window_s": 60, "billing_grace_s": 5}
CLOSING = 2_000
"""Events that follow a step later, so that the audit group may close the blocks before them."""


def opened(site: Site) -> None:
    """Meters, accounts and customers."""
    site.command([("*", "meter.add", {"meter": name, "event_name": f"bench_{name}"}) for name in METERS])
    site.command([(name, "account.open", {"name": name}) for name in SERVICES.accounts()])
    bound = SERVICES.accounts()[:CUSTOMERS]
    site.command([(name, "customer.bind", {"customer": f"cus_{name}"}) for name in bound])


@contextmanager
def fleet(site: Site, **told: str) -> Iterator[dict[str, Worker]]:
    """One worker a group, all with their partitions. They tick when idle, as in production."""
    often = {"CHECKPOINT_S": str(SAFE_S * 2.5), "TICK_IDLE_S": "10", **told}
    with ExitStack() as stack:
        workers = {group: stack.enter_context(Worker(site, group, **often)) for group in GROUPS}
        yield workers


def usage(site: Site, workers: dict[str, Worker]) -> dict[str, float]:
    """CPU seconds so far of everything that we run."""
    pids = {**{group: worker.pid for group, worker in workers.items()}, **site.pids}
    return {name: cpu_s(pid) for name, pid in pids.items()}


def shares(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, int]:
    """Per cent of a core that each has taken."""
    return {name: round((after[name] - before[name]) / seconds * 100) for name in after}


def drain(site: Site, traffic: Traffic, events: int) -> dict[str, Any]:
    """Fill the topic, start all workers, and wait until Redis and ClickHouse have it."""
    made = traffic.events(events, summed=False)
    site.append(made)
    target = site.ends()
    time.sleep(site.settings.step_s + 0.5)
    site.append(traffic.events(CLOSING, summed=False))
    with fleet(site, TICK_IDLE_S="3600") as workers:
        following = [workers["accounts"], workers["audit"]]
        left = {worker.group: sum(target.values()) - worker.before for worker in following}
        wait_for(lambda: any(worker.events() for worker in following), "the first events")
        began, spent = time.monotonic(), usage(site, workers)
        done: dict[str, float] = {}

        def all_done() -> bool:
            for worker in following:
                if worker.group not in done and worker.events() >= left[worker.group] and sent(worker.health() or {}):
                    done[worker.group] = time.monotonic() - began
            return len(done) == len(following)

        wait_for(all_done, "both groups at the end of the log")
        wall = max(done.values())
        cores = shares(spent, usage(site, workers), wall)
    return {"events": events, "wall_s": wall, "per_s": round(events / wall), "done_s": done, "cores": cores}


def live(site: Site, rate: int, seconds: float, processes: int) -> dict[str, Any]:
    """Workers that follow; their lag each second, in seconds of traffic."""
    with producers(site, rate, seconds, processes) as senders, fleet(site) as workers:
        following = [workers["accounts"], workers["audit"]]
        wait_for(lambda: all(worker.ready() for worker in workers.values()), "all workers to have their partitions")
        wait_for(lambda: lag(site, following[0]) <= 0, "the accounts group at the end of the log")
        senders.go()
        began, spent = time.monotonic(), usage(site, workers)
        lags: dict[str, list[float]] = {worker.group: [] for worker in following}
        while senders.running and (passed := time.monotonic() - began) < seconds + 60:
            time.sleep(max(0.0, len(lags["accounts"]) + 1 - passed))
            for worker in following:
                lags[worker.group].append(lag(site, worker) / rate)
        cores = shares(spent, usage(site, workers), time.monotonic() - began)
        told = senders.told()
        reasons = {worker.group: (worker.health() or {}).get("groups") for worker in workers.values()}
    sent, wall = sum(each["sent"] for each in told), max(each["wall_s"] for each in told)
    found = {
        "rate": rate, "sent": sent, "per_s": round(sent / wall), "wall_s": wall, "cores": cores,
        "producers_core": round(sum(each["cpu_s"] for each in told) / wall * 100),
        "lag_s": {group: lag_figures(series) for group, series in lags.items()},
        "healthy": all(group["healthy"] for groups in reasons.values() for group in groups or []),
    }  # fmt: skip
    say(f"live: {found['per_s']:,} events a second, lag {found['lag_s']}, cores {cores}")
    return found


def lag(site: Site, worker: Worker) -> int:
    """Records of the log that a group has not folded."""
    return sum(site.ends().values()) - worker.before - worker.events()


def lag_figures(series: list[float]) -> dict[str, float]:
    """Seconds of traffic: median and worst behind the start, and how much it grows a second (least squares)."""
    steady = series[int(len(series) * SETTLED) :]
    if len(steady) < 2:
        return {}
    slope = statistics.linear_regression(range(len(steady)), steady).slope
    return {"median": round(median(steady), 2), "max": round(max(steady), 2), "growth_a_second": round(slope, 4)}


def measure(events: int, rounds: int, rate: int, seconds: float, producers: int) -> dict[str, Any]:
    """Drain, then live."""
    with whole(**BILLS) as site:
        opened(site)
        traffic = Traffic(SERVICES, seed=9)
        drains = []
        for turn in range(rounds):
            drains.append(drain(site, traffic, events))
            say(f"round {turn + 1}: drained at {drains[-1]['per_s']:,} events a second, cores {drains[-1]['cores']}")
        followed = live(site, rate, seconds, producers)
    middle = median([each["per_s"] for each in drains])
    return {"drain": {"per_s": middle, "rounds": drains}, "live": followed}


if __name__ == "__main__":
    sys.exit(part.run("groups", __doc__, SIZES, measure))
