"""Writes all files of a site into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smskd._version import __version__
from smskd_bench.publishing.addresses import Addresses, read_addresses
from smskd_bench.report.tables import View, render
from smskd_bench.report.text_forms import RENDERERS
from smskd_bench.site.boards import RecordShelf, SiteBoard
from smskd_bench.site.curves import SeedCurve, columns, mean_points, mean_series
from smskd_bench.site.figures import Figures
from smskd_bench.site.heat import STEPS, heat_maps
from smskd_bench.site.inline import script_json
from smskd_bench.site.missing_list import missing_groups
from smskd_bench.site.pages import Pages
from smskd_bench.site.pareto import cost_points, has_energy
from smskd_bench.site.row_data import Source, curves_of, row_data
from smskd_bench.site.table import TableRow, table_data, table_rows, telling_headings

ASSETS = Path(__file__).parent / "assets"
ENDINGS = {"markdown": "md", "csv": "csv", "json": "json", "latex": "tex"}
"""Of the files in ``tables/``."""


@dataclass
class Writer:
    """Writes a site.

    Attributes:
        folder: Where to.
        store: The store's folder, as the user named it.
        boards: What it shows.
    """

    folder: Path
    store: Path
    boards: Sequence[SiteBoard]
    pages: Pages = field(init=False)

    def __post_init__(self) -> None:
        self.pages = Pages(__version__, [(b.plan.matrix.name, b.page) for b in self.boards])

    @property
    def steps(self) -> int:
        """How often :meth:`write` tells that it got further."""
        rows = sum(len(board.board.rows) for board in self.boards)
        return rows + sum(Figures(board.board.rows).steps for board in self.boards)

    def write(self, advance: Callable[[], object]) -> None:
        """Write everything; ``advance`` is called after each row and each picture."""
        for name in ("rows", "tables", "figures", "data", "assets"):
            (self.folder / name).mkdir()
        self._write_assets()
        for board in self.boards:
            self._write_board(board, advance)
        if len(self.boards) > 1:
            self._text("index.html", self.pages.overview(self.boards))

    def _text(self, name: str, text: str) -> None:
        # Paths and names may hold what is no Unicode text.
        (self.folder / name).write_text(text, encoding="utf-8", errors="replace")

    def _write_assets(self) -> None:
        from plotly.offline import get_plotlyjs

        for path in ASSETS.iterdir():
            if path.is_file():
                shutil.copyfile(path, self.folder / "assets" / path.name)
        self._text("assets/plotly.min.js", get_plotlyjs())

    def _write_board(self, board: SiteBoard, advance: Callable[[], object]) -> None:
        rows = table_rows(board.number, board.board.rows)
        published = read_addresses(self.store, board.plan.matrix.name)
        curves = self._write_rows(board, rows, published, advance)
        drawn = {str(i): _brief(curves[i]) for i in range(len(rows)) if curves[i]}
        self._text(f"data/{board.name}.js", f"smskd.receive({script_json(drawn)});\n")
        tables = self._write_tables(board)
        maps = heat_maps(board.plan, board.board.rows)
        figures = Figures(board.board.rows).write(
            self.folder / "figures", board.name, board.plan.matrix.name, curves, maps, advance
        )
        headings = telling_headings(rows)
        context: dict[str, Any] = {
            "site": board,
            "rows": rows,
            "headings": headings,
            "data": {
                **table_data(rows, headings),
                "costs": cost_points(board.board.rows),
                "columns": [h.id for h in headings],
                "numeric": [h.numeric for h in headings],
                "curves": f"data/{board.name}.js",
            },
            "maps": maps,
            "shades": STEPS,
            "files": {(row.row.pair, row.row.row): row.file for row in rows},
            "missing": missing_groups(board.board.missing),
            "energy": has_energy(board.board.rows),
            "tables": tables,
            "published": published,
            "figures": figures,
        }
        self._text(board.page, self.pages.board(context))

    def _write_rows(
        self,
        board: SiteBoard,
        rows: Sequence[TableRow],
        published: Addresses,
        advance: Callable[[], object],
    ) -> list[list[SeedCurve]]:
        """Every row's page; its curves, thinned."""
        shelf, cells = RecordShelf(board.store), board.cells()
        source = Source(board.plan, board.file, self.store, published)
        found = []
        for row in rows:
            own = cells[row.row.pair, row.row.row]
            records = shelf.of_row(own)
            curves = curves_of(board.plan, own, records)
            data = row_data(source, row.row, own, records, curves)
            self._text(row.file, self.pages.row(board, row, data))
            found.append([_light(curve) for curve in curves])
            advance()
        return found

    def _write_tables(self, board: SiteBoard) -> list[str]:
        counted = board.board.test_set
        view = View(notes=(counted.text,) if counted.stage_runs else ())
        names = []
        for form in RENDERERS:
            names.append(f"tables/{board.name}.{ENDINGS[form]}")
            self._text(names[-1], render(board.board.rows, form, view))
        return names


def _light(curve: SeedCurve) -> SeedCurve:
    """What the board's own picture needs of a curve."""
    kept = {name: points for name, points in curve.series.items() if name == "train_top1"}
    return SeedCurve(curve.seed, kept, curve.ends)


def _brief(curves: Sequence[SeedCurve]) -> dict[str, Any]:
    """Means over the seeds of one row."""
    return {
        "train": columns(mean_series(curves, "train_top1")),
        "test": columns(mean_points(curve.ends for curve in curves)),
    }
