"""The measure of memory: a leak is seen, noise is not taken for one."""

import xml.etree.ElementTree as ElementTree
from random import Random

import pytest

from tests.soak_picture import picture
from tests.soak_slope import slope, student

MINUTES = [number / 12 for number in range(240)]
"""Twenty minutes, a sample every five seconds."""


def sawtooth(random: Random, mb: float, height: float) -> list[float]:
    """A process whose collector gives back what it took, every few minutes."""
    return [mb + height * (number % 40) / 40 + random.gauss(0, 0.3) for number in range(len(MINUTES))]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_growth(seed: int) -> None:
    """Neither independent noise nor a collector's sawtooth grows."""
    random = Random(seed)
    assert not slope(MINUTES, [200 + random.gauss(0, 2) for _ in MINUTES]).grows
    assert not slope(MINUTES, sawtooth(random, 200, 30)).grows


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_growth(seed: int) -> None:
    """Half a megabyte a minute shows under two megabytes of noise, and its interval holds the true slope."""
    random = Random(seed)
    found = slope(MINUTES, [200 + 0.5 * minute + random.gauss(0, 2) for minute in MINUTES])
    assert found.grows
    assert found.low - 0.1 < 0.5 < found.high + 0.1
    assert found.growth_mb == pytest.approx(10, abs=2)


def test_neighbours_that_resemble_each_other_count_less() -> None:
    """A random walk of small steps has few independent samples, so its interval is wide."""
    random, walk = Random(1), [200.0]
    for _ in MINUTES[1:]:
        walk.append(walk[-1] + random.gauss(0, 0.2))
    found = slope(MINUTES, walk)
    assert found.independent < 30
    assert found.samples == len(MINUTES)


def test_the_quantile_is_students() -> None:
    """Two-sided 95 %: 2.228 at ten degrees of freedom, 1.980 at a hundred and twenty, as the tables have it."""
    assert student(0.95, 10) == pytest.approx(2.228, abs=0.003)
    assert student(0.95, 120) == pytest.approx(1.980, abs=0.001)


def test_the_picture_names_every_process_and_its_slope() -> None:
    """Well-formed, one panel a process, a leak in another colour."""
    series = {"worker <a>": [200.0] * len(MINUTES), "kafka": [300 + minute for minute in MINUTES]}
    slopes = {name: slope(MINUTES, values) for name, values in series.items()}
    drawn = picture("memory", MINUTES, series, slopes, 5.0)
    texts = [node.text or "" for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("text")]
    assert {"worker <a>", "kafka", "+1.000 MB/min"} <= set(texts)
    assert drawn.count("#b00020") == 2
