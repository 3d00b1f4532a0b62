"""The leaderboard in a terminal, and the choice among its formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from smskd_bench.report.columns import (
    FOOTNOTE,
    SIGNS,
    STYLES,
    Column,
    footnote,
    heading,
    human,
    short_verdict,
    telling,
    verdict_note,
    verdict_of,
    verdict_sign,
)
from smskd_bench.report.escaping import plain
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.report.text_forms import RENDERERS
from smskd_bench.report.view import Placed, indented, ordered
from smskd_bench.stats.comparing import WORDS
from smskd_bench.terminal import Terminal

__all__ = [
    "FOOTNOTE",
    "FORMATS",
    "WIDE",
    "View",
    "human",
    "print_table",
    "render",
    "terminal_table",
]

FORMATS = ("table", *RENDERERS)

WIDE = 260
"""Characters of a line where the output is no terminal."""


@dataclass(frozen=True)
class View:
    """How rows are shown.

    Attributes:
        sort: A name of :data:`smskd_bench.report.view.SORTS`.
        everything: All rows, where only some are shown: they keep their ranks.
        notes: Lines about the whole board.
    """

    sort: str = "accuracy"
    everything: tuple[LeaderboardRow, ...] | None = None
    notes: tuple[str, ...] = ()

    def place(self, rows: Sequence[LeaderboardRow]) -> list[Placed]:
        """The rows in order, with their ranks."""
        return ordered(rows, self.everything or rows, self.sort)


def render(rows: Sequence[LeaderboardRow], form: str, view: View | None = None) -> str:
    """The rows as Markdown, CSV, JSON or LaTeX text."""
    view = view or View()
    return RENDERERS[form](view.place(rows), view.notes)


def terminal_table(
    rows: Sequence[LeaderboardRow], width: int, view: View | None = None
) -> RenderableType:
    """The rows for a terminal of ``width`` characters, one table a pair.

    Controls stand indented under what they control. Columns that say nothing are left out, and the
    least important ones where it is narrow; names are folded, never cut. Reasons of failures stand
    below, where there is room.
    """
    view = view or View()
    parts: list[RenderableType] = []
    shown: set[str] = set()
    for pair, group in groupby(indented(view.place(rows)), key=lambda p: p.row.pair):
        placed = list(group)
        found = [p.row for p in placed]
        columns = [_brief(column) for column in telling(found)]
        fitting = _fitting(columns, found, width)
        parts.append(_pair_table(pair, placed, fitting))
        parts += [
            Text(f"{plain(row.row)}: {plain(row.status)}") for row in found if ": " in row.status
        ]
        names = {name for name, _, _ in fitting}
        shown |= names
        if left_out := [n for n, _, _ in columns if n not in names and not _signed(n, names)]:
            text = (
                f"left out here: {', '.join(left_out)}; wider terminals and other formats have it"
            )
            parts.append(Text(text, style="dim"))
        if note := verdict_note(found):
            parts.append(Text(note, style="dim"))
    parts += [Text(_sign_note(), style="dim")] if SIGN[0] in shown else []
    return Group(*parts, *(Text(n, style="dim") for n in (*view.notes, footnote(shown))))


def _sign_note() -> str:
    return ", ".join(f"{SIGNS[verdict]} {words}" for verdict, words in WORDS.items())


def _signed(name: str, names: set[str]) -> bool:
    return name == "verdict" and SIGN[0] in names


def _pair_table(pair: str, placed: list[Placed], columns: list[Column]) -> Table:
    rows = [p.row for p in placed]
    table = Table(title=Text(plain(heading(pair, rows))), title_justify="left", header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    for name, side, _ in columns:
        number = side == "right"
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for p in placed:
        best = p.rank == 1 and p.row.mean is not None
        style = "bold" if best else "dim" if p.row.mean is None else ""
        cells = [_cell(p, column) for column in columns]
        table.add_row(f"{p.rank}{'*' if best else ''}", *cells, style=style)
    return table


def _cell(placed: Placed, column: Column) -> RenderableType:
    name, _, cell = column
    # As Text: brackets in a name or a reason are no markup.
    text = Text(plain(cell(placed.row)))
    if name == "row" and placed.depth:  # padded, so that a folded name stays under itself
        return Padding(text, (0, 0, 0, 2 * placed.depth))
    verdict = verdict_of(placed.row)
    if name in ("verdict", SIGN[0]) and verdict is not None:
        text.stylize(STYLES[verdict])
    return text


SIGN: Column = ("v", "left", verdict_sign)
"""In place of the verdict where it is narrow."""

LEAST_TELLING = (
    "target",
    "MACs",
    "params",
    "epochs",
    "kind",
    "MB",
    "kept %",
    "ms p50/p90*/p99*",
    "95 %",
    "verdict",
    "status",
    "its 95 %",
    "n",
    "to beat",
)
"""Left out in this order where the terminal is narrow; of the verdict its sign stays."""

FOLDED = 15
"""Characters that a folded name may be expected to make do with."""


def _fitting(columns: list[Column], rows: list[LeaderboardRow], width: int) -> list[Column]:
    """The columns that fit into ``width`` characters, as many as do."""
    out: list[str] = []
    for name in LEAST_TELLING:
        if _least_width(_without(columns, out), rows) <= width:
            break
        out.append(name)
    for name in reversed(out):  # a small one may fit in place of a large one
        fewer = [other for other in out if other != name]
        if _least_width(_without(columns, fewer), rows) <= width:
            out = fewer
    return _without(columns, out)


def _without(columns: list[Column], out: Sequence[str]) -> list[Column]:
    sign = "verdict" in out
    kept = [SIGN if sign and column[0] == "verdict" else column for column in columns]
    return [column for column in kept if column[0] not in out]


def _least_width(columns: list[Column], rows: list[LeaderboardRow]) -> int:
    total = len(str(len(rows))) + 5  # the rank with its mark, and the frame
    for name, side, cell in columns:
        longest = max(len(name), *(len(cell(row)) for row in rows))
        total += 3 + (longest if side == "right" else min(longest, FOLDED))
    return total


def _brief(column: Column) -> Column:
    name, side, _ = column
    if name == "verdict":
        return name, side, short_verdict
    return (name, side, lambda row: row.status.split(": ")[0]) if name == "status" else column


def print_table(rows: Sequence[LeaderboardRow], console: Console, view: View | None = None) -> None:
    """Print the terminal form; a console that is no terminal gets wide lines."""
    if not console.is_terminal:
        console = Terminal(file=console.file, width=WIDE)
    console.print(terminal_table(rows, console.width, view))
