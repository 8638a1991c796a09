"""The audit log: rows a CPU second of consumer and ClickHouse engine, a second in all, bytes on disk, queries, the proof.

Group audit drains events with all usual fields (344 bytes, ids random) from a full topic into both tables. Then six of the
analyst's questions by the view `usage` (FINAL), as the parts then lie, and after OPTIMIZE; and `tollway audit verify`.
`--rows 10000000 --rounds 1 --keep audit_10m` for the bar at ten million: some ten minutes, 8 GB of disk.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import part
from benchmarks.groups import CLOSING
from benchmarks.machine import cpu_s, median, say
from benchmarks.part import Size
from benchmarks.site import SAFE_S, Site, Worker, wait_for, whole
from benchmarks.traffic import METERS, Shape, Traffic
from tollway.connectors.clickhouse import AuditStore
from tollway.streams.audit_looks import verify_audit
from tollway.streams.audit_verify import verify
from tollway.streams.usage_queries import ask
from tollway.streams.wiring import audit_store

SIZES = [
    Size("rows", 1_000_000, 60_000, "events in all"),
    Size("rounds", 3, 1, "rounds that they come in"),
    Size("tries", 3, 3, "times that each query is asked"),
]
CALLS = Shape("live", principals=5_000, each=10, full=True, variants=100_000)
TABLES = ("usage_log", "usage_events")
AHEAD_ROWS = 500_000
"""Events are made and appended so many at a time."""


def opened(site: Site) -> None:
    """Meters and accounts."""
    site.command([("*", "meter.add", {"meter": name, "event_name": None}) for name in METERS])
    site.command([(name, "account.open", {"name": name}) for name in CALLS.accounts()])


def one_round(site: Site, traffic: Traffic, rows: int) -> dict[str, Any]:
    """Fill the topic, then drain it."""
    for made in range(0, rows, AHEAD_ROWS):
        site.append(traffic.events(min(AHEAD_ROWS, rows - made), summed=False))
    target = sum(site.ends().values())
    time.sleep(site.settings.step_s + 0.5)
    site.append(traffic.events(CLOSING, summed=False))
    engine = site.pids["clickhouse"]
    server = cpu_s(engine)
    with Worker(site, "audit", CHECKPOINT_S=str(SAFE_S)) as worker:
        first = wait_for(worker.events, "the worker's first blocks")
        cpu, began, server_idle = cpu_s(worker.pid), time.monotonic(), cpu_s(engine) - server
        wait_for(lambda: worker.events() >= target - worker.before, "the worker's last blocks")
        wall, events = time.monotonic() - began, worker.events() - first
        consumer = cpu_s(worker.pid) - cpu
        server = cpu_s(engine) - server - server_idle
    return {
        "events": events,
        "consumer_per_cpu_s": round(events / consumer),
        "server_per_cpu_s": round(events / server),
        "per_s": round(events / wall),
    }


def rows_of(store: AuditStore, table: str) -> int:
    return int(store.rows(f"SELECT count() AS n FROM {table}")[0]["n"])


def disk(store: AuditStore) -> dict[str, float]:
    """Bytes an event of each table as parts are now."""
    sql = "SELECT sum(bytes_on_disk) AS bytes, sum(rows) AS n, count() AS parts FROM system.parts WHERE active AND database = currentDatabase() AND table = {table:String}"
    found = {table: store.rows(sql, table=table)[0] for table in TABLES}
    each = {table: round(row["bytes"] / row["n"], 1) for table, row in found.items()}
    return {**each, "both": round(sum(each.values()), 1), "parts": sum(row["parts"] for row in found.values())}


def questions(store: AuditStore) -> dict[str, dict[str, Any]]:
    """query → parameters: the busiest account and principal, a run with runs below it, all of the time there is."""
    who = store.rows(
        "SELECT account, principal, count() AS n FROM usage GROUP BY account, principal ORDER BY n DESC LIMIT 1"
    )[0]
    run = store.rows(
        "SELECT path[1] AS run, count() AS n FROM usage WHERE account = {account:String} GROUP BY run ORDER BY n DESC LIMIT 1",
        account=who["account"],
    )[0]["run"]
    time_s = {"since": int(time.time()) - 86_400, "until": int(time.time()) + 60}
    account = {"account": who["account"]}
    return {
        "01_who_used_most": {**time_s, "most": 100},
        "02_cost_of_a_run": {**account, "run": run},
        "03_busiest_operations": {**time_s, "most": 20},
        "04_last_calls_of_a_principal": {
            **account, "principal_kind": "user", "principal": who["principal"], "most": 100,
        },
        "06_usage_by_hour": {**account, **time_s},
        "07_sessions_by_day": time_s,
    }  # fmt: skip


def asked(store: AuditStore, tries: int) -> dict[str, float]:
    """Milliseconds of each question, the median of its tries."""
    found = {}
    for name, parameters in questions(store).items():
        took = []
        for _ in range(tries):
            took.append(seconds_of(lambda: ask(store, name, **parameters))[0] * 1000)  # noqa: B023 - called at once
        found[name] = round(median(took), 1)
    return found


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    answer = work()
    return time.perf_counter() - began, answer


def verified(site: Site, store: AuditStore) -> dict[str, Any]:
    """Seconds of the whole proof, as the command does it, and of its first half, the log by its hashes."""
    whole_s, report = seconds_of(lambda: asyncio.run(verify_audit(site.settings, lambda _: None)))
    log_s, _ = seconds_of(lambda: verify(store, None, rejudge=None, partitions=len(site.partitions), settle_s=0))
    return {"whole_s": round(whole_s, 2), "log_s": round(log_s, 2), "ok": report["ok"], "records": report["records"]}


def measure(rows: int, rounds: int, tries: int) -> dict[str, Any]:
    """Rounds of draining, then what an analyst and an auditor ask."""
    with whole() as site:
        opened(site)
        traffic = Traffic(CALLS, seed=5)
        runs = []
        for turn in range(rounds):
            runs.append(one_round(site, traffic, rows // rounds))
            say(f"round {turn + 1}: {runs[-1]}")
        store = audit_store(site.settings)
        try:
            held = {table: rows_of(store, table) for table in TABLES}
            found: dict[str, Any] = {
                "rows": held,
                "median": {key: median([run[key] for run in runs]) for key in runs[0] if key != "events"},
                "rounds": runs,
                "disk_as_written": disk(store),
                "queries_ms": asked(store, tries),
            }
            say(f"{held} rows; queries, ms: {found['queries_ms']}")
            found["verify"] = verified(site, store)
            say(f"verify: {found['verify']}")
            for table in TABLES:
                store.command(f"OPTIMIZE TABLE {table} FINAL")
            found |= {"disk_optimised": disk(store), "queries_optimised_ms": asked(store, tries)}
        finally:
            store.close()
    return found


if __name__ == "__main__":
    sys.exit(part.run("audit", __doc__, SIZES, measure))
