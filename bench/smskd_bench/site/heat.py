"""Order and stage: accuracy of two-stage sequences, first method by second, as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smskd_bench.matrix import RowSection
from smskd_bench.naming import row_name
from smskd_bench.plan import Cell, Plan
from smskd_bench.report.rows import LeaderboardRow

STEPS = 8
"""Shades of a map, from its lowest mean to its highest."""


@dataclass(frozen=True)
class HeatCell:
    """One sequence: its row, mean top-1 in percent if it was run, and shade from 0."""

    row: str
    mean: float | None
    shade: int = 0


@dataclass(frozen=True)
class HeatMap:
    """All two-stage sequences of one pair, with or without reference.

    Attributes:
        pair: Name of the pair.
        reference: Whether the second stage is held by the first stage's student.
        firsts: Methods of stage 1, the lines.
        seconds: Methods of stage 2, the columns.
        cells: By first and second; without those that the matrix does not have.
    """

    pair: str
    reference: bool
    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    cells: Mapping[tuple[str, str], HeatCell]


def heat_maps(plan: Plan, rows: Sequence[LeaderboardRow]) -> list[HeatMap]:
    """The maps of a board that have at least two sequences; ablations are left out."""
    sections = {row_name(section): section for section in plan.matrix.rows}
    cells = {(cell.pair, cell.row): cell for cell in plan.cells}
    order = {name: place for place, name in enumerate(sections)}
    found: dict[tuple[str, bool], dict[tuple[str, str], HeatCell]] = {}
    for row in sorted(rows, key=lambda row: order[row.row]):
        section = sections[row.row]
        reference = _reference(plan, cells[row.pair, row.row], section)
        if reference is not None:
            place = ("+".join(section.stages[0].method), "+".join(section.stages[1].method))
            one = found.setdefault((row.pair, reference), {})
            one.setdefault(place, HeatCell(row.row, row.mean))
    kinds = ((pair.name, held) for pair in plan.matrix.pairs for held in (True, False))
    return [_map(*kind, found[kind]) for kind in kinds if len(found.get(kind, ())) > 1]


def _reference(plan: Plan, cell: Cell, section: RowSection) -> bool | None:
    """Whether a plain two-stage row has a reference; None for any other row."""
    if len(section.stages) != 2 or section.epochs is not None:
        return None
    if plan.nodes[cell.stages[1]].reference is None:
        return False
    changed = bool(section.reference) or any(stage.reference for stage in section.stages)
    return None if changed else True


def _map(pair: str, reference: bool, cells: dict[tuple[str, str], HeatCell]) -> HeatMap:
    means = [cell.mean for cell in cells.values() if cell.mean is not None]
    low, high = min(means, default=0.0), max(means, default=0.0)
    shaded = {
        place: HeatCell(cell.row, cell.mean, _shade(cell.mean, low, high))
        for place, cell in cells.items()
    }
    names = list(dict.fromkeys(name for place in cells for name in place))
    firsts = {first for first, _ in cells}
    seconds = {second for _, second in cells}
    return HeatMap(
        pair,
        reference,
        tuple(n for n in names if n in firsts),
        tuple(n for n in names if n in seconds),
        shaded,
    )


def _shade(mean: float | None, low: float, high: float) -> int:
    if mean is None or high <= low:
        return 0
    return min(STEPS - 1, int(STEPS * (mean - low) / (high - low)))
