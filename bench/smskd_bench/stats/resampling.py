"""Intervals and p values from the differences themselves, without a normal distribution.

Both enumerate every possibility where there are few, and draw with a fixed seed where there are
many, so the same numbers always give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from smskd_bench.stats.sample import CONFIDENCE, Interval, t_quantile

ALL_RESAMPLES = 6
"""Up to so many values, all n^n resamples (46,656) are looked at instead of drawn ones."""

ALL_SIGNS = 16
"""Up to so many values, all 2^n signs (65,536)."""

DRAWS = 20_000
SEED = 20260122


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """Expanded percentile interval of the mean: the bootstrap's, widened for small n.

    The plain percentile interval is too narrow by about sqrt((n - 1) / n) and by taking the normal
    for the t distribution. Hesterberg (The American Statistician 69, 2015, section 4.1.1) takes
    percentiles further out, so that it would equal the t interval for normal data. Below about
    six values no bootstrap can reach 95 percent: a resample never leaves the range of the data.

    Returns:
        None for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return None
    further = math.sqrt(n / (n - 1)) * t_quantile(0.5 + CONFIDENCE / 2, n - 1)
    tail = 100.0 * float(ndtr(-further))
    low, high = np.percentile(_resampled_means(np.asarray(values, float)), (tail, 100.0 - tail))
    return Interval(float(low), float(high))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # One product in place of gathering every value of every resample.
    means: NDArray[np.float64] = _shares(values.size) @ values
    return means


@lru_cache(maxsize=4)
def _shares(n: int) -> NDArray[np.float64]:
    """How much of each value is in the mean of each resample ``(R, n)``."""
    if n <= ALL_RESAMPLES:
        taken = np.array(list(product(range(n), repeat=n)))
    else:
        taken = np.random.default_rng(SEED).integers(n, size=(DRAWS, n))
    places = taken + n * np.arange(len(taken))[:, None]
    counts = np.bincount(places.ravel(), minlength=taken.size).reshape(taken.shape)
    return counts / n


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p of a mean of zero, if each difference could as well have had the other sign.

    Exact for up to 16 values. The smallest it can be is 2 / 2^n: with five values or fewer it never
    falls below 0.05.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no differences")
    data = np.asarray(values, float)
    signs, exact = _signs(data.size)
    sums = np.abs(signs @ data)
    seen = abs(float(data.sum()))
    as_large = int((sums >= seen - 1e-9 * max(1.0, seen)).sum())
    return as_large / len(signs) if exact else (as_large + 1) / (len(signs) + 1)


def _signs(n: int) -> tuple[NDArray[np.float64], bool]:
    """Rows of +1 and -1 ``(R, n)``, and whether they are all there are."""
    return (_all_signs(n), True) if n <= ALL_SIGNS else (_drawn_signs(n), False)


@lru_cache(maxsize=4)
def _all_signs(n: int) -> NDArray[np.float64]:
    bits = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
    return (1.0 - 2.0 * bits).astype(np.float64)


@lru_cache(maxsize=4)
def _drawn_signs(n: int) -> NDArray[np.float64]:
    drawn = np.random.default_rng(SEED).integers(2, size=(DRAWS, n))
    return (1.0 - 2.0 * drawn).astype(np.float64)
