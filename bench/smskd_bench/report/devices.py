"""The table of students on devices: accuracy and latency in the same row, doubts below in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from smskd_export.judging import Judged, JudgedRow

from smskd_bench.report.exported import ExportedNumbers

if TYPE_CHECKING:  # rows need torch, a measurement does not
    from smskd_bench.report.rows import LeaderboardRow

DeviceColumn = tuple[str, Callable[[JudgedRow], str]]

FOOTNOTE = (
    "top-1: on the device, whole test set. change: points against PyTorch on the same images, with "
    "95 % interval and exact McNemar p. p50: median of one inference, host to host, in ms; * is an "
    "upper bound that holds in 99 of 100 repetitions. MB: size of the ONNX file."
)
NOT_MEASURED = "not measured"


def _precision(row: JudgedRow) -> str:
    return f"{row.precision} b{row.batch}" + (" graph" if row.cuda_graph else "")


def _top1(row: JudgedRow) -> str:
    return "-" if row.top1 is None else f"{row.top1:.2f}"


def _change(row: JudgedRow) -> str:
    change = row.change
    if change is None:
        return "-"
    return f"{change.difference:+.2f} [{change.low:+.2f}, {change.high:+.2f}] p {change.p:.2g}"


def milliseconds(ns: float | None) -> str:
    """Nanoseconds as text in milliseconds."""
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def _status(row: JudgedRow) -> str:
    if row.status == "ok":
        return ", ".join(flag.code for flag in row.flags) or "-"
    return row.status.replace("_", " ")


COLUMNS: tuple[DeviceColumn, ...] = (
    ("precision", _precision),
    ("top-1 %", _top1),
    ("change", _change),
    ("p50", lambda row: milliseconds(row.host.p50_ns if row.host else None)),
    ("p90*", lambda row: milliseconds(row.host.p90_bound_ns if row.host else None)),
    ("p99*", lambda row: milliseconds(row.host.p99_bound_ns if row.host else None)),
    ("GPU p50", lambda row: milliseconds(row.gpu.p50_ns if row.gpu else None)),
    ("samples/s", lambda row: "-" if row.samples_per_s is None else f"{row.samples_per_s:,.0f}"),
    ("mJ", lambda row: "-" if row.gross_mj is None else f"{row.gross_mj:.3g}"),
    ("MB", lambda row: f"{row.size_mb:.2f}"),
    ("flags", _status),
)
OPTIONAL = {"GPU p50", "mJ"}
"""Left out where no row has them."""


def title(judged: Judged) -> str:
    """What was measured where."""
    threads = f"{judged.threads} thread" + ("" if judged.threads == 1 else "s")
    return (
        f"{judged.name} on {_place(judged)}, target {judged.target}: "
        f"{judged.runtime}, {threads}, protocol {judged.protocol}"
    )


def table(judged: Judged) -> RenderableType:
    """The measurement for a terminal."""
    columns = _telling(judged.rows)
    drawn = Table(title=Text(title(judged)), title_justify="left", header_style="bold")
    for name, _ in columns:
        words = name in {"precision", "flags"}
        drawn.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in judged.rows:
        style = "" if row.status == "ok" else "red"
        drawn.add_row(*(Text(cell(row)) for _, cell in columns), style=style)
    notes = [Text(line) for line in [*_failures(judged.rows), *flag_lines(judged.rows)]]
    return Group(drawn, *notes, Text(FOOTNOTE, style="dim"))


def markdown(measurements: Sequence[Judged]) -> str:
    """Measurements as Markdown, one table each."""
    lines: list[str] = []
    for judged in measurements:
        columns = _telling(judged.rows)
        lines += [f"**{title(judged)}**", ""]
        lines.append("| " + " | ".join(name for name, _ in columns) + " |")
        lines.append("|" + " --- |" + " ---: |" * (len(columns) - 2) + " --- |")
        lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in judged.rows]
        lines += ["", *(f"- {line}" for line in flag_lines(judged.rows)), ""]
    return "\n".join([*lines, FOOTNOTE, ""])


def flag_lines(rows: Iterable[JudgedRow]) -> list[str]:
    """Every doubt once for all rows that have it, with its remedy."""
    seen: dict[str, tuple[str, str, list[str]]] = {}
    for row in rows:
        for flag in row.flags:
            message, remedy, where = seen.setdefault(flag.code, (flag.message, flag.remedy, []))
            where.append(_precision(row))
    total = sum(1 for row in rows if row.status == "ok")
    lines = []
    for code, (message, remedy, where) in seen.items():
        place = "all rows" if len(where) == total and total > 1 else ", ".join(where)
        several = len({f.message for r in rows for f in r.flags if f.code == code}) > 1
        lines.append(
            f"{code} ({place}): {message}{' (the first of them)' if several else ''}; {remedy}"
        )
    return lines


def _failures(rows: Iterable[JudgedRow]) -> list[str]:
    return [f"{_precision(row)}: {row.reason}" for row in rows if row.status != "ok"]


def _telling(rows: Sequence[JudgedRow]) -> list[DeviceColumn]:
    return [
        column
        for column in COLUMNS
        if column[0] not in OPTIONAL or any(column[1](row) != "-" for row in rows)
    ]


BoardColumn = tuple[str, Callable[[ExportedNumbers], str]]

BOARD: tuple[BoardColumn, ...] = (
    ("target", lambda e: e.target),
    ("device", lambda e: e.device or NOT_MEASURED),
    ("precision", lambda e: e.label),
    ("top-1 %", lambda e: "-" if e.top1 is None else f"{e.top1:.2f}"),
    ("change", lambda e: _board_change(e)),
    ("p50", lambda e: _ms(e.p50_ms)),
    ("p90*", lambda e: _ms(e.p90_ms)),
    ("p99*", lambda e: _ms(e.p99_ms)),
    ("samples/s", lambda e: "-" if e.samples_per_s is None else f"{e.samples_per_s:,.0f}"),
    ("mJ", lambda e: "-" if e.gross_mj is None else f"{e.gross_mj:.3g}"),
    ("MB", lambda e: f"{e.size_mb:.2f}"),
    ("status", lambda e: e.status.replace("_", " ")),
)


def _place(judged: Judged) -> str:
    """The device and what it is; this machine is called by what it is already."""
    known = not judged.board or judged.board in judged.device
    return judged.device if known else f"{judged.device} ({judged.board})"


def board_table(rows: Iterable[LeaderboardRow]) -> RenderableType:
    """All exports of a leaderboard for a terminal."""
    drawn = Table(header_style="bold")
    for name in ("pair", "row", *(name for name, _ in BOARD)):
        drawn.add_column(name, overflow="fold")
    for row, export in _exports(rows):
        cells = [row.pair, row.row, *(cell(export) for _, cell in BOARD)]
        drawn.add_row(*(Text(cell) for cell in cells))
    return Group(drawn, Text(FOOTNOTE, style="dim"))


def board_markdown(rows: Iterable[LeaderboardRow]) -> str:
    """All exports of a leaderboard as Markdown."""
    names = ["pair", "row", *(name for name, _ in BOARD)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row, export in _exports(rows):
        cells = [row.pair, row.row, *(cell(export) for _, cell in BOARD)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", FOOTNOTE, ""])


def _exports(rows: Iterable[LeaderboardRow]) -> Iterable[tuple[LeaderboardRow, ExportedNumbers]]:
    return [(row, export) for row in rows for export in row.exported]


def _board_change(export: ExportedNumbers) -> str:
    if export.change is None:
        return "-"
    return f"{export.change:+.2f} [{export.change_low:+.2f}, {export.change_high:+.2f}]"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
