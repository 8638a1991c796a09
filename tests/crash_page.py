"""`python -m tests.crash_page docs/crash/kills.json > docs/crash.md`: a crash campaign's report as a page."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.crash_report import IDLE_SHARE_MAX, RECOVER_DEADLINE_S
from tests.prove_page import SIDES, machine_told

LOOKS = {
    "redis": "no total in Redis above the log's, none smaller than at the look before",
    "clickhouse": "no more rows in the view than accepted usage in the log, never fewer than before",
    "rail": "each meter event at the rail is one delta of the log, with its units, and stands once",
    "dead letters": "each is a record that the log's own fold refuses, for that reason",
    "gate": "used and held within every limit, and what the log has used too",
}


def page(report: dict[str, Any], source: str) -> str:
    """Markdown: what ran, what was found, who was struck and how soon it was back, where, and how to run it again."""
    return "\n\n".join(
        [
            _head(report, source),
            "## What was found",
            _found(report),
            "## What held at every moment",
            _moments(report),
            "## Who was struck",
            _struck(report),
            "## How soon work went on",
            _recovered(report),
            "## Where it ran",
            machine_told(report["machine"], report["seconds"], report["driver_peak_mb"]),
            "## Run it again",
            _again(report),
        ]
    )


def _head(report: dict[str, Any], source: str) -> str:
    sizes, figures = report["sizes"], report["figures"]
    red = "" if report["ok"] else "**The campaign is red: see what was found.**\n\n"
    return (
        f"# The crash campaign\n\n{red}"
        f"**{report['kills']:,} kills: {report['lost']:,} lost, {report['doubled']:,} doubled,"
        f" {report['overspent']:,} overspent.** {figures['sigkill']:,} by kill −9, {figures['sigstop']:,} stopped for longer than"
        f" the session ({sizes['session_timeout_ms'] / 1000:g} s) and continued, so that zombies go on writing;"
        f" {figures['in_recovery']:,} of all came before an earlier one was over.\n\n"
        f"Two workers a group, {sizes['emitters']} emitting services, {sizes['gates']} services behind gates, real Kafka, Valkey,"
        f" ClickHouse and the Stripe stand-in, all of which die at random moments under {sizes['rate'] + sizes['gate_rate']:.0f}"
        f" calls a second ({report['verdict']['emitted']:,} in all). A group's next kill waits until the last one is over, but with a"
        f" probability of {sizes['again']:g} comes before that. Seed {report['seed']}, begun {report['began']}."
        f" All figures, each kill among them: [{Path(source).name}]({source})."
    )


def _found(report: dict[str, Any]) -> str:
    verdict, gate = report["verdict"], report["gate"]
    rows = [
        f"| {text} | {verdict[count]:,} | {verdict['lost'].get(side, 0):,} | {verdict['doubled'].get(side, 0):,} |"
        for side, (text, count) in SIDES.items()
    ]
    return "\n".join(
        [
            "| side | compared | lost | doubled |",
            "|---|---|---|---|",
            *rows,
            "",
            "At the end everything is compared with an oracle that shares no code with the pipeline. Overspent counts units beyond"
            f" any limit of the gated accounts, by the log: {report['overspent']:,}. Gate = fold: used is the log's to the unit, held"
            f" is the sum of open holds, of which {gate['open_holds']} are left."
            f" {sum(verdict['dead_letters'].values()):,} dead letters: exactly the poison. `tollway audit verify`:"
            f" {'green' if report['audit'].get('ok') else 'red'}; {report['seals'].get('sealed', 0):,} sealed snapshots and all checkpoints"
            f" {'equal' if report['seals'].get('ok') else 'differ from'} the log folded again."
            f" Differences: {verdict['differences_all']}. Faults of the campaign: {len(report['faults'])}.",
            *(f"- {line}" for line in [*report["faults"], *verdict["differences"]]),
        ]
    )


def _moments(report: dict[str, Any]) -> str:
    rows = [f"| {text} | {report['looks'].get(side, 0):,} |" for side, text in LOOKS.items()]
    return "\n".join(
        [
            "| while processes died | looks |",
            "|---|---|",
            *rows,
            "",
            f"Breaches: {len(report['breaches'])}. Scopes of gates looked at, all looks together:"
            f" {report['looks'].get('gate scopes', 0):,}.",
            *(f"- {line}" for line in report["breaches"]),
        ]
    )


def _struck(report: dict[str, Any]) -> str:
    rows = []
    for name, ways in report["processes"].items():
        mine = [strike for strike in report["strikes"] if strike["process"] == name]
        again, most = sum(strike["in_recovery"] for strike in mine), max((strike["lag"] for strike in mine), default=0)
        rows.append(f"| {name} | {ways.get('SIGKILL', 0)} | {ways.get('SIGSTOP', 0)} | {again} | {most:,} |")
    figures = report["figures"]
    alone = ", ".join(f"{name} {times}" for name, times in sorted(figures["ended_by_themselves"].items())) or "none"
    return "\n".join(
        [
            "| process | kill −9 | stopped | of these while recovering | most work before it |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Work: records without their effect, deltas not at the rail, bytes in the spool."
            f" {figures['idle']} kills hit an idle process (at most {IDLE_SHARE_MAX:.0%} may)."
            f" {figures['zombies_overtaken']} of the stopped workers woke when another had gone on with all their partitions."
            f" Ended by themselves and started again, killed by nobody: {alone}.",
        ]
    )


def _recovered(report: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {found['strikes']:,} | {found['median']:.1f} s | {found['worst']:.1f} s |"
        for name, found in report["figures"]["recover_s"].items()
    ]
    return "\n".join(
        [
            "| group, and how | kills | median | worst |",
            "|---|---|---|---|",
            *rows,
            "",
            "From the kill until every partition that the process had has a new effect: a lane's offset in Redis, a block in"
            " ClickHouse, a meter event at the rail; of a service, until it or its successor writes; of a server, until the groups"
            " that need it have new effects everywhere. The broker's session, further kills meanwhile, and the time that a"
            f" process was stopped are in it. The deadline of each is {RECOVER_DEADLINE_S:.0f} s.",
        ]
    )


def _again(report: dict[str, Any]) -> str:
    return (
        f"```\nmake crash KILLS={report['sizes']['kills']} SEED={report['seed']}\n```\n"
        "prints a line of progress every few seconds, and exits 0 only where nothing was lost, doubled or overspent and everything"
        " came back in time; OUT=report.json keeps all figures. `make test` runs a small form of it. This page:"
        " `python -m tests.crash_page docs/crash/kills.json > docs/crash.md`."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what `python -m tests.crash --out` wrote")
    parser.add_argument("--source", default=None, help="the report's path as the page is to link it")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    print(page(report, arguments.source or f"crash/{arguments.report.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
