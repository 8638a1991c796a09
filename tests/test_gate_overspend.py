"""No overspend: 64 workers in several processes, killed now and then, five nested scopes, the real fold behind them."""

from pathlib import Path

from tests.gate_overspend import KILLS, overspend
from tollway.connectors.embedded.valkey import ValkeyServer

ATTEMPTS = 100_000
"""`make overspend` takes a million."""


async def test_no_scope_is_overspent_and_the_gate_ends_equal_to_the_fold(valkey: ValkeyServer, tmp_path: Path) -> None:
    """used + held ≤ limit whenever one looks; at rest gate = fold = what was emitted, to the unit; no phantom, none twice."""
    report = await overspend(valkey.url, tmp_path, ATTEMPTS, seed=7)
    assert report.breaches == []
    assert (report.killed, report.seen.get("executed twice", 0)) == (KILLS, 0)
    assert report.seen["denied limit"] > 0
    assert report.seen["allowed"] > ATTEMPTS // 10
    assert report.expired > 0
    assert report.phantom_looks >= 10
