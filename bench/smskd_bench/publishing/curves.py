"""How rows learned, over all their stages: means over seeds, thin enough for a chart in W&B."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from smskd_bench.publishing.documents import TableDocument
from smskd_bench.store import Record

MOST_POINTS = 9_000
"""Of all rows together: W&B draws 10,000 points of a table."""

SHOWN = ("loss", "train_top1", "test_top1")
COLUMNS = ("row", "pair", "epoch", "stage", "seeds", *SHOWN)

History = Sequence[Sequence[Record]]
"""Epochs of each stage, in order."""


def curve_table(rows: Mapping[tuple[str, str], Sequence[History]]) -> TableDocument | None:
    """The curves of all rows that have histories; None where there are none.

    Args:
        rows: Histories of every finished seed, by pair and row.
    """
    drawn = {name: seeds for name, seeds in rows.items() if any(map(_epochs, seeds))}
    if not drawn:
        return None
    most = max(2, MOST_POINTS // len(drawn))
    several = len({pair for pair, _ in drawn}) > 1
    cells = tuple(
        (f"{pair} / {row}" if several else row, pair, *point)
        for (pair, row), seeds in drawn.items()
        for point in _thinned(list(_points(seeds)), most)
    )
    line = ("epoch", "train_top1", "row")
    return TableDocument(COLUMNS, cells, line, "training accuracy (%), mean over seeds")


def _epochs(history: History) -> int:
    return sum(len(stage) for stage in history)


def _points(seeds: Sequence[History]) -> Iterable[tuple[int | float | None, ...]]:
    """Epoch of the whole sequence, stage, seeds, and the mean of each number."""
    number = 0
    stages = max(len(history) for history in seeds)
    for stage in range(stages):
        here = [history[stage] for history in seeds if stage < len(history)]
        for epoch in range(max((len(rows) for rows in here), default=0)):
            rows = [rows[epoch] for rows in here if epoch < len(rows)]
            number += 1
            yield number, stage + 1, len(rows), *(_mean(rows, name) for name in SHOWN)


def _mean(rows: Sequence[Record], name: str) -> float | None:
    """Over all seeds; None unless each of them has a number."""
    values = [row.get(name) for row in rows]
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(values) else None


def _thinned(
    points: list[tuple[int | float | None, ...]], most: int
) -> list[tuple[int | float | None, ...]]:
    """At most so many, evenly; the last one is among them."""
    step = math.ceil(len(points) / most)
    last = len(points) - 1
    return [p for i, p in enumerate(points) if (last - i) % step == 0]
