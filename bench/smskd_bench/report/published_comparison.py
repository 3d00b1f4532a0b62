"""Our numbers beside published ones, each with a badge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from smskd_bench.plan import Plan
from smskd_bench.published import STANDARD, Published, load_published, load_sources
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.spec import StageSpec
from smskd_bench.stats.sample import sample, t_interval

Badge = Literal[
    "reproduced", "higher", "lower", "too few seeds", "different protocol", "not run", "no row"
]

TOLERANCE = 0.5
"""Points: sources that report the same cell under the same label differ by up to this."""

SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
"""Students that the standard recipe trains at 0.01 instead of 0.05."""


@dataclass(frozen=True)
class PublishedComparison:
    """A published number and ours.

    Attributes:
        published: The number, its source and protocol.
        epoch: Whose accuracy the source reports: ``last``, ``best``, or ``not said``. Ours: last.
        row: Our row; empty if the matrix has none.
        n: Our seeds.
        mean: Our mean, in percent; None if it was not run.
        low: Lower end of its 95 percent interval.
        high: Upper end.
        difference: Ours less theirs, in points; None unless the protocols are the same.
        difference_low: Lower end of its 95 percent interval, theirs taken as one run.
        difference_high: Upper end.
        badge: In a word or two.
        why: What the badge rests on, where it needs saying.
    """

    published: Published
    epoch: str
    row: str = ""
    n: int = 0
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    badge: Badge = "not run"
    why: str = ""


def compare_published(plan: Plan, rows: Sequence[LeaderboardRow]) -> list[PublishedComparison]:
    """Every published number of the matrix's pairs, in the order of the file.

    Raises:
        MissingDataError: the program is installed without the repository.
    """
    pairs = {pair.name for pair in plan.matrix.pairs}
    wholly = {
        (row.pair, row.row): row for row in rows if row.kind in ("student", "single", "joint")
    }
    return [
        _compared(plan, published, _ours(published, wholly))
        for published in load_published()
        if published.pair in pairs
    ]


def _ours(
    published: Published, rows: dict[tuple[str, str], LeaderboardRow]
) -> LeaderboardRow | None:
    """Our row for it: of that name, else ``NAME SETTING`` where a pair has its own setting."""
    if not published.ours:
        return None
    exact = rows.get((published.pair, published.ours))
    if exact is not None:
        return exact
    named = (
        row
        for (pair, name), row in rows.items()
        if pair == published.pair and name.split()[0] == published.ours
    )
    return next(named, None)


def _compared(plan: Plan, theirs: Published, row: LeaderboardRow | None) -> PublishedComparison:
    epoch = load_sources()[theirs.source].epoch
    if row is None:
        return PublishedComparison(theirs, epoch, badge="no row", why="the matrix has no row")
    ours = PublishedComparison(
        theirs,
        epoch,
        row=row.row,
        n=len(row.top1),
        mean=row.mean,
        low=row.interval.low if row.interval else None,
        high=row.interval.high if row.interval else None,
    )
    if row.mean is None:
        return replace(ours, badge="not run", why=row.status)
    protocol = protocol_of(plan, row)
    if protocol != theirs.protocol:
        why = f"ours is {protocol or 'no published recipe'}"
        return replace(ours, badge="different protocol", why=why)
    difference = row.mean - theirs.top1
    ends = difference_ends(list(row.top1.values()), theirs)
    return replace(
        ours,
        difference=difference,
        difference_low=ends[0] if ends else None,
        difference_high=ends[1] if ends else None,
        badge=badge_of(difference, ends),
        why="theirs is the best epoch on the test set, ours the last" if epoch == "best" else "",
    )


def difference_ends(ours: Sequence[float], theirs: Published) -> tuple[float, float] | None:
    """95 percent interval of ours less theirs, or None for fewer than two seeds.

    Theirs is taken as one run, as sources rarely say of how many it is the mean: with the standard
    deviation they give, else with ours.
    """
    known = sample(list(ours))
    if known.std is None:
        return None
    spread = theirs.std if theirs.std is not None else known.std
    error = math.sqrt(known.std**2 / known.n + spread**2)
    interval = t_interval(known.mean - theirs.top1, error, known.n - 1)
    return interval.low, interval.high


def badge_of(difference: float, ends: tuple[float, float] | None) -> Badge:
    """Higher or lower if the interval leaves out zero; reproduced if it is also near."""
    if ends is None:
        return "too few seeds"
    if ends[0] > 0:
        return "higher"
    if ends[1] < 0:
        return "lower"
    return "reproduced" if abs(difference) <= TOLERANCE else "too few seeds"


def protocol_of(plan: Plan, row: LeaderboardRow) -> str:
    """Label of the published recipe that a row was trained by; empty if by none that we know."""
    cells = [c for c in plan.cells if (c.pair, c.row) == (row.pair, row.row)]
    specs = [plan.nodes[cell.stages[0]] for cell in cells if len(cell.stages) == 1]
    if not specs or len(specs) < len(cells):
        return ""
    return STANDARD if all(map(_is_standard, specs)) else ""


def _is_standard(spec: StageSpec) -> bool:
    data, training = spec.dataset, spec.training
    optimizer, schedule = training.optimizer, training.schedule
    rate = 0.01 if spec.model in SMALL_RATE else 0.05
    return (
        (data.name, data.train_size, data.dev_size) == ("cifar100", None, 0)
        and (training.epochs, training.batch_size, training.carry) == (240, 64, "last")
        and (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (rate, 0.9, 5e-4)
        and not optimizer.nesterov
        and (schedule.kind, schedule.start, schedule.gamma) == ("step", 1.0, 0.1)
        and [round(m * training.epochs) for m in schedule.milestones] == [150, 180, 210]
        and spec.method_weight == 1.0
        and spec.ce_weight is None
    )
