"""Leaderboard rows from a plan and the store: nothing else is read, nothing is typed in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from smskd.cost import ModelCost
from smskd.errors import StoreError
from smskd_bench.cost import network_cost
from smskd_bench.matrix import RowSection
from smskd_bench.naming import row_name
from smskd_bench.plan import Cell, Plan
from smskd_bench.report.comparisons import Versus, compare_all, strongest
from smskd_bench.report.evaluation_count import evaluations_of
from smskd_bench.report.exported import ExportedNumbers, exported_numbers
from smskd_bench.report.missing import Missing, MissingRow
from smskd_bench.stats.comparing import MARGIN
from smskd_bench.stats.sample import Interval, sample
from smskd_bench.store import RESULT, RETRAIN, Record, Store

Kind = Literal["student", "single", "joint", "staged", "smskd"]


Controls = Callable[["LeaderboardRow"], tuple[str, ...]]
"""Names of the rows that a row is compared with."""


@dataclass(frozen=True)
class LeaderboardRow:
    """One row: a sequence of methods for one pair, over seeds.

    Attributes:
        kind: "student" is plain training; "single" one method; "joint" several in one stage;
            "staged" a sequence without reference; "smskd" a sequence with reference.
        top1: Last-epoch test accuracy in percent, a seed.
        epochs: Epochs of all stages of a cell.
        kept: Of the test samples the stage before the last had right, percent still right.
        status: "done", "partial", "missing" or why cells failed.
        controls: Names of the rows this one has to beat.
        versus: The comparison with the strongest of them; None until both have results.
        interval: 95 percent interval of the mean, Student's t; None for fewer than two seeds.
        comparisons: With each of the controls that has results.
        methods: Names of all methods and modifiers, and of the matrix's variants of them.
        test_evaluations: How often its stage runs were evaluated on the test set, all seeds.
        missing: Why seeds have no number.
    """

    pair: str
    row: str
    kind: Kind
    seeds: int
    top1: dict[int, float]
    mean: float | None
    std: float | None
    epochs: int
    parameters: int
    macs: int
    teacher_top1: float | None
    kept: float | None
    status: str
    controls: tuple[str, ...] = ()
    versus: Versus | None = None
    exported: list[ExportedNumbers] = field(default_factory=list)
    note: str = ""
    interval: Interval | None = None
    comparisons: tuple[Versus, ...] = ()
    methods: tuple[str, ...] = ()
    test_evaluations: int = 0
    missing: tuple[MissingRow, ...] = ()


def leaderboard_rows(
    plan: Plan, store: Store, margin: float = MARGIN, controls: Controls | None = None
) -> list[LeaderboardRow]:
    """All rows, the pairs in the matrix's order, within a pair the best mean first.

    Args:
        plan: The matrix. Every row of it has equal data, recipe and versions, or another key.
        store: Where the results are.
        margin: Points of accuracy that count as practically none.
        controls: What each row is compared with; None takes the matrix's controls.

    Raises:
        StoreError: a result cannot be read.
    """
    results = {key: store.result(key) for key in plan.nodes}
    rows: list[LeaderboardRow] = []
    missing = Missing(plan, store)
    for pair in plan.matrix.pairs:
        found = [
            _row(plan, store, results, missing, pair.name, section)
            for section in plan.matrix.rows
            if any(c.pair == pair.name and c.row == row_name(section) for c in plan.cells)
        ]
        found = compared_rows(found, margin, controls or (lambda row: row.controls))
        rows += sorted(found, key=lambda row: -1.0 if row.mean is None else row.mean, reverse=True)
    return rows


def _row(
    plan: Plan, store: Store, results: dict[str, Record | None], missing: Missing, pair: str,
    section: RowSection,
) -> LeaderboardRow:  # fmt: skip
    cells = [c for c in plan.cells if c.pair == pair and c.row == row_name(section)]
    done = {c.seed: r for c in cells if (r := results[c.stages[-1]]) is not None}
    accuracies = {c.seed: _top1(store, c.stages[-1], done[c.seed]) for c in cells if c.seed in done}
    top1 = {seed: number for seed, number in accuracies.items() if math.isfinite(number)}
    taught = [key for cell in cells for key in cell.teachers]
    teachers = [_top1(store, key, r) for key in taught if (r := results.get(key)) is not None]
    last = plan.nodes[cells[0].stages[-1]]
    cost = _deployed_cost(done.values()) or network_cost(last.model, last.dataset.name)
    kept = [record["kept"]["kept"] for record in done.values() if record.get("kept")]
    looked = {key: r for c in cells for key in c.stages if (r := results[key]) is not None}
    known = sample(list(top1.values())) if top1 else None
    return LeaderboardRow(
        pair=pair,
        row=row_name(section),
        kind=_kind(plan, cells[0]),
        seeds=len(cells),
        top1=top1,
        mean=known.mean if known else None,
        std=known.std if known else None,
        epochs=sum(plan.nodes[key].training.epochs for key in cells[0].stages),
        parameters=cost.parameters,
        macs=cost.macs,
        teacher_top1=statistics.fmean(teachers) if teachers else None,
        kept=statistics.fmean(kept) if kept else None,
        status=_status(store, cells, top1, accuracies),
        controls=section.controls,
        exported=exported_numbers(store.root, [cell.stages[-1] for cell in cells]),
        note=section.note,
        interval=known.interval if known else None,
        methods=_methods(plan, cells[0], section),
        test_evaluations=sum(map(evaluations_of, looked.values())),
        missing=missing.of_cells(cells, top1),
    )


def _top1(store: Store, key: str, record: Record) -> float:
    """Test accuracy of a finished stage run, in percent; may be NaN."""
    try:
        return float(record["test"]["top1"])
    except (KeyError, TypeError, ValueError):
        path = store.folder(key) / RESULT
        raise StoreError(f"{path} is damaged: it holds no test accuracy", RETRAIN) from None


def _methods(plan: Plan, cell: Cell, section: RowSection) -> tuple[str, ...]:
    """Names of methods and modifiers, registered ones and the matrix's own."""
    specs = [method for key in cell.stages for method in plan.nodes[key].methods]
    names = [
        name for method in specs for name in (method.name, *(m.name for m in method.modifiers))
    ]
    return tuple(
        dict.fromkeys([*names, *(name for stage in section.stages for name in stage.method)])
    )


