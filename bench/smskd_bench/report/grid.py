"""A plain table of text, in a terminal or as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from smskd_bench.report.escaping import markdown, plain

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Grid:
    """Headings with their side, and lines of cells.

    Attributes:
        heads: Heading and side of each column.
        lines: Cells of each line.
        title: Above it; may be empty.
        styles: Style of a cell in a terminal, by its text.
    """

    heads: tuple[tuple[str, Side], ...]
    lines: tuple[tuple[str, ...], ...]
    title: str = ""
    styles: tuple[tuple[str, str], ...] = ()


def grid_table(grid: Grid) -> Table:
    """For a terminal; names are folded, never cut, and never markup."""
    title = Text(plain(grid.title)) if grid.title else None
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, side in grid.heads:
        number = side == "right"
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    styles = dict(grid.styles)
    for line in grid.lines:
        table.add_row(*(Text(plain(cell), style=styles.get(cell, "")) for cell in line))
    return table


def grid_markdown(grid: Grid) -> str:
    """As Markdown."""
    lines = [f"**{markdown(grid.title)}**", ""] if grid.title else []
    lines.append("| " + " | ".join(name for name, _ in grid.heads) + " |")
    lines.append(
        "| " + " | ".join("---:" if side == "right" else "---" for _, side in grid.heads) + " |"
    )
    lines += ["| " + " | ".join(map(markdown, line)) + " |" for line in grid.lines]
    return "\n".join(lines)
