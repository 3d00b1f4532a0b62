"""Leaderboard rows from a plan and the store: nothing else is read, nothing is typed in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from smskd.cost import ModelCost
from smskd_bench.cost import network_cost
from smskd_bench.matrix import RowSection
from smskd_bench.naming import row_name
from smskd_bench.plan import Cell, Plan
from smskd_bench.report.comparisons import Versus, compare_all, strongest
from smskd_bench.report.exported import ExportedNumbers, exported_numbers
from smskd_bench.report.held import Held, read_held
from smskd_bench.report.missing import Missing, MissingRow
from smskd_bench.stats.comparing import MARGIN
from smskd_bench.stats.sample import Interval, sample
from smskd_bench.store import Record, Store

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
    plan: Plan,
    store: Store,
    margin: float = MARGIN,
    controls: Controls | None = None,
    held: Held | None = None,
) -> list[LeaderboardRow]:
    """All rows, the pairs in the matrix's order, within a pair the best mean first.

    Args:
        plan: The matrix. Every row of it has equal data, recipe and versions, or another key.
        store: Where the results are.
        margin: Points of accuracy that count as practically none.
        controls: What each row is compared with; None takes the matrix's controls.
        held: What the store holds, where it was read already.

    Raises:
        StoreError: a result cannot be read.
    """
    held = held or read_held(plan, store)
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in plan.cells:
        cells.setdefault((cell.pair, cell.row), []).append(cell)
    sections = {row_name(section): section for section in plan.matrix.rows}
    rows: list[LeaderboardRow] = []
    missing = Missing(plan, store, held.begun)
    for pair in plan.matrix.pairs:
        found = [
            _row(plan, held, missing, cells[pair.name, name], section)
            for name, section in sections.items()
            if (pair.name, name) in cells
        ]
        found = compared_rows(found, margin, controls or (lambda row: row.controls))
        rows += sorted(found, key=lambda row: -1.0 if row.mean is None else row.mean, reverse=True)
    return rows


def _row(
    plan: Plan, held: Held, missing: Missing, cells: list[Cell], section: RowSection
) -> LeaderboardRow:
    results = held.results
    done = {c.seed: r for c in cells if (r := results.get(c.stages[-1])) is not None}
    top1 = {seed: float(record["test"]["top1"]) for seed, record in done.items()}
    taught = [key for cell in cells for key in cell.teachers]
    teachers = [float(r["test"]["top1"]) for key in taught if (r := results.get(key)) is not None]
    last = plan.nodes[cells[0].stages[-1]]
    cost = _deployed_cost(done.values()) or network_cost(last.model, last.dataset.name)
    kept = [record["kept"]["kept"] for record in done.values() if record.get("kept")]
    looked = {key for cell in cells for key in cell.stages}
    known = sample(list(top1.values())) if top1 else None
    return LeaderboardRow(
        pair=cells[0].pair,
        row=cells[0].row,
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
        status=_status(held, cells, top1),
        controls=section.controls,
        exported=exported_numbers(
            held.store.root, [c.stages[-1] for c in cells if c.stages[-1] in held.exported]
        ),
        note=section.note,
        interval=known.interval if known else None,
        methods=_methods(plan, cells[0], section),
        test_evaluations=sum(held.looks.get(key, 0) for key in looked),
        missing=missing.of_cells(cells, top1),
    )


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


def _status(held: Held, cells: list[Cell], top1: dict[int, float]) -> str:
    if len(top1) == len(cells):
        return "done"
    reasons: list[str] = []
    for cell in cells:
        for key in cell.everything:
            failed = key in held.begun and key not in held.results
            failure = held.store.failure(key) if failed else None
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
