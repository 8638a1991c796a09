"""The gate contract, simulated: `python -m tests.simulation.gate --seeds 20000`, `--mutants`, or `--seed N` to see one world again."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool

from tests.simulation.gate_invariants import Violation
from tests.simulation.gate_mutants import MUTANTS, Mutant
from tests.simulation.gate_world import play

KINDS = ("mixed", "storm", "days", "leases")
BATCH = 50

Found = tuple[int, str, str]
"""seed, invariant, detail"""


def seeds_of(kind: str, first: int, count: int, bugs: frozenset[str] = frozenset()) -> tuple[Counter[str], list[Found]]:
    """What happened in these worlds, and what did not hold."""
    stats: Counter[str] = Counter()
    found: list[Found] = []
    for seed in range(first, first + count):
        try:
            stats += play(seed, bugs, kind).stats
        except Violation as violation:
            found.append((seed, violation.name, str(violation)))
        stats["worlds"] += 1
    return stats, found


def again(kind: str, seed: int, bug: str = "") -> str:
    """The command that plays one world again."""
    planted = f" --plant {bug}" if bug else ""
    return f"python -m tests.simulation.gate --kind {kind} --seed {seed}{planted}"


def killed(mutant: Mutant) -> tuple[Mutant, int, Counter[str], int]:
    """Worlds played, killers, and the first seed that failed; stops a batch after the first that a named killer found."""
    killers: Counter[str] = Counter()
    first, played = -1, 0
    while played < mutant.worlds and not killers.keys() & mutant.killers.split():
        count = min(BATCH, mutant.worlds - played)
        _, found = seeds_of(mutant.kind, played, count, frozenset([mutant.name]))
        killers += Counter(name for _, name, _ in found)
        first = found[0][0] if found else first
        played += count
    return mutant, played, killers, first


def _shares(kind: str, first: int, count: int) -> Iterator[tuple[str, int, int]]:
    for start in range(first, first + count, BATCH):
        yield kind, start, min(BATCH, first + count - start)


def campaign(kinds: tuple[str, ...], first: int, count: int, processes: int) -> int:
    """Half the seeds mixed, a sixth of each other kind; prints one line of JSON. Returns the exit code."""
    stats: Counter[str] = Counter()
    failed: list[tuple[str, Found]] = []
    shares = [
        share
        for kind in kinds
        for share in _shares(kind, first, count if len(kinds) == 1 else -(-count // (2 if kind == "mixed" else 6)))
    ]
    started = time.monotonic()
    with Pool(processes) as pool:
        for done, (kind, (some, found)) in enumerate(
            zip([share[0] for share in shares], pool.imap(_share, shares), strict=True), 1
        ):
            stats += some
            failed += [(kind, each) for each in found]
            if sys.stderr.isatty():
                print(f"\r{done}/{len(shares)} batches, {len(failed)} violations", end="", file=sys.stderr)
    for kind, (seed, _, detail) in failed[:20]:
        print(f"{detail[:300]}\n  {again(kind, seed)}")
    print(json.dumps({"violations": len(failed), "seconds": round(time.monotonic() - started), **sorted_(stats)}))
    return 1 if failed else 0


def _share(share: tuple[str, int, int]) -> tuple[Counter[str], list[Found]]:
    return seeds_of(*share)


def sorted_(stats: Counter[str]) -> dict[str, int]:
    return dict(sorted(stats.items()))


def plant(processes: int, only: str) -> int:
    """Every planted fault (or one), with who found it. Returns the exit code: 1 where one was not named by its invariant."""
    missed = 0
    with Pool(processes) as pool:
        for mutant, played, killers, first in pool.imap(
            killed, [mutant for mutant in MUTANTS if only in ("", mutant.name)]
        ):
            named = [name for name in killers if name in mutant.killers.split()]
            missed += not named
            who = ", ".join(f"{name} {count}" for name, count in killers.most_common())
            print(f"| {mutant.name} | {mutant.kind} | {played} | {who or 'not killed'} | {first} |", flush=True)
    return 1 if missed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.gate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000, help="worlds to play")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, help="only such worlds")
    parser.add_argument("--seed", type=int, help="play this world alone")
    parser.add_argument("--plant", default="", help="a fault to plant")
    parser.add_argument("--mutants", action="store_true", help="plant every fault")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    if given.mutants:
        return plant(given.processes, given.plant)
    if given.seed is not None:
        bugs = frozenset([given.plant] if given.plant else [])
        stats, found = seeds_of(given.kind or "mixed", given.seed, 1, bugs)
        print("\n".join(detail for _, _, detail in found) or json.dumps(sorted_(stats)))
        return 1 if found else 0
    return campaign((given.kind,) if given.kind else KINDS, given.first, given.seeds, given.processes)


if __name__ == "__main__":
    sys.exit(main())
