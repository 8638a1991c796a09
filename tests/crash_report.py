"""What a crash campaign found, its figures, and what makes it red."""

import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.crash_effects import Strike
from tests.crash_scale import Sizes
from tests.crash_strike import SIGKILL, SIGSTOP
from tests.oracle import SHOWN_MAX, Verdict
from tests.oracle_book import Total

IDLE_SHARE_MAX = 0.02
"""A campaign of which more strikes hit a process without work proves too little."""
RECOVER_DEADLINE_S = 120.0
"""Of each kill, on a machine where everything else is being killed and started too."""
EVERY_PROCESS_FROM = 200
"""A campaign of so many strikes must have killed every process."""


@dataclass
class Report:
    """What a campaign found; `ok` only where there is no fault and the verdict is reconciled."""

    seed: int
    sizes: dict[str, Any]
    machine: dict[str, Any]
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    kills: int = 0
    """Strikes in all: SIGKILL, and SIGSTOP with SIGCONT."""
    lost: int = 0
    """Events, rows and units that must be on a side and are not, all sides together."""
    doubled: int = 0
    overspent: int = 0
    """Units beyond a limit, by the log and by what gates held."""
    figures: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Process → how it was struck → how often."""
    looks: dict[str, int] = field(default_factory=dict)
    """Side → how often it was held against the log while processes died."""
    breaches: list[str] = field(default_factory=list)
    """What did not hold at such a moment."""
    gate: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    seals: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    strikes: list[dict[str, Any]] = field(default_factory=list)
    driver_peak_mb: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ok: bool = False

    def judge(self, verdict: Verdict, overspent: dict[Total, int]) -> None:
        """Enter the comparison at the end."""
        self.lost, self.doubled = sum(verdict.lost.values()), sum(verdict.doubled.values())
        self.overspent = sum(overspent.values())
        self.gate["over_limits"] = {str(total): units for total, units in list(overspent.items())[:SHOWN_MAX]}
        self.verdict = {**asdict(verdict), "differences": verdict.differences[:SHOWN_MAX]}
        self.verdict |= {"reconciled": verdict.reconciled, "differences_all": len(verdict.differences)}

    def tell(self, strikes: list[Strike], processes: set[str], by_themselves: dict[str, int]) -> None:
        """Enter the strikes, each and in sum."""
        self.kills, self.strikes = len(strikes), [asdict(strike) for strike in strikes]
        ways: dict[str, Counter[str]] = {name: Counter() for name in sorted(processes)}
        for strike in strikes:
            ways[strike.process][strike.how] += 1
        self.processes = {name: dict(found) for name, found in ways.items()}
        workers = [strike for strike in strikes if strike.how == SIGSTOP and strike.process.startswith("worker")]
        self.figures = {
            "sigkill": sum(strike.how == SIGKILL for strike in strikes),
            "sigstop": sum(strike.how == SIGSTOP for strike in strikes),
            "zombies_overtaken": sum(bool(strike.overtaken) for strike in workers),
            "in_recovery": sum(strike.in_recovery for strike in strikes),
            "idle": sum(not strike.busy for strike in strikes),
            "ended_by_themselves": by_themselves,
            "recover_s": _recover_s(strikes),
        }


def _recover_s(strikes: list[Strike]) -> dict[str, dict[str, float | int]]:
    """Group and way → strikes, median, worst."""
    found: dict[str, list[float]] = defaultdict(list)
    for strike in strikes:
        if strike.recovered_s is not None:
            found[f"{strike.group} {strike.how}"].append(strike.recovered_s)
            found["all"].append(strike.recovered_s)
    return {
        name: {"strikes": len(each), "median": round(statistics.median(each), 2), "worst": max(each)}
        for name, each in sorted(found.items())
    }


def faults(report: Report, verdict: Verdict, scale: Sizes) -> list[str]:
    """What makes a campaign red besides a difference: what did not come back, and what proves too little."""
    wrong = [
        f"{strike['process']}: {strike['how']} at {strike['at_s']} s: did not recover within {RECOVER_DEADLINE_S:.0f} s"
        for strike in report.strikes
        if strike["recovered_s"] is None or strike["recovered_s"] > RECOVER_DEADLINE_S
    ]
    idle = report.figures["idle"]
    if idle > IDLE_SHARE_MAX * report.kills:
        wrong.append(f"{idle} of {report.kills} strikes hit an idle process, at most {IDLE_SHARE_MAX:.0%} may")
    if report.kills < scale.kills:
        wrong.append(f"{report.kills} strikes, {scale.kills} were to be")
    if scale.kills >= EVERY_PROCESS_FROM:
        wrong += [f"{name} was never killed" for name, ways in report.processes.items() if not ways.get(SIGKILL)]
    for reason, count in verdict.raw.items():
        if reason not in ("accepted", "duplicate") and verdict.dead_letters.get(reason, 0) != count:
            wrong.append(f"dead letters `{reason}`: {verdict.dead_letters.get(reason, 0)}, written {count}")
    if report.overspent:
        wrong.append(f"{report.overspent} units above limits: {report.gate['over_limits']}")
    wrong += report.gate["held_apart"]
    wrong += [f"call {call} was allowed twice" for call in report.gate["allowed_twice"]]
    if scale.await_holds and report.gate["open_holds"]:
        wrong.append(f"{report.gate['open_holds']} holds are open after their time")
    if not report.audit.get("ok"):
        wrong.append(f"audit verify is red: {report.audit.get('faults') or report.audit}")
    if not report.seals.get("ok"):
        wrong.append(f"the log folded again is another: {report.seals}")
    return wrong


def in_words(report: Report) -> str:
    """For a terminal: all but the single strikes."""
    told = {name: value for name, value in asdict(report).items() if name not in ("strikes", "machine", "sizes")}
    return "\n".join(f"{name}: {value}" for name, value in told.items())