def _deployed_cost(records: Iterable[Record]) -> ModelCost | None:
    """Cost of what is deployed, where that is more than the student; None where it is not."""
    found = [record["deployed"] for record in records if "deployed" in record]
    return ModelCost(**found[0]) if found else None


def _kind(plan: Plan, cell: Cell) -> Kind:
    specs = [plan.nodes[key] for key in cell.stages]
    if any(spec.reference for spec in specs):
        return "smskd"
    if len(specs) > 1:
        return "staged"
    if len(specs[0].methods) > 1:
        return "joint"
    return "student" if specs[0].methods[0].name == "scratch" else "single"


def _status(
    store: Store, cells: list[Cell], top1: dict[int, float], accuracies: dict[int, float]
) -> str:
    if len(top1) == len(cells):
        return "done"
    odd = [seed for seed in accuracies if seed not in top1]
    reasons = [f"s{seed} failed: its accuracy is {accuracies[seed]}" for seed in odd]
    for cell in cells:
        for key in cell.everything:
            failure = store.failure(key)
            if failure:
                reasons.append(f"s{cell.seed} {failure['status']}: {failure['reason']}")
                break
    if reasons:
        return "; ".join(reasons)
    return f"partial: {len(top1)} of {len(cells)} seeds" if top1 else "missing"


def compared_rows(
    rows: list[LeaderboardRow], margin: float, controls: Controls, only_seed: int | None = None
) -> list[LeaderboardRow]:
    """The rows of one pair with their comparisons, all judged together.

    Args:
        rows: All of the pair's.
        margin: Points of accuracy that count as practically none.
        controls: What each row is compared with.
        only_seed: Compare at this seed only; None compares at all.
    """
    wanted = [(row.row, name) for row in rows for name in controls(row) if name != row.row]
    scores = {
        row.row: {seed: n for seed, n in row.top1.items() if only_seed in (None, seed)}
        for row in rows
    }
    found = compare_all(wanted, scores, margin)
    return [
        replace(
            row, comparisons=tuple(found.get(row.row, ())), versus=strongest(found.get(row.row, ()))
        )
        for row in rows
    ]


def best_cell(plan: Plan, store: Store, pair: str, row: str) -> Cell | None:
    """The cell that is exported for a row: its lowest seed that is done, never the luckiest."""
    cells = [c for c in plan.cells if c.pair == pair and c.row == row]
    done = [c for c in cells if store.is_done(c.stages[-1])]
    return min(done, key=lambda cell: cell.seed) if done else None
