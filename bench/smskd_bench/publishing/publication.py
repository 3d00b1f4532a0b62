"""Everything that a board sends to W&B, computed from the store before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smskd_bench.plan import Cell, Plan
from smskd_bench.publishing.curves import History, curve_table
from smskd_bench.publishing.documents import Cell as TableCell
from smskd_bench.publishing.documents import RunDocument, TableDocument, known
from smskd_bench.publishing.lineage import Lineage
from smskd_bench.publishing.names import TAG_CHARS, shortened, stable_id
from smskd_bench.publishing.report_text import ReportText, report_text
from smskd_bench.publishing.summary_fields import Trained, row_summary
from smskd_bench.report.exported import shown_export
from smskd_bench.report.leaderboard import Leaderboard
from smskd_bench.report.picture import Point, points
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.report.view import Placed, ordered
from smskd_bench.store import Store

TABLE_COLUMNS = (
    "rank", "pair", "row", "kind", "accuracy", "std", "low", "high", "n", "control", "difference",
    "difference low", "difference high", "verdict", "kept", "parameters", "MACs", "epochs",
    "train seconds", "target", "p50 ms", "p90 ms", "p99 ms", "size MB", "status", "note",
)  # fmt: skip

_COSTS = ("parameters", "macs", "epochs", "train_seconds")

PICTURE, TABLE, CURVES = "pareto", "leaderboard", "curves"


@dataclass(frozen=True)
class Publication:
    """What one command sends.

    Attributes:
        board: Id of the matrix in W&B, in the configuration of all its rows.
        nodes: Stage runs, exports and measurements.
        rows: One run a row of the leaderboard.
        table: The run of the whole matrix.
        report: What the report is made of.
    """

    board: str
    nodes: tuple[RunDocument, ...]
    rows: tuple[RunDocument, ...]
    table: RunDocument
    report: ReportText

    @property
    def runs(self) -> tuple[RunDocument, ...]:
        """All runs, in the order in which they are sent."""
        return (*self.nodes, *self.rows, self.table)


@dataclass
class _Row:
    """What the store holds of one row beyond the leaderboard."""

    trained: list[Trained] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)


def make_publication(
    plan: Plan, store: Store, board: Leaderboard, picture: Path | None, weights: bool = False
) -> Publication:
    """Read the store and write out everything that is to be sent.

    Args:
        plan: The matrix.
        store: Where its results are.
        board: Its leaderboard.
        picture: The picture of accuracy against latency, if one was drawn.
        weights: Whether weights and bundles go along.

    Raises:
        StoreError: a record cannot be read.
    """
    group = shortened(plan.matrix.name)
    found = _read(plan, store)
    lineage = Lineage(plan, store, weights)
    placed = ordered(board.rows, board.rows)
    ids = stable_id("board", plan.matrix.name)
    rows = tuple(_row_run(p, board, found[_place(p.row)], lineage, ids, group) for p in placed)
    summaries = {_place(p.row): run.summary for p, run in zip(placed, rows, strict=True)}
    curves = curve_table({place: row.histories for place, row in found.items()})
    return Publication(
        board=ids,
        nodes=tuple(lineage.runs()),
        rows=rows,
        table=_board_run(board, placed, summaries, curves, picture, ids, group),
        report=report_text(board, placed, ids, group, curves is not None, picture is not None),
    )


def _place(row: LeaderboardRow) -> tuple[str, str]:
    return row.pair, row.row


def _read(plan: Plan, store: Store) -> dict[tuple[str, str], _Row]:
    """Training times and histories of all rows; a cell counts if all of its own stages do."""
    rows: dict[tuple[str, str], _Row] = {}
    for cell in plan.cells:
        row = rows.setdefault((cell.pair, cell.row), _Row())
        if store.is_done(cell.stages[-1]):
            _read_cell(store, cell, row)
    return rows


def _read_cell(store: Store, cell: Cell, row: _Row) -> None:
    results = [store.result(key) for key in cell.stages]
    last = results[-1]
    if last is None:
        return
    seconds = [r.get("train_seconds") for r in results if r is not None]
    complete = len(seconds) == len(cell.stages) and None not in seconds
    folded = [r.get("fast_paths", {}).get("folded", 1) for r in results if r is not None]
    row.trained.append(
        Trained(
            cell,
            float(last["test"]["top1"]),
            sum(s for s in seconds if s is not None) if complete else None,
            any(f > 1 for n in folded for f in (n if isinstance(n, list) else [n])),
        )
    )
    if None not in results:
        row.histories.append([r.get("history", ()) for r in results if r is not None])


def _row_run(
    placed: Placed, board: Leaderboard, found: _Row, lineage: Lineage, board_id: str, group: str
) -> RunDocument:
    row = placed.row
    last = tuple(t.cell.stages[-1] for t in sorted(found.trained, key=lambda t: t.cell.seed))
    return RunDocument(
        id=stable_id("row", board.matrix, row.pair, row.row),
        name=shortened(f"{row.row} ({row.pair})"),
        job_type="leaderboard",
        group=group,
        tags=tuple(
            dict.fromkeys(shortened(name, TAG_CHARS) for name in (row.pair, row.kind, *row.methods))
        ),
        config={
            "board": board_id, "matrix": board.matrix, "pair": row.pair, "row": row.row,
            "kind": row.kind, "methods": list(row.methods), "controls": list(row.controls),
        },
        summary=row_summary(row, placed.rank, board.basis, found.trained),
        notes=row.note,
        uses=(*map(lineage.stage, last), *lineage.measurements(last)),
    )  # fmt: skip


def _board_run(
    board: Leaderboard,
    placed: list[Placed],
    summaries: Mapping[tuple[str, str], Mapping[str, object]],
    curves: TableDocument | None,
    picture: Path | None,
    board_id: str,
    group: str,
) -> RunDocument:
    table = TableDocument(
        TABLE_COLUMNS, tuple(_table_row(p, summaries[_place(p.row)]) for p in placed)
    )
    basis = {f"basis/{name}": value for name, value in asdict(board.basis).items()}
    counted = asdict(board.test_set)
    return RunDocument(
        id=board_id,
        name=shortened(f"leaderboard of {board.matrix}"),
        job_type="board",
        group=group,
        tags=("leaderboard",),
        config={"table_of": board_id, "matrix": board.matrix, "margin": board.margin, **basis},
        summary={
            "rows": sum(p.row.mean is not None for p in placed),
            "rows_without_results": sum(p.row.mean is None for p in placed),
            **{f"test_set/{name}": value for name, value in counted.items()},
        },
        tables={TABLE: table, **({CURVES: curves} if curves else {})},
        images={PICTURE: str(picture)} if picture else {},
        drawn=[asdict(point) for point in _drawn(placed)] if picture else (),
    )


def _drawn(placed: list[Placed]) -> list[Point]:
    return points(p.row for p in placed)


def _table_row(placed: Placed, summary: Mapping[str, object]) -> tuple[TableCell, ...]:
    """Cells of one row; what was not measured is empty, never 0."""
    row, shown = placed.row, shown_export(placed.row.exported)
    cells = [
        summary.get("rank"), row.pair, row.row, row.kind,
        *(summary.get(f"accuracy/{name}") for name in ("mean", "std", "low", "high", "n")),
        summary.get("control"),
        *(summary.get(f"difference/{name}") for name in ("mean", "low", "high")),
        summary.get("verdict"), summary.get("accuracy/kept"),
        *(summary.get(f"cost/{name}") for name in _COSTS),
        *((shown.target, shown.p50_ms, shown.p90_ms, shown.p99_ms, shown.size_mb)
          if shown else (None,) * 5),
        row.status, row.note or None,
    ]  # fmt: skip
    return tuple(known(cell) for cell in cells)
