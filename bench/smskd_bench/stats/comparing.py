"""A row against a control: differences at equal seed, and what they allow to say.

``docs/statistics.md`` says why these methods. In short: the verdict comes from the paired t test
(better, worse) and from two one-sided t tests against a margin (practically equal), each corrected
by Holm over all comparisons of one table. The bootstrap interval and the exact sign-flip p stand
beside as a second opinion; with the three to five seeds of a board they can decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from smskd_bench.stats.holm import holm
from smskd_bench.stats.resampling import bootstrap_interval, sign_flip_p
from smskd_bench.stats.sample import Interval, sample, t_above

ALPHA = 0.05
"""Chance that a table holds any false "better" or "worse"; the same for any false "equal"."""

MARGIN = 0.3
"""Points of accuracy below which a difference is called practically none."""

FEWEST = 3
"""Seeds below which nothing is said: the spread of two numbers is not known."""

NO_SPREAD = 1e-9
"""Standard deviation, in points, that is rounding only."""

Verdict = Literal["better", "worse", "equal", "open"]

WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "practically equal",
    "open": "too few seeds to say",
}
"""What a table prints."""


NOTHING_SHOWN = "neither a difference nor equality is shown"
"""Why most verdicts are open."""


@dataclass(frozen=True)
class Difference:
    """Paired differences, ours minus the control's.

    Attributes:
        n: Seeds that both have.
        mean: In the unit of the numbers (points of accuracy).
        std: Their standard deviation; None for one seed.
        interval: 95 percent, paired t, of this comparison alone; None for one seed.
        bootstrap: 95 percent, expanded percentile bootstrap; None for one seed.
        p: Two-sided, paired t test of no difference; None where the spread is unknown.
        p_exact: Two-sided, exact sign-flip test; never below 2 / 2^n.
        p_unequal: Of a true difference of at least the margin (two one-sided t tests).
        margin: That margin.
        p_holm: ``p``, corrected for all comparisons of the table.
        p_unequal_holm: ``p_unequal``, corrected.
        family: Comparisons of the table.
        verdict: In a word.
        why: Why the verdict is open; else empty.
    """

    n: int
    mean: float
    std: float | None
    interval: Interval | None
    bootstrap: Interval | None
    p: float | None
    p_exact: float
    p_unequal: float | None
    margin: float
    p_holm: float | None = None
    p_unequal_holm: float | None = None
    family: int = 1
    verdict: Verdict = "open"
    why: str = "not judged"


def compare(differences: Sequence[float], margin: float = MARGIN) -> Difference:
    """Measure one comparison; :func:`judge` gives the verdicts of a whole table.

    Raises:
        ValueError: there are no differences, one is not finite, or the margin is not above zero.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"the margin is {margin}; it has to be a number above 0")
    known = sample(differences)
    p, p_unequal = _p_values(known.n, known.mean, known.std, margin)
    return Difference(
        n=known.n,
        mean=known.mean,
        std=known.std,
        interval=known.interval,
        bootstrap=bootstrap_interval(differences),
        p=p,
        p_exact=sign_flip_p(differences),
        p_unequal=p_unequal,
        margin=margin,
    )


def _p_values(
    n: int, mean: float, std: float | None, margin: float
) -> tuple[float | None, float | None]:
    if std is None:
        return None, None
    if std < NO_SPREAD:  # all seeds differ by the same: only a difference of nothing is telling
        return (1.0, 0.0) if abs(mean) < NO_SPREAD else (None, None)
    error, freedom = std / math.sqrt(n), n - 1
    p = 2 * t_above(abs(mean) / error, freedom)
    return p, t_above((margin - abs(mean)) / error, freedom)


def judge(found: Sequence[Difference]) -> list[Difference]:
    """Give the comparisons of one table their corrected p values and verdicts."""
    p_holm = _corrected([d.p if d.n >= FEWEST else None for d in found])
    unequal = _corrected([d.p_unequal if d.n >= FEWEST else None for d in found])
    return [
        _judged(replace(d, p_holm=p, p_unequal_holm=u, family=len(found)))
        for d, p, u in zip(found, p_holm, unequal, strict=True)
    ]


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm over all, where what is unknown counts as 1."""
    corrected = holm([1.0 if p is None else p for p in p_values])
    return [None if p is None else c for p, c in zip(p_values, corrected, strict=True)]


def _judged(found: Difference) -> Difference:
    # "Equal" goes before: the margin says that what is within it does not matter.
    if found.p_unequal_holm is not None and found.p_unequal_holm <= ALPHA:
        return replace(found, verdict="equal", why="")
    if found.p_holm is not None and found.p_holm <= ALPHA:
        return replace(found, verdict="better" if found.mean > 0 else "worse", why="")
    return replace(found, verdict="open", why=_why_open(found))


def _why_open(found: Difference) -> str:
    if found.n < FEWEST:
        return f"{found.n} of at least {FEWEST} seeds"
    if found.p is None:
        return "every seed differs by the same, so the spread is not known"
    if found.p <= ALPHA:
        return f"p {found.p:.2g} alone, but not among {found.family} comparisons"
    return NOTHING_SHOWN
