"""Mean, spread and 95 percent interval of the same cell over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``, in the unit of the numbers."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies in it, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Sample:
    """What is known of a number from n independent draws.

    Attributes:
        n: Draws.
        mean: Their mean.
        std: Sample standard deviation (divisor n - 1); None for one draw.
        interval: 95 percent interval of the mean by Student's t; None for one draw.
    """

    n: int
    mean: float
    std: float | None
    interval: Interval | None


def sample(values: Sequence[float]) -> Sample:
    """Describe draws.

    Raises:
        ValueError: there are none, or one is NaN or infinite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"no sample of finite numbers: {list(values)}")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Sample(1, mean, None, None)
    std = statistics.stdev(values)
    return Sample(n, mean, std, t_interval(mean, std / math.sqrt(n), n - 1))


def t_interval(centre: float, error: float, freedom: float) -> Interval:
    """95 percent interval from a standard error with so many degrees of freedom."""
    half = t_quantile(0.5 + CONFIDENCE / 2, freedom) * error
    return Interval(centre - half, centre + half)


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t."""
    return float(stdtrit(freedom, probability))


def t_above(value: float, freedom: float) -> float:
    """Probability that Student's t is above ``value``."""
    return float(stdtr(freedom, -value))
