"""Differences of two ways of training, paired by seed, and what they allow to be said.

Seeds make most of the spread of an accuracy, and they make it for both ways alike, so the
differences at equal seed tell more than two means do.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from smskd.errors import ConfigError

# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of
Statistical Methods, section 1.3.6.7.2."""

MAX_SEEDS = len(T_975) + 1

NO_DIFFERENCE, LOWER, HIGHER = "no difference seen", "lower", "higher"
UNDECIDED = "one seed: no interval"


@dataclass(frozen=True)
class Paired:
    """Mean of the differences and how well it is known.

    Attributes:
        n: Pairs.
        differences: In the order of the pairs.
        mean: Of the differences, in their unit.
        error: Standard error of the mean; None for one pair.
        low: Lower end of the 95 % t-interval of the mean; None for one pair.
        high: Its upper end.
        verdict: Whether the interval excludes 0, in words.
    """

    n: int
    differences: tuple[float, ...]
    mean: float
    error: float | None
    low: float | None
    high: float | None
    verdict: str


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Compare two sequences whose entries belong together.

    Raises:
        ConfigError: there are no pairs, or more than the table of quantiles is made for.
        ValueError: the lengths differ.
    """
    differences = tuple(a - b for a, b in zip(ours, theirs, strict=True))
    n = len(differences)
    if not 1 <= n <= MAX_SEEDS:
        raise ConfigError(f"{n} pairs cannot be compared", f"give 1 to {MAX_SEEDS} seeds")
    mean = statistics.fmean(differences)
    if n == 1:
        return Paired(n, differences, mean, None, None, None, UNDECIDED)
    error = statistics.stdev(differences) / n**0.5
    half = T_975[n - 2] * error
    low, high = mean - half, mean + half
    return Paired(n, differences, mean, error, low, high, _verdict(low, high))


def _verdict(low: float, high: float) -> str:
    if low > 0.0:
        return HIGHER
    return LOWER if high < 0.0 else NO_DIFFERENCE
