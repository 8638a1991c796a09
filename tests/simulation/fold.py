"""The folds, simulated: `python -m tests.simulation.fold --seeds 20000`, `--mutants`, or `--seed N` to see one world again."""

import argparse
import json
import sys
import time
from collections import Counter
from multiprocessing import Pool
from typing import Any

from tests.simulation.fold_holes import ELSEWHERE, MUTANTS
from tests.simulation.fold_invariants import Violation
from tests.simulation.fold_mutants import Mutant
from tests.simulation.fold_world import KINDS, play

BATCH = 10

Found = tuple[int, str, str]
"""seed, invariant, detail"""


def seeds_of(kind: str, first: int, count: int, mutant: Mutant | None = None) -> tuple[Counter[str], list[Found]]:
    """What happened in these worlds, and what did not hold."""
    stats: Counter[str] = Counter()
    found: list[Found] = []
    for seed in range(first, first + count):
        try:
            stats += one(kind, seed, mutant)
        except Violation as violation:
            found.append((seed, violation.name, str(violation)))
        stats["worlds"] += 1
    return stats, found


def one(kind: str, seed: int, mutant: Mutant | None = None) -> Counter[str]:
    """One world, with a fault planted. Raises Violation."""
    if mutant is None:
        return play(seed, kind).stats
    with mutant.planted():
        return play(seed, kind, mutant.bugs).stats


def again(kind: str, seed: int, plant: str = "") -> str:
    """The command that plays one world again."""
    kinds = "" if kind == "mixed" else f" --kind {kind}"
    return f"python -m tests.simulation.fold{kinds} --seed {seed}" + (f" --plant {plant}" if plant else "")


def killed(mutant: Mutant) -> tuple[Mutant, int, str, str]:
    """(mutant, worlds until it was named, by which invariant, the first that anything killed); 0 worlds = not named."""
    first = ""
    for seed in range(mutant.worlds):
        try:
            one(mutant.kind, seed, mutant)
        except Violation as violation:
            first = first or violation.name
            if violation.name in mutant.killers.split():
                return mutant, seed + 1, violation.name, first
    return mutant, 0, "", first


def campaign(kinds: tuple[str, ...], first: int, count: int, processes: int) -> int:
    """The seeds, shared among the kinds; prints one line of JSON. Returns the exit code."""
    shares = []
    for place, kind in enumerate(kinds):
        mine = count // len(kinds) + (place < count % len(kinds))
        shares += [(kind, first + at, min(BATCH, mine - at)) for at in range(0, mine, BATCH)]
    stats: Counter[str] = Counter()
    failed: list[tuple[str, Found]] = []
    started = time.monotonic()
    with Pool(processes) as pool:
        for done, (kind, (some, found)) in enumerate(pool.imap_unordered(_share, shares), 1):
            stats += some
            failed += [(kind, each) for each in found]
            for seed, _, detail in found:
                print(f"{detail[:300]}\n  {again(kind, seed)}", file=sys.stderr, flush=True)
            if sys.stderr.isatty() or done % 50 == 0:
                seconds = time.monotonic() - started
                line = f"{stats['worlds']} of {count} worlds, {len(failed)} violations, {seconds:.0f} s"
                print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - started)
    print(json.dumps({"violations": len(failed), "seconds": seconds, **dict(sorted(stats.items()))}))
    return 1 if failed else 0


def _share(share: tuple[str, int, int]) -> tuple[str, tuple[Counter[str], list[Found]]]:
    return share[0], seeds_of(*share)


def table(processes: int, only: str, as_json: bool) -> int:
    """Every planted hole (or one), with who named it. Returns the exit code: 1 where one was not named by its invariant."""
    rows: list[dict[str, Any]] = []
    wanted = [mutant.name for mutant in MUTANTS if only in ("", mutant.name)]
    with Pool(processes) as pool:
        for name, worlds, by, first in pool.imap(_killed, wanted):
            mutant = next(each for each in MUTANTS if each.name == name)
            row = {"hole": mutant.hole, "mutant": name, "what": mutant.what, "kind": mutant.kind}
            rows.append({**row, "killed_by": by, "worlds": worlds, "first": first})
            if not as_json:
                print(
                    f"| {mutant.hole} | `{name}`: {mutant.what} | {mutant.kind} | {by or 'not killed'} | {worlds} |",
                    flush=True,
                )
    if as_json:
        print(json.dumps({"planted": rows, "elsewhere": ELSEWHERE}, indent=1))
    elif not only:
        for hole, why in ELSEWHERE.items():
            print(f"| {hole} | {why} | | | |")
    return 0 if all(row["killed_by"] for row in rows) else 1


def _killed(name: str) -> tuple[str, int, str, str]:
    mutant = next(each for each in MUTANTS if each.name == name)
    return name, *killed(mutant)[1:]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.fold", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000, help="worlds to play")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, help="only such worlds")
    parser.add_argument("--seed", type=int, help="play this world alone")
    parser.add_argument(
        "--plant", default="", choices=["", *(mutant.name for mutant in MUTANTS)], help="a hole to plant"
    )
    parser.add_argument("--mutants", action="store_true", help="plant every hole")
    parser.add_argument("--json", action="store_true", help="the table of planted holes as JSON")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    mutant = next((each for each in MUTANTS if each.name == given.plant), None)
    if given.mutants:
        return table(given.processes, given.plant, given.json)
    if given.seed is not None:
        stats, found = seeds_of(given.kind or "mixed", given.seed, 1, mutant)
        print("\n".join(detail for _, _, detail in found) or json.dumps(dict(sorted(stats.items()))))
        return 1 if found else 0
    return campaign((given.kind,) if given.kind else KINDS, given.first, given.seeds, given.processes)


if __name__ == "__main__":
    sys.exit(main())
