"""(source, lane, sequence) is accepted exactly once, in any order, across any cuts."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.records import NOW_MS, source
from tollway.streams.batch import ACCEPTED, DUPLICATE, REFUSED
from tollway.streams.dedupe import HOLES_MAX, Dedupe, Seen

SOURCES = [source(number) for number in range(3)]


def judge(dedupe: Dedupe, rows: list[tuple[int, int, int]]) -> list[int]:
    """Verdicts of (source, lane, sequence) rows."""
    columns = np.array(rows, np.int64).reshape(len(rows), 3)
    return dedupe.sequenced(SOURCES, columns[:, 0], columns[:, 1], columns[:, 2]).tolist()


@given(st.integers(0, 2**32), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_equal_to_a_set_of_all_that_was_seen(seed: int, cut: int) -> None:
    """Against a plain set, over shuffled, repeated and late sequences in random batches, with a dump in between."""
    rng = random.Random(seed)
    rows = [
        (rng.randrange(3), rng.randrange(2) * 255, sequence)
        for sequence in range(1, 40)
        for _ in range(rng.randrange(3))
    ]
    for _ in range(20):
        a, b = rng.randrange(len(rows)), rng.randrange(len(rows))
        rows[a], rows[b] = rows[b], rows[a]
    seen: set[tuple[int, int, int]] = set()
    expected = [DUPLICATE if row in seen else (seen.add(row), ACCEPTED)[1] for row in rows]
    dedupe, found = Dedupe(), []
    for start in range(0, len(rows), cut):
        found += judge(dedupe, rows[start : start + cut])
        dedupe = Dedupe.load(dedupe.dump())
    assert found == expected
    high = {pair: max(s for a, b, s in seen if (a, b) == pair) for pair in {(a, b) for a, b, _ in seen}}
    assert dedupe.missing() == sum(high.values()) - len(seen)


def test_the_oldest_hole_closes_when_there_are_too_many() -> None:
    """One hole more than the bound closes the oldest; its late sequence is refused, never accepted twice."""
    seen = Seen()
    verdicts = [seen.see(2 * number) for number in range(1, HOLES_MAX + 2)]
    assert set(verdicts) == {ACCEPTED}
    assert (seen.see(1), seen.see(3), seen.see(3)) == (REFUSED, ACCEPTED, DUPLICATE)


def test_unsequenced_usage_is_known_for_its_hour() -> None:
    """An event id is a duplicate as long as admission would take it, and is forgotten after."""
    dedupe = Dedupe()
    assert [dedupe.unsequenced("e", NOW_MS, 3), dedupe.unsequenced("e", NOW_MS + 1, 3)] == [ACCEPTED, DUPLICATE]
    dedupe.forget(NOW_MS + 3_600_000 + 60_000, 5)
    assert "e" in dedupe.event_ids
    dedupe.forget(NOW_MS + 3_600_000 + 60_000 + 5_001, 5)
    assert "e" not in dedupe.event_ids


def test_a_source_is_forgotten_five_days_after_its_birth() -> None:
    """Not before: admission still takes what it sent."""
    dedupe = Dedupe()
    judge(dedupe, [(0, 0, 1)])
    dedupe.forget(NOW_MS + 5 * 86_400_000, 5)
    assert dedupe.sources
    dedupe.forget(NOW_MS + 5 * 86_400_000 + 1, 5)
    assert not dedupe.sources
