"""The gate contract in seeded worlds: named invariants hold, and each planted fault is named by the invariant that it breaks."""

import pytest

from tests.simulation.gate import again, main
from tests.simulation.gate_invariants import Violation
from tests.simulation.gate_mutants import MUTANTS, Mutant
from tests.simulation.gate_world import play

WORLDS = {"mixed": 160, "storm": 80, "days": 80, "leases": 120}
KILLED_WITHIN = 200
"""Faults that need more worlds are planted by `python -m tests.simulation.gate --mutants` alone."""


@pytest.mark.parametrize("kind", WORLDS)
def test_the_contract_holds(kind: str) -> None:
    """Crashes, duplicates, lost replies, expiry, failovers, zombies, extend and re-assertion: every invariant, every step."""
    for seed in range(WORLDS[kind]):
        try:
            play(seed, kind=kind)
        except Violation as violation:
            pytest.fail(f"{violation}\n{again(kind, seed)}")


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.worlds <= KILLED_WITHIN], ids=lambda mutant: mutant.name
)
def test_a_planted_fault_is_named(mutant: Mutant) -> None:
    """One line of the contract written wrong breaks the invariant that stands for it."""
    for seed in range(mutant.worlds):
        try:
            play(seed, frozenset([mutant.name]), mutant.kind)
        except Violation as violation:
            if violation.name in mutant.killers.split():
                return
    pytest.fail(f"{mutant.name} was not named in {mutant.worlds} worlds")


def test_a_failing_seed_prints_the_command_that_plays_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that `again` names fails by the same invariant."""
    words = again("mixed", 0, "capture_forgets_actual").split()[3:]
    assert main(words) == 1
    assert capsys.readouterr().out.startswith("TIE")
    assert main(again("mixed", 0).split()[3:]) == 0
