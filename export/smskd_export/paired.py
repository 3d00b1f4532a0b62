"""Two classifiers on the same images: did accuracy really change? Exact test and score interval.

Two independent accuracies of 10,000 images are known to about a point each; what differs between a
network and its int8 version is smaller. On the same images only those count on which one of the
two is right and the other wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""


@dataclass(frozen=True)
class PairedChange:
    """Accuracy of a classifier against that of another one on the same images.

    Attributes:
        n: Number of images.
        gained: Images that only the new one gets right.
        lost: Images that only the old one gets right.
        difference: Points of top-1, new minus old.
        low: Lower end of the 95 percent interval of the difference, in points.
        high: Upper end.
        p: Of the exact McNemar test, two-sided: how often chance alone splits the images on which
            they differ at least so unevenly.
    """

    n: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def paired_change(new_right: NDArray[np.bool_], old_right: NDArray[np.bool_]) -> PairedChange:
    """Compare two classifiers image by image.

    Args:
        new_right: Whether the new one is right ``(N,)``.
        old_right: Whether the old one is right ``(N,)``.

    Raises:
        ValueError: there are no images, or not the same number.
    """
    if new_right.shape != old_right.shape or new_right.ndim != 1 or not new_right.size:
        raise ValueError(f"{new_right.shape} and {old_right.shape} images cannot be compared")
    gained = int((new_right & ~old_right).sum())
    lost = int((old_right & ~new_right).sum())
    low, high = score_interval(gained, lost, new_right.size)
    return PairedChange(
        n=new_right.size,
        gained=gained,
        lost=lost,
        difference=100.0 * (gained - lost) / new_right.size,
        low=100.0 * low,
        high=100.0 * high,
        p=exact_mcnemar(gained, lost),
    )


def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of ``gained`` heads in ``gained + lost`` throws of a fair coin; exact."""
    throws, fewer = gained + lost, min(gained, lost)
    ways, tail = 1, 1
    for k in range(fewer):
        ways = ways * (throws - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << throws))


def score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 percent interval of the difference of two paired proportions, by Tango's score method.

    It holds every difference that a score test does not reject. Unlike the usual normal interval it
    has a width when no image differs, and keeps its coverage when few do
    (Statistics in Medicine 17, 1998, 891-908).

    Returns:
        Lower and upper end, as fractions of n.
    """

    def score(difference: float) -> float:
        return _score(gained, lost, n, difference)

    estimate = (gained - lost) / n
    low = _root(lambda d: score(d) - _Z, -1.0, estimate)
    high = _root(lambda d: score(d) + _Z, estimate, 1.0)
    return low, high


def _score(gained: int, lost: int, n: int, difference: float) -> float:
    """Test statistic of "the difference is this"; falls as the difference grows."""
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    # Most likely probability of a lost image among those that allow this difference.
    q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    distance = gained - lost - n * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero; the nearer end if it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
