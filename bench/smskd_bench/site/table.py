"""The board's table: what each cell shows, and the numbers that sorting goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smskd_bench.report.columns import (
    SHORT,
    SIGNS,
    control_words,
    human,
    interval_words,
    spread,
    versus_interval_words,
    versus_words,
)
from smskd_bench.report.exported import ExportedNumbers, shown_export
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.report.view import ranks
from smskd_bench.site.inline import visible
from smskd_bench.site.names import row_file
from smskd_bench.site.scales import Bar, difference_bars, interval_bars
from smskd_bench.stats.comparing import WORDS, Verdict

VERDICT_ORDER: dict[Verdict, int] = {"better": 3, "equal": 2, "open": 1, "worse": 0}
"""For sorting: what was shown to be good comes first."""


@dataclass(frozen=True)
class Shown:
    """A cell of the table.

    Attributes:
        text: Its words.
        more: A second line, smaller.
        value: What sorting goes by: a number, or text; None comes last.
    """

    text: str
    more: str = ""
    value: float | str | None = None


@dataclass(frozen=True)
class Heading:
    """A column.

    Attributes:
        id: In addresses.
        name: Above it.
        title: What it is, in a sentence.
        numeric: Whether it holds numbers: they stand right, and the first click sorts falling.
        minor: Whether it is left out where there is little room.
    """

    id: str
    name: str
    title: str
    numeric: bool = True
    minor: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row of the table.

    Attributes:
        row: What it shows.
        file: Its page.
        rank: By mean among those of its pair, from 1.
        best: Whether it has the highest mean of its pair.
        cells: By the id of their column.
        bar: Mean and interval on the pair's scale.
        versus_bar: Difference and its interval, on the pair's scale.
    """

    row: LeaderboardRow
    file: str
    rank: int
    best: bool
    cells: Mapping[str, Shown] = field(default_factory=dict)
    bar: Bar | None = None
    versus_bar: Bar | None = None

    @property
    def verdict(self) -> str:
        """Name of the verdict, for its colour."""
        return self.row.versus.verdict if self.row.versus else "none"


HEADINGS = (
    Heading("rank", "#", "Place by mean accuracy within its pair"),
    Heading("row", "row", "Sequence of methods, and its kind", numeric=False),
    Heading("pair", "pair", "Teacher and student; accuracy of the teacher", False, minor=True),
    Heading("top1", "top-1 %", "Test accuracy after the last epoch: mean and standard deviation "
            "over seeds; below it the 95 % interval of the mean"),
    Heading("n", "n", "Seeds with a result", minor=True),
    Heading("control", "to beat", "The strongest of the row's controls", False, minor=True),
    Heading("difference", "difference", "Points more than the control, paired by seed; below it "
            "its 95 % interval"),
    Heading("verdict", "verdict", "Corrected for all comparisons of the pair's table", False,
            minor=True),
    Heading("kept", "kept %", "Of the test images the stage before had right, percent still right",
            minor=True),
    Heading("epochs", "epochs", "Epochs of all stages", minor=True),
    Heading("params", "params", "Parameters of the student", minor=True),
    Heading("macs", "MACs", "Multiply-accumulates of one image", minor=True),
    Heading("ms", "ms", "Latency of one image on the target in fp32: median; below it upper "
            "bounds of the 90th and 99th percentile", minor=True),
    Heading("mb", "MB", "Size of the exported fp32 graph, in 10^6 bytes", minor=True),
    Heading("target", "target", "Where it was measured", False, minor=True),
    Heading("status", "status", "Whether all of its seeds are done", False, minor=True),
)  # fmt: skip

QUIET = {"status": "done"}
"""What says nothing in a column; elsewhere it is a hyphen."""


def table_rows(board: int, rows: Sequence[LeaderboardRow]) -> list[TableRow]:
    """The rows of a board in their order, pairs together."""
    places = ranks(rows)
    bars, versus_bars = interval_bars(rows), difference_bars(rows)
    found = []
    for index, row in enumerate(rows):
        rank = places[row.pair, row.row]
        cells = {heading.id: _CELLS[heading.id](row) for heading in HEADINGS[1:]}
        cells["rank"] = Shown(str(rank), value=rank)
        best = rank == 1 and row.mean is not None
        file = row_file(board, row.pair, row.row)
        found.append(TableRow(row, file, rank, best, cells, bars[index], versus_bars[index]))
    return found


