"""``smskd-bench leaderboard``: the rows of a matrix, or the devices, or a picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from smskd.errors import ConfigError
from smskd.printable import printable
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.report.rows import LeaderboardRow, leaderboard_rows
from smskd_bench.report.tables import print_table, render
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal

WIDE = 220


@dataclass(frozen=True)
class BoardRequest:
    """What the user asked for on the command line."""

    matrix: Path
    store: Path
    only: str | None = None
    form: str = "table"
    devices: bool = False
    picture: Path | None = None


def show(request: BoardRequest, console: Console) -> None:
    """Print what was asked for, and draw the picture if one was.

    Raises:
        SmskdError: the matrix or the store cannot be read, or there is nothing to draw.
    """
    plan = make_plan(load_matrix(request.matrix), request.only)
    rows = leaderboard_rows(plan, Store.peek(request.store))
    if request.devices:
        _show_devices(rows, request.form, console)
    elif request.form == "table":
        print_table(rows, console)
    else:
        _print(render(rows, request.form), console)
    if request.picture is not None:
        from smskd_bench.report.picture import draw, points

        draw(points(rows), request.picture, plan.matrix.name)


def _show_devices(rows: list[LeaderboardRow], form: str, console: Console) -> None:
    from smskd_bench.report.devices import board_markdown, board_table

    if form == "table":
        wide = console if console.is_terminal else Terminal(file=console.file, width=WIDE)
        wide.print(board_table(rows))
    elif form == "markdown":
        _print(board_markdown(rows), console)
    else:
        raise ConfigError(
            f"--devices has no form {form!r}", "use --format json without it: it holds every export"
        )


def _print(text: str, console: Console) -> None:
    console.file.write(printable(text, keep="\r\n"))  # csv ends its lines with both
