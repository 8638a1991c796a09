"""Does a process grow? A straight line through its memory, with the interval in which the true slope lies, against its noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
NOISE_SIGMAS = 2.0
NOISE_LEAST_SHARE, NOISE_LEAST_MB = 0.01, 1.0
"""A process that hardly moves may still grow by a hundredth of itself, or a megabyte: a table that doubles, one more arena."""


@dataclass(frozen=True)
class Slope:
    """MB a minute with its 95 % interval; growth over the time measured, and what it has to exceed to be one."""

    mb_per_minute: float
    low: float
    high: float
    mean_mb: float
    growth_mb: float
    noise_mb: float
    samples: int
    independent: float
    """Samples that count: neighbours resemble each other."""

    @property
    def grows(self) -> bool:
        return self.low > 0 and self.growth_mb > self.noise_mb


def slope(minutes: Sequence[float], megabytes: Sequence[float]) -> Slope:
    """Least squares; the interval is widened by the samples' first autocorrelation. Needs ten samples."""
    if len(minutes) != len(megabytes) or len(minutes) < 10:
        raise ValueError(f"a slope needs ten samples, got {len(minutes)}")
    t, y = np.asarray(minutes, float), np.asarray(megabytes, float)
    centred = t - t.mean()
    per_minute = float(centred @ (y - y.mean()) / (centred @ centred))
    rest = y - y.mean() - per_minute * centred
    independent = _independent(rest)
    spread = float(np.sqrt(rest @ rest / max(1.0, len(rest) - 2)))
    error = spread / float(t.std()) / np.sqrt(independent)
    margin = float(student(CONFIDENCE, max(1.0, independent - 2)) * error)
    growth = per_minute * float(t[-1] - t[0])
    noise = max(NOISE_SIGMAS * spread, NOISE_LEAST_SHARE * float(y.mean()), NOISE_LEAST_MB)
    return Slope(
        per_minute, per_minute - margin, per_minute + margin, float(y.mean()), growth, noise, len(rest), independent
    )


def _independent(rest: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    """n (1 − r) / (1 + r) of an autoregressive series, three at least."""
    power = float(rest @ rest)
    r = float(rest[1:] @ rest[:-1]) / power if power else 0.0
    r = min(max(r, 0.0), 0.999)
    return max(3.0, len(rest) * (1 - r) / (1 + r))


def student(confidence: float, freedom: float) -> float:
    """Two-sided quantile of Student's t, by its expansion round the normal one."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
