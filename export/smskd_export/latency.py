"""What a list of inference times says, without saying more than it can. Pure maths, numpy only.

Every sample counts: nothing is clipped, because slow inferences are what a percentile is about.
Unit of all times: nanoseconds, integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CV_LIMIT = 0.025
"""Above this the spread says more about the machine than about the model; trtexec's limit."""
DRIFT_LIMIT = 0.05
"""Windows whose medians differ by more than this would not repeat; MLPerf Mobile's 5 percent."""
BOUND_CONFIDENCE = 0.99


@dataclass(frozen=True)
class Flag:
    """Something to know before believing a number.

    Attributes:
        code: For machines.
        message: What was seen, in words.
        remedy: What to do about it.
    """

    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class LatencySummary:
    """Inference times in nanoseconds, from all samples of all windows.

    Attributes:
        n: Number of samples.
        min_ns: Fastest sample.
        p50_ns: Plain percentile (nearest rank, always a measured sample).
        p90_ns: As above.
        p99_ns: As above.
        p50_bound_ns: Not optimistic in 99 of 100 repetitions; None if there are too few samples.
        p90_bound_ns: As above.
        p99_bound_ns: As above.
        max_ns: Slowest sample.
        mean_ns: Mean.
        cv: Standard deviation divided by the mean.
        window_medians_ns: Median of each window, in order of time.
        flags: Doubts, in words.
    """

    n: int
    min_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p50_bound_ns: int | None
    p90_bound_ns: int | None
    p99_bound_ns: int | None
    max_ns: int
    mean_ns: float
    cv: float
    window_medians_ns: tuple[float, ...]
    flags: tuple[Flag, ...]


def dropped_tail(q: int, p: float, confidence: float = BOUND_CONFIDENCE) -> int:
    """Largest t with ``P[Binomial(q, 1 - p) <= t] <= 1 - confidence``; 0 if q is too small.

    This is the early-stopping rule of MLPerf Inference (``inference_rules.adoc``, appendix): of q
    samples the t - 1 slowest may be dropped, and the slowest that remains bounds the percentile.

    Raises:
        ValueError: p or confidence is not strictly between 0 and 1.
    """
    if not (0 < p < 1 and 0 < confidence < 1):
        raise ValueError(f"p and confidence must lie strictly between 0 and 1: {p}, {confidence}")
    if q < 1:
        return 0
    k = np.arange(q)
    # log pmf(k + 1) - log pmf(k): sums of logarithms stay exact enough where pmf(0) underflows.
    steps = np.log((q - k) / (k + 1)) + math.log((1 - p) / p)
    log_pmf = q * math.log(p) + np.concatenate(([0.0], np.cumsum(steps)))
    cdf = np.cumsum(np.exp(log_pmf))
    return max(0, int(np.count_nonzero(cdf <= 1 - confidence)) - 1)


def percentile_bound(
    sorted_ns: NDArray[np.int64], p: float, confidence: float = BOUND_CONFIDENCE
) -> int | None:
    """Upper bound of the p-quantile that holds with ``confidence``, or None with too few samples.

    Args:
        sorted_ns: All samples ``(q,)``, ascending.
        p: Quantile, e.g. 0.9.
        confidence: One-sided confidence of the bound.

    Raises:
        ValueError: p or confidence is not strictly between 0 and 1.
    """
    t = dropped_tail(len(sorted_ns), p, confidence)
    return int(sorted_ns[len(sorted_ns) - t]) if t else None


def summarise(samples_ns: NDArray[np.int64], windows: Sequence[int]) -> LatencySummary:
    """Summarise samples taken in consecutive windows.

    Args:
        samples_ns: All samples ``(n,)`` in the order of measurement.
        windows: Number of samples of each window; their sum is n.

    Raises:
        ValueError: there are no samples, or the window sizes do not add up.
    """
    samples = np.asarray(samples_ns, dtype=np.int64)
    if samples.size == 0 or sum(windows) != samples.size or min(windows) < 1:
        raise ValueError(f"{samples.size} samples do not fill windows of {list(windows)}")
    ordered = np.sort(samples)
    plain = [int(v) for v in np.quantile(ordered, (0.5, 0.9, 0.99), method="inverted_cdf")]
    bounds = [percentile_bound(ordered, p) for p in (0.5, 0.9, 0.99)]
    parts = np.split(samples, np.cumsum(windows)[:-1])
    medians = tuple(float(np.median(part)) for part in parts)
    mean = float(samples.mean())
    cv = float(samples.std() / mean) if mean else 0.0
    return LatencySummary(
        n=samples.size,
        min_ns=int(ordered[0]),
        p50_ns=plain[0],
        p90_ns=plain[1],
        p99_ns=plain[2],
        p50_bound_ns=bounds[0],
        p90_bound_ns=bounds[1],
        p99_bound_ns=bounds[2],
        max_ns=int(ordered[-1]),
        mean_ns=mean,
        cv=cv,
        window_medians_ns=medians,
        flags=tuple(_flags(samples.size, bounds[2], cv, medians)),
    )


def _flags(n: int, p99_bound: int | None, cv: float, medians: Sequence[float]) -> list[Flag]:
    flags = []
    if p99_bound is None:
        flags.append(
            Flag(
                "too_few_samples",
                f"{n} samples are too few to bound p99 with 99 % confidence",
                "measure at least 662 inferences (min_samples x windows)",
            )
        )
    if cv > CV_LIMIT:
        flags.append(
            Flag(
                "cv_gt_2p5",
                f"the times spread by {cv:.1%} of their mean (limit {CV_LIMIT:.1%})",
                "stop other programs, fix the clock frequency, and compare p90 rather than means",
            )
        )
    spread = (max(medians) - min(medians)) / min(medians) if min(medians) > 0 else 0.0
    if spread > DRIFT_LIMIT:
        flags.append(
            Flag(
                "window_drift",
                f"the medians of the windows differ by {spread:.1%} (limit {DRIFT_LIMIT:.0%})",
                "wait until the machine is idle and its temperature settles, then measure again",
            )
        )
    return flags
