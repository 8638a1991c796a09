"""`python -m tests.prove_page docs/prove/million.json > docs/prove.md`: a campaign's report as a page."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SIDES = {
    "events": ("events: journal against log", "accepted"),
    "clickhouse_rows": ("rows of the view `usage`", "clickhouse_rows"),
    "clickhouse_units": ("ClickHouse totals by account, scope, meter, window", "clickhouse_totals"),
    "redis_units": ("Redis totals by account, scope, meter, window", "redis_totals"),
    "stripe_units": ("Stripe meter events by customer, meter, minute", "stripe_events"),
}


def page(report: dict[str, Any], source: str) -> str:
    """Markdown: what ran, what was found, every death, the versions, how to run it again."""
    return "\n\n".join(
        [
            _head(report, source),
            "## What was found",
            _found(report),
            "## What died, and when",
            _deaths(report),
            _every_death(report),
            "## What was refused",
            _letters(report),
            "## Where it ran",
            machine_told(report["machine"], report["seconds"], report.get("driver_peak_mb")),
            "## Run it again",
            _again(report),
        ]
    )


def _head(report: dict[str, Any], source: str) -> str:
    verdict, scale = report["verdict"], report["scale"]
    state = "agree to the unit" if verdict["reconciled"] else "do not agree"
    red = "" if report["ok"] else "**The campaign is red: see what was found.**\n\n"
    away = [f"{o['part']} {o['away_s']:.0f} s" for row in scale["outages"] for o in row if o["away_s"]]
    held = (
        f" Held away: {', '.join(away)}, with `max.poll.interval` at {scale['max_poll_interval_ms'] // 1000} s."
        * bool(away)
    )
    return (
        f"# The campaign\n\n{red}"
        f"{report['events']:,} calls of `emit()` by {report['accounts']:,} accounts and {report['principals']:,} principals, six"
        f" meters, {len(report['kills'])} deaths with work before each: Kafka, ClickHouse, Redis and Stripe {state} with an oracle"
        " that shares no code with the pipeline. It reads the emitters' journals (a line before each call and one after) and the"
        " log, and folds both by itself, in dictionaries.\n\n"
        f"{report['emitters']} emitting processes, {scale['events'] / scale['traffic_s']:,.0f} calls a second in all for"
        f" {scale['traffic_s']:,.0f} s; 1 % sent twice, 1 % out of order, 1 % up to three days late;"
        f" {verdict['duplicates']:,} duplicates and {sum(verdict['dead_letters'].values())} records of poison in the log."
        f"{held} The rail refused, dropped and lost answers on purpose. Seed {report['seed']}, begun {report['began']},"
        f" {report['seconds']['all'] / 60:.0f} minutes in all. All figures: [{Path(source).name}]({source})."
    )


def _found(report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    rows = [
        f"| {text} | {verdict[count]:,} | {verdict['lost'].get(side, 0):,} | {verdict['doubled'].get(side, 0):,} |"
        for side, (text, count) in SIDES.items()
    ]
    audit = report["audit"]
    return "\n".join(
        [
            "| side | compared | lost | doubled |",
            "|---|---|---|---|",
            *rows,
            "",
            "Lost and doubled count events, rows or units, and never cancel out. Overspent, units at the rail beyond what was"
            f" accepted: {verdict['doubled'].get('stripe_units', 0):,} (no gate took part). Dead letters: exactly the poison."
            f" `tollway audit verify`: {'green' if audit.get('ok') else 'red'}."
            f" Differences: {verdict['differences_all']}. Faults of the campaign: {len(report['faults'])}.",
            *(f"- {line}" for line in [*report["faults"], *verdict["differences"]]),
        ]
    )


def _deaths(report: dict[str, Any]) -> str:
    """One line a process and way to die."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kill in report["kills"]:
        groups.setdefault((kill["process"], kill["how"]), []).append(kill)
    lines = ["| process | death | times | least work before it | longest standstill |", "|---|---|---|---|---|"]
    for (process, how), kills in sorted(groups.items()):
        least = min(max(kill["lag"], kill["waiting"]) for kill in kills)
        stood = [kill["recovered_s"] for kill in kills]
        worst = "never moved again" if None in stood else f"{max(stood):.1f} s"
        lines.append(f"| {process} | {how} | {len(kills)} | {least:,} | {worst} |")
    return "\n".join(
        [
            *lines,
            "",
            "Work = records that the group had not committed, or deltas that were not at the rail. Standstill: from the death until"
            f" every partition that had work has committed again (a commit comes with a checkpoint, every"
            f" {report['scale']['checkpoint_s']} s), the rail has taken"
            " another delta, or Redis another total; the time that a part was held away is in it.",
        ]
    )


def _every_death(report: dict[str, Any]) -> str:
    lines = [
        "<details><summary>Every death</summary>",
        "",
        "| at | s | process | death | what it was doing | moved after |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for kill in report["kills"]:
        moved = "never" if kill["recovered_s"] is None else f"{kill['recovered_s']:.1f} s"
        lines.append(
            f"| {kill['at'][11:23]} | {kill['at_s']:.1f} | {kill['process']} | {kill['how']} | {kill['doing']} | {moved} |"
        )
    return "\n".join([*lines, "", "</details>"])


def _letters(report: dict[str, Any]) -> str:
    found = Counter(report["verdict"]["dead_letters"])
    return "Dead letters by reason, each with the reason that it was made for: " + ", ".join(
        f"`{reason}` {count}" for reason, count in sorted(found.items())
    ) + "."  # fmt: skip


def machine_told(told: dict[str, Any], took: dict[str, float], memory_mb: int | None) -> str:
    """Machine, commit, versions, how long each phase took, and what the campaign's own process needed."""
    packages = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
    seconds = ", ".join(f"{name} {value:,.0f} s" for name, value in took.items())
    return (
        f"{told['cores']} cores of {told['cpu']}, {told['memory']}, {told['system']}, load {told['load_1m']} before the start; commit"
        f" `{told['commit']}`. Apache Kafka {told['kafka']} on {told['java']}; Valkey {told['valkey']}; ClickHouse"
        f" {told['clickhouse']}; Python {told['python']}: {packages}.\n\nTime: {seconds}."
        f" The campaign's own process, oracle included: {memory_mb:,} MB at most."
    )


def _again(report: dict[str, Any]) -> str:
    scale = report["scale"]
    return (
        f"```\nmake prove EVENTS={scale['events']} SEED={report['seed']}\n```\n"
        "prints a line of progress every few seconds, then one JSON object, and exits 0 only where nothing was lost or doubled,"
        " every poison became a dead letter for its own reason, `audit verify` is green and no death hit an idle process. Without"
        " `EVENTS`: fifty thousand calls in two to three minutes, which `make test` runs as well. This page:"
        " `python -m tests.prove_page REPORT.json > docs/prove.md`."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what `python -m tests.prove --json` printed")
    parser.add_argument("--source", default=None, help="the report's path as the page is to link it")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text().splitlines()[-1])
    print(page(report, arguments.source or f"prove/{arguments.report.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