def telling_headings(rows: Sequence[TableRow]) -> list[Heading]:
    """The columns that say something in this table."""
    always = ("rank", "row", "top1", "n")
    several = len({row.row.pair for row in rows}) > 1

    def tells(heading: Heading) -> bool:
        if heading.id == "pair":
            return several
        quiet = QUIET.get(heading.id, "-")
        return heading.id in always or any(r.cells[heading.id].text != quiet for r in rows)

    return [heading for heading in HEADINGS if tells(heading)]


def table_data(rows: Sequence[TableRow], headings: Sequence[Heading]) -> dict[str, Any]:
    """What a script sorts and filters by, and draws: rows in the order of the page."""
    pairs = list(dict.fromkeys(row.row.pair for row in rows))
    places = {pair: index for index, pair in enumerate(pairs)}
    entries = [
        {
            "pair": places[row.row.pair],
            "name": visible(row.row.row),
            "file": row.file,
            "methods": [visible(name) for name in row.row.methods],
            "text": _search_text(row),
            "verdict": row.verdict,
            "top1": row.row.mean,
            "params": row.row.parameters,
            "macs": row.row.macs,
            "sort": [row.cells[heading.id].value for heading in headings],
        }
        for row in rows
    ]
    return {"pairs": [visible(pair) for pair in pairs], "rows": entries}


def _search_text(row: TableRow) -> str:
    words = (row.row.pair, row.row.row, row.row.kind, *row.row.methods, row.row.note)
    shown = (row.cells["verdict"].text, row.cells["status"].text, row.cells["target"].text)
    return visible(" ".join((*words, *shown))).lower()


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _latency(export: ExportedNumbers | None) -> Shown:
    if export is None or export.p50_ms is None:
        return Shown("-")
    more = f"{_ms(export.p90_ms)} / {_ms(export.p99_ms)}"
    return Shown(_ms(export.p50_ms), more, export.p50_ms)


def _verdict(row: LeaderboardRow) -> Shown:
    versus = row.versus
    if versus is None:
        return Shown("-")
    return Shown(WORDS[versus.verdict], versus.why, VERDICT_ORDER[versus.verdict])


def short_verdict(row: TableRow) -> tuple[str, str, str]:
    """Sign, words, and shorter words of a verdict."""
    versus = row.row.versus
    if versus is None:
        return "", "-", "-"
    return SIGNS[versus.verdict], WORDS[versus.verdict], SHORT[versus.verdict]


def _counted(row: LeaderboardRow) -> Shown:
    done = len(row.top1)
    text = str(done) if done == row.seeds else f"{done} of {row.seeds}"
    return Shown(text, value=done)


def _size(row: LeaderboardRow) -> Shown:
    export = shown_export(row.exported)
    return Shown("-") if export is None else Shown(f"{export.size_mb:.2f}", value=export.size_mb)


def _target(row: LeaderboardRow) -> Shown:
    export = shown_export(row.exported)
    return Shown("-") if export is None else Shown(export.target, value=export.target)


def _teacher(row: LeaderboardRow) -> str:
    if row.teacher_top1 is None:
        return "teacher not trained yet"
    return f"teacher {row.teacher_top1:.2f} %"


def _interval(row: LeaderboardRow) -> str:
    return "" if row.interval is None else interval_words(row)


def _difference(row: LeaderboardRow) -> Shown:
    if row.versus is None:
        return Shown("-")
    words = versus_interval_words(row)
    return Shown(versus_words(row), "" if words == "-" else words, row.versus.difference)


def _kept(row: LeaderboardRow) -> Shown:
    return Shown("-") if row.kept is None else Shown(f"{row.kept:.1f}", value=row.kept)


_CELLS: dict[str, Callable[[LeaderboardRow], Shown]] = {
    "row": lambda row: Shown(row.row, row.kind, row.row.lower()),
    "pair": lambda row: Shown(row.pair, _teacher(row), row.pair.lower()),
    "top1": lambda row: Shown(spread(row.mean, row.std), _interval(row), row.mean),
    "n": _counted,
    "control": lambda row: Shown(control_words(row), value=control_words(row).lower()),
    "difference": _difference,
    "verdict": _verdict,
    "kept": _kept,
    "epochs": lambda row: Shown(str(row.epochs), value=row.epochs),
    "params": lambda row: Shown(human(row.parameters), value=row.parameters),
    "macs": lambda row: Shown(human(row.macs), value=row.macs),
    "ms": lambda row: _latency(shown_export(row.exported)),
    "mb": _size,
    "target": _target,
    "status": lambda row: Shown(row.status, value=row.status),
}
"""What each column shows of a row; the rank is known to the table only."""
