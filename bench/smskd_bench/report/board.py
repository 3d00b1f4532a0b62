"""``smskd-bench leaderboard``: the rows of a matrix, or the devices, or a picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from smskd.errors import ConfigError
from smskd.printable import printable
from smskd_bench.config import load_matrix
from smskd_bench.plan import Plan, make_plan
from smskd_bench.report.leaderboard import Leaderboard, read_leaderboard
from smskd_bench.report.reading import read_shown
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.report.tables import WIDE, View, print_table, render, terminal_table
from smskd_bench.report.view import select
from smskd_bench.report.watching import is_settled, watch
from smskd_bench.report.writing import check_target, write_text
from smskd_bench.stats.comparing import MARGIN
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal


@dataclass(frozen=True)
class BoardRequest:
    """What the user asked for on the command line."""

    matrix: Path
    store: Path
    only: str | None = None
    form: str = "table"
    devices: bool = False
    picture: Path | None = None
    pair: str | None = None
    method: str | None = None
    sort: str = "accuracy"
    against: str | None = None
    margin: float = MARGIN
    watch: bool = False
    out: Path | None = None
    force: bool = False


def show(request: BoardRequest, console: Console) -> None:
    """Print or write what was asked for, and draw the picture if one was.

    Raises:
        SmskdError: the matrix or the store cannot be read, there is nothing to draw, or a file is
            there already.
    """
    _check(request)
    plan = make_plan(load_matrix(request.matrix), request.only)
    store = Store.peek(request.store)
    if request.watch:
        _watch(request, plan, store, console)
        return
    held = read_shown(plan, store)
    board = read_leaderboard(plan, store, request.margin, request.against, held)
    rows = select(board.rows, request.pair, request.method)
    if request.devices:
        _show_devices(rows, request.form, console)
    elif request.form == "table":
        print_table(rows, console, _view(request, board))
    else:
        _deliver(render(rows, request.form, _view(request, board)), request, console)
    if request.picture is not None:
        from smskd_bench.report.picture import draw, points

        draw(points(rows), request.picture, plan.matrix.name)


def _check(request: BoardRequest) -> None:
    """Refuse options that cannot go together before anything is read."""
    if request.watch and (request.form != "table" or request.devices or request.picture):
        raise ConfigError("--watch shows the table only", "leave the other options out")
    if request.out is not None and (request.form == "table" or request.devices):
        raise ConfigError("--out writes text", "add --format markdown, csv, json or latex")
    for path in (request.out, request.picture):
        if path is not None:
            check_target(path, request.force)


def _view(request: BoardRequest, board: Leaderboard) -> View:
    notes = (board.test_set.text,) if board.test_set.stage_runs else ()
    return View(request.sort, board.rows, notes)


def _watch(request: BoardRequest, plan: Plan, store: Store, console: Console) -> None:
    def table() -> RenderableType:
        board = read_leaderboard(plan, store, request.margin, request.against)
        rows = select(board.rows, request.pair, request.method)
        width = console.width if console.is_terminal else WIDE
        done = sum(store.is_done(cell.stages[-1]) for cell in plan.cells)
        progress = Text(f"{plan.matrix.name}: {done} of {len(plan.cells)} cells done")
        return Group(terminal_table(rows, width, _view(request, board)), progress)

    watch(table, lambda: is_settled(plan, store), console)


def _deliver(text: str, request: BoardRequest, console: Console) -> None:
    if request.out is None:
        _print(text, console)
        return
    write_text(request.out, text)
    console.print(f"written: {request.out}", highlight=False, markup=False, soft_wrap=True)


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
