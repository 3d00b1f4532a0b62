"""Leaderboard rows from a plan and the store: nothing else is read, nothing is typed in."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from smskd.cost import ModelCost
from smskd_bench.collector import collector_paused
from smskd_bench.cost import network_cost
from smskd_bench.matrix import RowSection
from smskd_bench.naming import row_name
from smskd_bench.plan import Cell, Plan
from smskd_bench.report.exported import ExportedNumbers, exported_keys, exported_numbers
from smskd_bench.store import Record, Store

Kind = Literal["student", "single", "joint", "staged", "smskd"]

READ = ("test", "kept", "deployed")
"""Entries of a result that rows are made of."""


@dataclass(frozen=True)
class Versus:
    """A row against the control it has to beat, paired by seed.

    Attributes:
        control: Name of the strongest of the row's controls.
        difference: Mean difference of test top-1 in points, ours minus the control's.
        std: Its standard deviation over seeds; None for one seed.
        n: Seeds that both have.
    """

    control: str
    difference: float
    std: float | None
    n: int


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


def leaderboard_rows(plan: Plan, store: Store) -> list[LeaderboardRow]:
    """All rows, the pairs in the matrix's order, within a pair the best mean first."""
    held = _held(plan, store)
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in plan.cells:
        cells.setdefault((cell.pair, cell.row), []).append(cell)
    sections = {row_name(section): section for section in plan.matrix.rows}
    rows: list[LeaderboardRow] = []
    for pair in plan.matrix.pairs:
        found = [
            _row(plan, held, cells[pair.name, name], section)
            for name, section in sections.items()
            if (pair.name, name) in cells
        ]
        found = [_with_control(row, sections[row.row], found) for row in found]
        rows += sorted(found, key=lambda row: -1.0 if row.mean is None else row.mean, reverse=True)
    return rows


@dataclass(frozen=True)
class _Held:
    """What a store holds of a plan.

    Attributes:
        store: It.
        results: Of the stage runs that are done, without their histories.
        begun: Keys that have a folder.
        exported: Keys of which something was exported.
    """

    store: Store
    results: dict[str, Record]
    begun: set[str]
    exported: set[str]


def _held(plan: Plan, store: Store) -> _Held:
    begun = store.folders()
    found = ((key, store.result(key)) for key in plan.nodes if key in begun)
    # Histories are most of a result, and many of them need more memory than there is.
    with collector_paused():
        results = {
            key: {entry: record[entry] for entry in READ if entry in record}
            for key, record in found
            if record is not None
        }
    return _Held(store, results, begun, exported_keys(store.root))


def _row(plan: Plan, held: _Held, cells: list[Cell], section: RowSection) -> LeaderboardRow:
    results = held.results
    done = {c.seed: r for c in cells if (r := results.get(c.stages[-1])) is not None}
    top1 = {seed: float(record["test"]["top1"]) for seed, record in done.items()}
    taught = [key for cell in cells for key in cell.teachers]
    teachers = [r["test"]["top1"] for key in taught if (r := results.get(key)) is not None]
    last = plan.nodes[cells[0].stages[-1]]
    cost = _deployed_cost(done.values()) or network_cost(last.model, last.dataset.name)
    kept = [record["kept"]["kept"] for record in done.values() if record["kept"]]
    return LeaderboardRow(
        pair=cells[0].pair,
        row=cells[0].row,
        kind=_kind(plan, cells[0]),
        seeds=len(cells),
        top1=top1,
        mean=statistics.fmean(top1.values()) if top1 else None,
        std=statistics.stdev(top1.values()) if len(top1) > 1 else None,
        epochs=sum(plan.nodes[key].training.epochs for key in cells[0].stages),
        parameters=cost.parameters,
        macs=cost.macs,
        teacher_top1=statistics.fmean(teachers) if teachers else None,
        kept=statistics.fmean(kept) if kept else None,
        status=_status(held, cells, top1),
        exported=exported_numbers(
            held.store.root, [c.stages[-1] for c in cells if c.stages[-1] in held.exported]
        ),
        note=section.note,
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


def _status(held: _Held, cells: list[Cell], top1: dict[int, float]) -> str:
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


def _with_control(
    row: LeaderboardRow, section: RowSection, found: list[LeaderboardRow]
) -> LeaderboardRow:
    names = section.controls
    compared = [v for other in found if other.row in names and (v := _compare(row, other))]
    if not compared:
        return replace(row, controls=names)
    # The strongest control, as beating a weak one is no news: among those that share most seeds
    # with the row, so that a control with one lucky seed cannot hide the others.
    most = max(versus.n for versus in compared)
    strongest = min((v for v in compared if v.n == most), key=lambda v: v.difference)
    return replace(row, controls=names, versus=strongest)


def _compare(row: LeaderboardRow, other: LeaderboardRow) -> Versus | None:
    shared = sorted(row.top1.keys() & other.top1.keys())
    if not shared:
        return None
    differences = [row.top1[seed] - other.top1[seed] for seed in shared]
    std = statistics.stdev(differences) if len(differences) > 1 else None
    return Versus(other.row, statistics.fmean(differences), std, len(shared))


def best_cell(plan: Plan, store: Store, pair: str, row: str) -> Cell | None:
    """The cell that is exported for a row: its lowest seed that is done, never the luckiest."""
    cells = [c for c in plan.cells if c.pair == pair and c.row == row]
    done = [c for c in cells if store.is_done(c.stages[-1])]
    return min(done, key=lambda cell: cell.seed) if done else None
