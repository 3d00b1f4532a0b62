"""Leaderboard rows as a terminal table, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from smskd_bench.report.exported import ExportedNumbers
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.terminal import Terminal

PM = "\u00b1"
FORMATS = ("table", "markdown", "csv", "json")

Column = tuple[str, str, Callable[[LeaderboardRow], str]]


def _spread(mean: float | None, std: float | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    return f"{mean:{sign}.2f}" + (f" {PM} {std:.2f}" if std is not None else "")


def _versus(row: LeaderboardRow) -> str:
    if row.versus is None:
        return "-"
    fewer = f" (n {row.versus.n})" if row.versus.n < len(row.top1) else ""
    return _spread(row.versus.difference, row.versus.std, "+") + fewer


def _control(row: LeaderboardRow) -> str:
    return row.versus.control if row.versus else ", ".join(row.controls) or "-"


def _kept(row: LeaderboardRow) -> str:
    return "-" if row.kept is None else f"{row.kept:.1f}"


def _status(row: LeaderboardRow) -> str:
    return row.status


def _shown(row: LeaderboardRow) -> ExportedNumbers | None:
    """The export a table shows, all of its columns from the same one.

    One image at a time in fp32, as the accuracy beside it is fp32's; the newest that was timed.
    """
    plain = [e for e in row.exported if e.precision == "fp32" and not e.cuda_graph]
    first = [e for e in plain if e.batch == min(other.batch for other in plain)]
    timed = [export for export in first if export.p50_ms is not None]
    return max(timed or first, key=lambda export: export.measured_utc, default=None)


def _latency(row: LeaderboardRow) -> str:
    shown = _shown(row)
    if shown is None or shown.p50_ms is None:
        return "-"
    times = (shown.p50_ms, shown.p90_ms, shown.p99_ms)
    return " / ".join("-" if ms is None else f"{ms:.3f}" for ms in times)


def _size(row: LeaderboardRow) -> str:
    shown = _shown(row)
    return f"{shown.size_mb:.2f}" if shown else "-"


def _target(row: LeaderboardRow) -> str:
    shown = _shown(row)
    return shown.target if shown else "-"


COLUMNS: tuple[Column, ...] = (
    ("row", "left", lambda row: row.row),
    ("kind", "left", lambda row: row.kind),
    ("top-1 %", "right", lambda row: _spread(row.mean, row.std)),
    ("n", "right", lambda row: str(len(row.top1))),
    ("epochs", "right", lambda row: str(row.epochs)),
    ("to beat", "left", _control),
    ("difference", "right", _versus),
    ("kept %", "right", _kept),
    ("params", "right", lambda row: human(row.parameters)),
    ("MACs", "right", lambda row: human(row.macs)),
    ("ms p50/p90*/p99*", "right", _latency),
    ("MB", "right", _size),
    ("target", "left", _target),
    ("status", "left", _status),
)


def human(number: float) -> str:
    """A count with a unit prefix: 83892 as 83.9k."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:  # else 999999 would be 1e+03k
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def heading(pair: str, rows: list[LeaderboardRow]) -> str:
    """Title of one pair's table, with the teacher's accuracy."""
    teacher = rows[0].teacher_top1
    accuracy = "not trained yet" if teacher is None else f"{teacher:.2f} %"
    return f"{pair} (teacher {accuracy})"


FOOTNOTE = (
    "top-1: test accuracy after the last epoch, mean \u00b1 standard deviation over n seeds. "
    "difference: points against the strongest of the row's controls, paired by seed. "
    "kept: of the test images the stage before had right, percent still right. "
    "ms: one image at a time, exported in fp32, on the target; * is an upper bound that holds in "
    "99 of 100 repetitions. Every precision and device: `leaderboard --devices`."
)


def render(rows: list[LeaderboardRow], form: str) -> str:
    """The rows as Markdown, CSV or JSON text."""
    return {"markdown": _markdown, "csv": _csv, "json": _json}[form](rows)


def terminal_table(rows: list[LeaderboardRow], width: int) -> RenderableType:
    """The rows for a terminal of ``width`` characters, one table a pair.

    Columns that say nothing are left out, and the least important ones where it is narrow; names
    are folded, never cut. Reasons of failures stand below, where there is room.
    """
    parts: list[RenderableType] = []
    for pair, found in _by_pair(rows):
        columns = [_brief_status(column) for column in _telling(found)]
        fitting = _fitting(columns, found, width)
        parts.append(_pair_table(pair, found, fitting))
        parts += [Text(f"{row.row}: {_line(row.status)}") for row in found if ": " in row.status]
        if left_out := [name for name, _, _ in columns if name not in {c[0] for c in fitting}]:
            text = (
                f"left out here: {', '.join(left_out)}; wider terminals and other formats have it"
            )
            parts.append(Text(text, style="dim"))
    return Group(*parts, Text(FOOTNOTE, style="dim"))


