"""``smskd-bench report --html DIR``: boards as a static site that opens from disk."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from smskd.errors import ConfigError
from smskd_bench.bars import counting_bar
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.report.leaderboard import read_leaderboard
from smskd_bench.report.picture import INSTALL
from smskd_bench.site.boards import SiteBoard
from smskd_bench.site.folder import check_folder, new_site
from smskd_bench.site.ledger import read_ledger
from smskd_bench.site.names import slug
from smskd_bench.stats.comparing import MARGIN
from smskd_bench.store import Store

NEEDS = ("jinja2", "plotly", "matplotlib")
"""Packages of the extra ``report``."""


@dataclass(frozen=True)
class SiteRequest:
    """What the user asked for on the command line."""

    html: Path
    matrices: tuple[Path, ...]
    store: Path
    margin: float = MARGIN
    force: bool = False


def build(request: SiteRequest, console: Console, errors: Console) -> None:
    """Write the site and say where it is.

    Args:
        request: What was asked for.
        console: Where the result is told.
        errors: Where progress is shown.

    Raises:
        SmskdError: a matrix or the store cannot be read, packages are missing, or the folder is
            there already or cannot be written; then nothing was changed.
    """
    check_folder(request.html, request.force)
    _check_packages()
    from smskd_bench.site.writing import Writer

    with counting_bar(errors) as progress:
        boards = read_boards(request, progress)
        with new_site(request.html, request.force) as folder:
            writer = Writer(folder, request.store, boards)
            task = progress.add_task("writing pages and pictures", total=writer.steps)
            writer.write(lambda: progress.advance(task))
    rows = sum(len(board.board.rows) for board in boards)
    console.print(
        f"{rows} rows of {len(boards)} {'board' if len(boards) == 1 else 'boards'}: open "
        f"{request.html / 'index.html'}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def read_boards(request: SiteRequest, progress: Progress | None = None) -> list[SiteBoard]:
    """The boards of all matrices, from one store.

    Raises:
        SmskdError: a matrix or the store cannot be read.
    """
    store = Store.peek(request.store)
    task: TaskID | None = None
    if progress is not None:
        task = progress.add_task("reading results", total=len(request.matrices))
    found: list[SiteBoard] = []
    for number, file in enumerate(dict.fromkeys(request.matrices), start=1):
        plan = make_plan(load_matrix(file))
        board = read_leaderboard(plan, store, request.margin)
        ledger = read_ledger(plan, store, board.rows, request.margin)
        name = f"{number}-{slug(plan.matrix.name)}"
        page = "index.html" if len(request.matrices) == 1 else f"board-{name}.html"
        found.append(SiteBoard(number, name, page, file, plan, store, board, ledger))
        if progress is not None and task is not None:
            progress.advance(task)
    return found


def _check_packages() -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the web page needs {', '.join(missing)}", INSTALL)
