"""Rows of one pair against other rows, paired by seed, all judged together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smskd_bench.stats.comparing import MARGIN, Difference, Verdict, compare, judge

Scores = Mapping[int, float]
"""Accuracy in percent, by seed."""


@dataclass(frozen=True)
class Versus:
    """A row against one of its controls, paired by seed.

    Attributes:
        control: Name of the control's row.
        difference: Mean difference of test top-1 in points, ours minus the control's.
        std: Its standard deviation over seeds; None for one seed.
        n: Seeds that both have.
        low: Lower end of its 95 percent interval by the paired t, uncorrected; None for one seed.
        high: Upper end.
        bootstrap_low: The same by the bootstrap, as a second opinion.
        bootstrap_high: Upper end.
        p: Two-sided p of the paired t test; None where the spread is unknown.
        p_exact: Two-sided p of the exact sign-flip test.
        p_holm: ``p``, corrected for all comparisons of the pair's table.
        p_unequal_holm: Corrected p of a true difference of at least ``margin``.
        margin: Points that count as practically none.
        family: Comparisons of the pair's table.
        verdict: "better", "worse", "equal" or "open".
        why: Why it is open.
    """

    control: str
    difference: float
    std: float | None
    n: int
    low: float | None = None
    high: float | None = None
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    p: float | None = None
    p_exact: float = 1.0
    p_holm: float | None = None
    p_unequal_holm: float | None = None
    margin: float = MARGIN
    family: int = 1
    verdict: Verdict = "open"
    why: str = ""


def compare_all(
    wanted: Sequence[tuple[str, str]], scores: Mapping[str, Scores], margin: float = MARGIN
) -> dict[str, list[Versus]]:
    """Compare rows of one table, with one correction for all of it.

    Args:
        wanted: Row and control, by name.
        scores: Accuracies of every row.
        margin: Points that count as practically none.

    Returns:
        The comparisons of each row; without those that share no seed.
    """
    measured: list[tuple[str, str, Difference]] = []
    for row, control in wanted:
        if differences := paired(scores.get(row, {}), scores.get(control, {})):
            measured.append((row, control, compare(differences, margin)))
    found: dict[str, list[Versus]] = {}
    verdicts = judge([difference for _, _, difference in measured])
    for (row, control, _), judged in zip(measured, verdicts, strict=True):
        found.setdefault(row, []).append(_versus(control, judged))
    return found


def paired(ours: Scores, theirs: Scores) -> list[float]:
    """Differences at the seeds that both have, by rising seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def strongest(compared: Sequence[Versus]) -> Versus | None:
    """The control that is hardest to beat; beating a weak one is no news.

    Among those that share most seeds with the row, so that a control with one lucky seed cannot
    hide the others. All of them are in the correction, so choosing one costs nothing.
    """
    most = max((versus.n for versus in compared), default=0)
    return min((v for v in compared if v.n == most), key=lambda v: v.difference, default=None)


def _versus(control: str, found: Difference) -> Versus:
    interval, bootstrap = found.interval, found.bootstrap
    return Versus(
        control=control,
        difference=found.mean,
        std=found.std,
        n=found.n,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        bootstrap_low=bootstrap.low if bootstrap else None,
        bootstrap_high=bootstrap.high if bootstrap else None,
        p=found.p,
        p_exact=found.p_exact,
        p_holm=found.p_holm,
        p_unequal_holm=found.p_unequal_holm,
        margin=found.margin,
        family=found.family,
        verdict=found.verdict,
        why=found.why,
    )