def _pair_table(pair: str, rows: list[LeaderboardRow], columns: list[Column]) -> Table:
    table = Table(title=Text(heading(pair, rows)), title_justify="left", header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    for name, side, _ in columns:
        number = side == "right"
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for rank, row in enumerate(rows, start=1):
        style = "bold green" if rank == 1 else "dim" if row.mean is None else ""
        # As Text: brackets in a name or a reason are no markup.
        table.add_row(str(rank), *(Text(cell(row)) for _, _, cell in columns), style=style)
    return table


LEAST_TELLING = (
    "target",
    "MACs",
    "params",
    "epochs",
    "kind",
    "MB",
    "kept %",
    "ms p50/p90*/p99*",
    "status",
)
"""Left out in this order where the terminal is narrow."""

FOLDED = 16
"""Characters that a folded name may be expected to make do with."""


def _fitting(columns: list[Column], rows: list[LeaderboardRow], width: int) -> list[Column]:
    """The columns that fit into ``width`` characters."""
    kept = list(columns)
    for name in LEAST_TELLING:
        if _least_width(kept, rows) <= width:
            break
        kept = [column for column in kept if column[0] != name]
    return kept


def _least_width(columns: list[Column], rows: list[LeaderboardRow]) -> int:
    total = len(str(len(rows))) + 4  # the rank, and the frame
    for name, side, cell in columns:
        longest = max(len(name), *(len(cell(row)) for row in rows))
        total += 3 + (longest if side == "right" else min(longest, FOLDED))
    return total


def _brief_status(column: Column) -> Column:
    name, side, _ = column
    return (name, side, lambda row: row.status.split(": ")[0]) if name == "status" else column


def print_table(rows: list[LeaderboardRow], console: Console) -> None:
    """Print the terminal form; a console that is no terminal gets wide lines."""
    if not console.is_terminal:
        console = Terminal(file=console.file, width=220)
    console.print(terminal_table(rows, console.width))


def _telling(rows: list[LeaderboardRow]) -> list[Column]:
    always = {"row", "kind", "top-1 %", "n"}

    def tells(column: Column) -> bool:
        name, _, cell = column
        quiet = "done" if name == "status" else "-"
        return name in always or any(cell(row) != quiet for row in rows)

    return [column for column in COLUMNS if tells(column)]


def _by_pair(rows: list[LeaderboardRow]) -> Iterable[tuple[str, list[LeaderboardRow]]]:
    for pair, found in groupby(rows, key=lambda row: row.pair):
        yield pair, list(found)


def _markdown(rows: list[LeaderboardRow]) -> str:
    lines: list[str] = []
    for pair, found in _by_pair(rows):
        columns = _telling(found)
        lines += [f"**{heading(pair, found)}**", ""]
        lines.append("| # | " + " | ".join(name for name, _, _ in columns) + " |")
        sides = " | ".join("---:" if side == "right" else "---" for _, side, _ in columns)
        lines.append(f"| ---: | {sides} |")
        for rank, row in enumerate(found, start=1):
            cells = " | ".join(_markdown_cell(cell(row)) for _, _, cell in columns)
            lines.append(f"| {rank} | {cells} |")
        lines.append("")
    return "\n".join([*lines, FOOTNOTE, ""])


def _markdown_cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def _csv(rows: list[LeaderboardRow]) -> str:
    out = io.StringIO()
    names = [
        "pair", "row", "kind", "n", "seeds", "mean", "std", "epochs", "parameters", "macs",
        "teacher_top1", "kept", "control", "difference", "difference_std", "target",
        "exported_top1", "p50_ms", "p90_ms", "p99_ms", "size_mb", "status", "note",
    ]  # fmt: skip
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        versus, export = row.versus, _shown(row)
        writer.writerow([
            row.pair, row.row, row.kind, len(row.top1), row.seeds, row.mean, row.std, row.epochs,
            row.parameters, row.macs, row.teacher_top1, row.kept,
            *((versus.control, versus.difference, versus.std) if versus else ("", "", "")),
            *(
                (export.target, export.top1, export.p50_ms, export.p90_ms, export.p99_ms,
                 export.size_mb) if export else ("",) * 6
            ),
            row.status, row.note,
        ])  # fmt: skip
    return out.getvalue()


def _json(rows: list[LeaderboardRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"
