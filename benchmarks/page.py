"""docs/benchmarks.md and its picture, from the figures in docs/benchmarks/*.json: `python -m benchmarks.page [--check]`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS, Bar
from benchmarks.contenders import AIOKAFKA, BYTEWAX, FAUST, PLAIN, QUIX, QUIX_LEAST
from benchmarks.part import KEPT
from benchmarks.picture import bars

PAGE, PICTURE = KEPT.with_suffix(".md"), KEPT / "fold.svg"
PARTS = ("fold", "million", "groups", "latency", "apply", "gate", "audit", "audit_10m", "emit", "asgi", "profile")
PEERS = (PLAIN, AIOKAFKA, BYTEWAX, QUIX, QUIX_LEAST, FAUST)
Found = dict[str, Any]

INTRO = """\
# Benchmarks

Written by `python -m benchmarks.page` from [the figures](benchmarks/) that `make bench` keeps. Ratios hold, absolutes are one
machine's: broker, Valkey, ClickHouse and whatever is measured share its cores. Every part also runs alone:
`python -m benchmarks.<part> [--quick] [--json] [--keep]`.
"""
WORK = """\
## The fold beside its peers

One topic, interleaved rounds, each contender its own share of the same traffic; events per CPU second (user and system, all
threads) of its process. All do the same work: decode Avro, one 60 s sum by event time per principal and meter (5,000 principals
by Zipf's law, 2.25 quantities an event of 234 bytes), every changed sum to Redis, made safe every two seconds; **every sum of
every run is compared with what it must be**. Ours admits, de-duplicates and bills besides, and its Redis writes are guarded scripts.

| contender | what it does, at its best setting found |
|---|---|
| ours | group `accounts`: admission, de-duplication, quota, billing with customers, checkpoints; exact after a crash |
| plain loop | confluent-kafka `consume(10,000)`, fastavro, dictionaries, one HSET a principal in a pipeline, commit behind it; sums read back from Redis at start; counts twice what a crash repeats |
| plain loop, aiokafka | the same in asyncio |
| Bytewax | its Kafka source by 10,000, `stateful_batch` by principal, a Redis sink that pipelines, recovery store (SQLite) with an epoch every 2 s |
| Quix Streams | `tumbling_window().agg(Sum…).current()`, RocksDB state with changelog topics, a batching sink that writes each window once a commit |
| Quix Streams, least | less than equal work: closed windows only, no changelog, no sink |
| Faust | agent and `Table.tumbling(60)` in memory with its changelog; changed sums to Redis by a timer ten times a second |
"""


def load() -> Found:
    """part → its figures, of those that are kept."""
    return {name: json.loads(path.read_text()) for name in PARTS if (path := KEPT / f"{name}.json").exists()}


def figure(value: float, unit: str) -> str:
    """As it is read."""
    if unit == "×":
        return f"{value:.1f} ×"
    digits = 0 if value >= 100 or value == int(value) else 2
    return f"{value:,.{digits}f} {unit}"


def row_of(bar: Bar, found: Found) -> str:
    """One line of the table."""
    sign = "≥" if bar.least else "≤"
    asked = f"{sign} {figure(bar.bar, bar.unit)}"
    if bar.part not in found:
        return f"| {bar.what} | not measured | {asked} | | {bar.limit} |"
    met = "met" if bar.met(found[bar.part]) else "**missed**"
    return f"| {bar.what} | {figure(bar.read(found[bar.part]), bar.unit)} | {asked} | {met} | {bar.limit} |"


def machine_of(found: Found) -> str:
    """Processor, versions, and when each part ran under which load."""
    if not found:
        return "No figures are kept: run `make bench`."
    some = next(iter(found.values()))["machine"]
    versions = {**some["versions"], **found.get("fold", {}).get("versions", {})}
    runs = ", ".join(
        f"{name} {each['machine']['at']} (load {each['machine']['load_1m']} → {each['load_1m_at_end']}, {each['took_s']} s)"
        for name, each in found.items()
    )
    return (
        f"{some['cpu']}, {some['cores']} cores, {some['memory']}, {some['system']}; Python {some['python']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".\n\nRuns: {runs}. The load is that of the machine a minute before, and at the end, the part's own with it."
    )


def table(head: str, rows: list[str]) -> str:
    """A Markdown table of lines `a | b | c`."""
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows)]) + "\n"


def fold(found: Found) -> str:
    """Every contender's rounds."""
    ours = {"ours": "**ours**", "ours_default": "ours, default policy, six meters, all parts"}
    titles = {**ours, **{peer.name: peer.title for peer in PEERS}}
    rows = []
    for name, runs in found["rounds"].items():
        each = " | ".join(f"{run['per_cpu_s']:,}" for run in runs)
        middle, times = found["median"][name]["per_cpu_s"], found["times"].get(name)
        rows.append(f"{titles[name]} | {each} | **{middle:,.0f}** | {found['median'][name]['per_s']:,.0f} | "
                    + (f"{times:.1f} ×" if times else ""))  # fmt: skip
    rounds = " | ".join(f"round {number + 1}" for number in range(len(found["rounds"]["ours"])))
    exact = "Every sum of every run was exact." if found["exact"] else "**NOT every sum was exact.**"
    head = f"events per CPU second | {rounds} | median | per second | ours is"
    return f"{WORK}\n{table(head, rows)}\n![events per CPU second](benchmarks/fold.svg)\n\n{exact}\n"


def picture(found: Found) -> str:
    """The contenders' medians."""
    names = {"ours": "Tollway, group accounts", "ours_default": "Tollway, default policy, all parts"}
    titles = {**names, **{peer.name: peer.title for peer in PEERS}}
    rows = [(titles[name], each["per_cpu_s"], name in names) for name, each in found["median"].items()]
    return bars("Events per CPU second, same work, same topic (logarithmic)", sorted(rows, key=lambda row: -row[1]))


def million(found: Found) -> str:
    """New keys all the time; recovery; memory."""
    middle, back = found["median_per_cpu_s"], found["recovery"]
    return f"""\
## A million keys

A million principals call in turn, so that nearly every event makes new keys (each of their sums compared for one principal in
sixteen: {"exact" if found["exact"] else "**NOT exact**"}): ours **{middle["ours"]:,.0f}** events per CPU second, the plain loop
{middle["plain"]:,.0f} ({found["times_plain"]:.1f} ×). With {found["keys"]:,} live totals the worker is killed (−9) and another started; from the
start of its process: partitions loaded after {back["loaded_s"]:.1f} s, **the first new total in Redis after {back["first_effect_s"]:.1f} s**, all totals
written again after {back["all_shown_s"]:.1f} s. Memory: **{found["bytes_a_key"]} bytes a key**, {found["bytes_a_key_at_most"]} at the worst moment of the load.
"""


def cores(found: Found) -> str:
    """Shares of a core, largest first."""
    return ", ".join(f"{name} {share} %" for name, share in sorted(found.items(), key=lambda item: -item[1]))


def groups(found: Found) -> str:
    """Drain and live."""
    drains, live = found["drain"], found["live"]
    rounds = ", ".join(f"{each['per_s']:,}" for each in drains["rounds"])
    lags = "; ".join(
        f"{group}: median {series['median']} s, at most {series['max']} s, growing by {series['growth_a_second']} s a second"
        for group, series in live["lag_s"].items()
    )
    return f"""\
## All groups together

Workers of `accounts`, `audit` and `stripe` beside broker, Valkey, ClickHouse and the Stripe stand-in. Events have all usual
fields, 344 bytes; 500 accounts of ten principals under the default policy; three billed meters, bills every minute.

- **Draining** a full topic until Redis and ClickHouse have all of it: {rounds} events a second. Per cent of a core:
  {cores(drains["rounds"][-1]["cores"])}.
- **Live** for {live["wall_s"]:.0f} s: {live["per_s"]:,} events a second by librdkafka, encoded before. Lag in seconds of traffic (the audit group
  closes a block every 5 s, by design): {lags}. Per cent of a core: {cores(live["cores"])}, producers {live["producers_core"]} %.
"""


def latency(found: Found) -> str:
    return f"""\
## Acknowledged → visible

At {found["per_s"]:,} events a second, all groups at work, {found["probes"]:,} probes: from the broker's acknowledgement to the account's total
in Redis p50 {found["p50_ms"]} ms, p90 {found["p90_ms"]} ms, **p99 {found["p99_ms"]} ms**, at most {found["max_ms"]} ms.
"""


def apply(found: Found) -> str:
    alone, both = found["alone"], found["with_gate"]
    return f"""\
## Valkey under the fold

`apply` with the totals of {found["given"]["rate"]:,} events a second ({alone["totals_a_second"]:,.0f} totals in {alone["calls_a_second"]:,.0f} calls a second): **{alone["valkey_core"]} %** of a core;
with {found["given"]["asks"]} authorize and capture a second beside it {both["valkey_core"]} %, a gate's authorize p50 {found["gate_p50_ms"]} ms, **p99 {found["gate_p99_ms"]} ms**.
"""


def gate(found: Found) -> str:
    rows = [
        f"{name} | {found[name].get('a_second', '')} | {found[name]['p50_ms']} ms | {found[name]['p99_ms']} ms"
        for name in ("authorize + capture", "authorize", "capture", "INCR")
    ]
    return f"""\
## The gate

{found["given"]["callers"]} callers at once, five scopes each, while {found["applied_a_second"]:,} totals a second are applied to the same lane; beside it a plain INCR.

{table("call | a second | p50 | p99", rows)}"""


def audit(found: Found) -> str:
    middle, proof = found["median"], found["verify"]
    asked = [f"`{name}` | {took} | {found['queries_optimised_ms'][name]}" for name, took in found["queries_ms"].items()]
    title = f"{found['rows']['usage_log'] / 1e6:.0f} M rows"
    return f"""\
## The audit log, {title}

Consumer {middle["consumer_per_cpu_s"]:,.0f} events per CPU second, ClickHouse's engine {middle["server_per_cpu_s"]:,.0f} (merges meanwhile with it), {middle["per_s"]:,.0f} events a
second. On disk {found["disk_as_written"]["both"]} bytes an event as written, {found["disk_optimised"]["both"]} after OPTIMIZE (raw log {found["disk_optimised"]["usage_log"]}, columns {found["disk_optimised"]["usage_events"]}).
`tollway audit verify` of {proof["records"]:,} records: {proof["whole_s"]} s, of which the log by its hashes {proof["log_s"]} s.

{table("question, by the view (FINAL) | ms, parts as written | ms, optimised", asked)}"""


def emit(found: Found) -> str:
    rows = [
        f"{row['rate']:,.0f} | {row['p50_us']} | {row['p99_us']} | {row['p999_us']} | {row['max_us']:,.0f} | {row['cpu_us_an_event']}"
        for key, row in found["median"].items()
        if key != "sender"
    ]
    sender = found["median"]["sender"]
    return f"""\
## emit()

Events with all usual fields, one asyncio process, spool on disk, the sender in the same loop, real Kafka; µs.

{table("a second | p50 | p99 | p99.9 | max | all CPU an event", rows)}
The sender alone, from a full spool: {sender["per_cpu_s"]:,.0f} events per CPU second, {sender["per_s"]:,.0f} a second.
"""


def asgi(found: Found) -> str:
    middle = {name: value / 1000 for name, value in found["median"].items()}
    rows = [
        f"metering | **{middle['metered_added_p50_us']:.2f} ms** | {middle['metered_added_p99_us']:.2f} ms",
        f"one plain INCR, in its place | {middle['incr_added_p50_us']:.2f} ms | {middle['incr_added_p99_us']:.2f} ms",
        f"metering, and a gate's authorize | {middle['gated_added_p50_us']:.2f} ms | {middle['gated_added_p99_us']:.2f} ms",
        f"(the bare application takes) | {middle['bare_p50_us']:.2f} ms | {middle['bare_p99_us']:.2f} ms",
    ]
    return f"""\
## The ASGI middleware

What it adds to a FastAPI application of twenty routes, usage to a spool on disk and on to real Kafka, limits on account and
user in a real Valkey; variants in turn. The capture follows in the background and is not in these figures.

{table("added | p50 | p99", rows)}"""


def profile(found: Found) -> str:
    rows = [f"{name} | {cores(shares)}" for name, shares in found["shares"].items()]
    return f"""\
## Where the CPU goes

Shares of a worker's running threads while it drains a full topic (`python -m benchmarks.profile`, py-spy).

{table("group | layers", rows)}"""


SECTIONS: tuple[tuple[str, Callable[[Found], str]], ...] = (
    ("fold", fold), ("million", million), ("groups", groups), ("latency", latency), ("apply", apply), ("gate", gate),
    ("audit", audit), ("audit_10m", audit), ("emit", emit), ("asgi", asgi),
    ("profile", profile),
)  # fmt: skip


def text(found: Found) -> str:
    """The whole page."""
    bars_of = "\n".join(row_of(bar, found) for bar in BARS)
    head = "| what | figure | bar | | what limits it |\n|---|---|---|---|---|"
    parts = [INTRO, machine_of(found) + "\n", f"## The bars\n\n{head}\n{bars_of}\n"]
    return "\n".join([*parts, *(write(found[name]) for name, write in SECTIONS if name in found)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the page is not of these figures"
    )
    check = parser.parse_args().check
    found = load()
    wanted: dict[Path, str] = {PAGE: text(found)}
    if "fold" in found:
        wanted[PICTURE] = picture(found["fold"])
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    for path in stale:
        if check:
            print(f"{path.name} is not what the figures say: python -m benchmarks.page", file=sys.stderr)
        else:
            path.write_text(wanted[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
