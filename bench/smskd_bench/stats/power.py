"""How many seeds a claim needs, from the spread of paired differences seen so far.

Exact for the paired t test on normal differences (noncentral t). The spread itself is known from
few seeds; :func:`upper_std` says how large it may well be (Browne, Statistics in Medicine 14,
1995): with the plain estimate half of all plans would come out too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.special import chdtri, nctdtr

from smskd_bench.stats.comparing import ALPHA
from smskd_bench.stats.sample import t_quantile

POWER = 0.8
"""Chance that a claim that is true is shown."""

CAUTION = 0.8
"""Confidence that the spread is not above the one that is planned with."""

MOST = 10_000
"""Seeds beyond which nobody looks."""


def power(n: int, difference: float, std: float, alpha: float = ALPHA) -> float:
    """Chance that n seeds show a true difference, two-sided paired t test.

    Args:
        n: Seeds, at least 2.
        difference: True mean difference, in points.
        std: True standard deviation of the paired differences, in points.
        alpha: Level of the test.
    """
    shift = abs(difference) / std * math.sqrt(n)
    critical = t_quantile(1 - alpha / 2, n - 1)
    if not math.isfinite(shift) or shift > 1e3:
        return 1.0
    return 1.0 - _below(critical, n - 1, shift) + _below(-critical, n - 1, shift)


def _below(value: float, freedom: int, shift: float) -> float:
    """Probability that the noncentral t is below a value."""
    found = float(nctdtr(freedom, shift, value))
    return 0.0 if math.isnan(found) else found  # so far out that scipy gives up


def equality_power(n: int, margin: float, std: float, alpha: float = ALPHA) -> float:
    """Chance that n seeds show "practically equal" where there is no difference at all.

    Integrates over the spread that will be seen; exact but for the grid of 400 quantiles.
    """
    critical = t_quantile(1 - alpha, n - 1)
    chances = []
    for step in range(400):
        variance = std**2 * float(chdtri(n - 1, 1 - (step + 0.5) / 400)) / (n - 1)
        room = margin - critical * math.sqrt(variance / n)
        reach = room / (std / math.sqrt(n))
        chances.append(max(0.0, 2 * _normal(reach) - 1) if reach > 0 else 0.0)
    return math.fsum(chances) / len(chances)


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def seeds_for_difference(
    difference: float, std: float, alpha: float = ALPHA, wanted: float = POWER
) -> int | None:
    """Fewest seeds that show a true difference with the wanted power; None beyond 10,000."""
    return _fewest(lambda n: power(n, difference, std, alpha) >= wanted)


def seeds_for_equality(
    margin: float, std: float, alpha: float = ALPHA, wanted: float = POWER
) -> int | None:
    """Fewest seeds that show equality within a margin, if there is no difference."""
    return _fewest(lambda n: equality_power(n, margin, std, alpha) >= wanted)


def smallest_difference(
    n: int, std: float, alpha: float = ALPHA, wanted: float = POWER
) -> float | None:
    """The smallest true difference, in points, that n seeds show with the wanted power."""
    if n < 2:
        return None
    low, high = 0.0, std
    while power(n, high, std, alpha) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, middle, std, alpha) >= wanted else (middle, high)
    return high


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """Smallest n from 3 for which a growing condition holds."""
    low, high = 2, 3
    while not enough(high):
        low, high = high, high * 2
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def pooled_std(spreads: Sequence[tuple[int, float]]) -> tuple[float, int] | None:
    """Common standard deviation of several comparisons, and its degrees of freedom.

    Args:
        spreads: Number of seeds and standard deviation of each comparison.

    Returns:
        None where no comparison has two seeds.
    """
    freedom = sum(n - 1 for n, _ in spreads if n > 1)
    if freedom == 0:
        return None
    squares = math.fsum((n - 1) * std**2 for n, std in spreads if n > 1)
    return math.sqrt(squares / freedom), freedom


def upper_std(std: float, freedom: int, confidence: float = CAUTION) -> float:
    """What a standard deviation is not above, with so much confidence."""
    # chdtri inverts the upper tail: the quantile below which 1 - confidence lies.
    return std * math.sqrt(freedom / float(chdtri(freedom, confidence)))
