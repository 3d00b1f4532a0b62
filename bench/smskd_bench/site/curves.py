"""Learning curves: histories of stage runs on one axis of epochs, thin enough for a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smskd_bench.plan import Cell, Plan
from smskd_bench.site.inline import number
from smskd_bench.spec import StageSpec
from smskd_bench.store import Record

MOST_POINTS = 120
"""Points of one stage in a picture; longer histories are thinned evenly."""

NOT_DRAWN = ("epoch", "seconds", "images_per_s")

Points = dict[int, float]
"""A number at an epoch of the whole sequence, from 1."""


@dataclass(frozen=True)
class Border:
    """A stage on the axis of epochs.

    Attributes:
        number: From 1.
        title: What is trained in it.
        start: Epochs before it.
        end: Epochs before it and in it.
    """

    number: int
    title: str
    start: int
    end: int


@dataclass(frozen=True)
class SeedCurve:
    """All stages of one cell.

    Attributes:
        seed: Of the student.
        series: By the history's names, over the epochs of the whole sequence.
        ends: Test accuracy in percent at the end of each stage.
    """

    seed: int
    series: Mapping[str, Points]
    ends: Points


def borders(plan: Plan, cell: Cell) -> list[Border]:
    """The stages of a row."""
    specs = [plan.nodes[key] for key in cell.stages]
    return [
        Border(s.number, method_names(s), s.first_epoch, s.first_epoch + s.training.epochs)
        for s in specs
    ]


def method_names(spec: StageSpec) -> str:
    """Methods of a stage with their modifiers, e.g. ``kd (logit_standardisation)``."""
    names = []
    for method in spec.methods:
        modifiers = ", ".join(m.name for m in method.modifiers)
        names.append(f"{method.name} ({modifiers})" if modifiers else method.name)
    return " + ".join(names)


def seed_curve(plan: Plan, cell: Cell, records: Mapping[str, Record]) -> SeedCurve:
    """The curve of one cell, as far as its stages are done."""
    series: dict[str, Points] = {}
    ends: Points = {}
    for key in cell.stages:
        record, spec = records.get(key), plan.nodes[key]
        if record is None:
            continue
        for epoch, values in thinned(record.get("history")):
            for name, value in values.items():
                series.setdefault(name, {})[spec.first_epoch + epoch] = value
        top1 = number(record["test"]["top1"])
        if top1 is not None:
            ends[spec.first_epoch + spec.training.epochs] = top1
    return SeedCurve(cell.seed, series, ends)


def thinned(history: Any, most: int = MOST_POINTS) -> list[tuple[int, dict[str, float]]]:
    """Epoch and finite numbers of at most ``most`` entries, the first and the last among them."""
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    count = len(rows)
    if count > most:
        rows = [rows[round(i * (count - 1) / (most - 1))] for i in range(most)]
    found = []
    for place, row in enumerate(rows, start=1):
        epoch = row.get("epoch")
        known = {
            name: value
            for name, entry in row.items()
            if isinstance(name, str)
            and name not in NOT_DRAWN
            and (value := number(entry)) is not None
        }
        found.append((epoch if isinstance(epoch, int) else place, known))
    return found


def mean_series(curves: Sequence[SeedCurve], name: str) -> Points:
    """Mean over the seeds that have a number, at each epoch."""
    return mean_points(curve.series.get(name, {}) for curve in curves)


def mean_points(points: Iterable[Points]) -> Points:
    """Mean at each epoch of what is known there."""
    values: dict[int, list[float]] = {}
    for one in points:
        for epoch, value in one.items():
            values.setdefault(epoch, []).append(value)
    means = {epoch: number(statistics.fmean(values[epoch])) for epoch in sorted(values)}
    return {epoch: mean for epoch, mean in means.items() if mean is not None}


def names_of(curves: Sequence[SeedCurve], prefix: str) -> list[str]:
    """Names of series that begin so, in the order they came."""
    found = (name for curve in curves for name in curve.series if name.startswith(prefix))
    return list(dict.fromkeys(found))


def columns(points: Points) -> list[list[float]]:
    """Epochs and values, for a script."""
    return [list(points), list(points.values())]
