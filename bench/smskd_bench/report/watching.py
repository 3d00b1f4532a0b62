"""The table again and again while a run fills the store."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live

from smskd_bench.plan import Plan
from smskd_bench.report.tables import WIDE
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal

EVERY_S = 2.0


def is_settled(plan: Plan, store: Store) -> bool:
    """Whether no cell can change any more: each is done, or has a stage run that failed."""

    def settled(keys: tuple[str, ...], last: str) -> bool:
        if store.is_done(last):
            return True
        here = [key for key in keys if key in plan.nodes]
        return any(
            store.failure(key) is not None and not store.is_running(key)
            for key in here
            if not store.is_done(key)
        )

    return all(settled(cell.everything, cell.stages[-1]) for cell in plan.cells)


def watch(
    table: Callable[[], RenderableType],
    settled: Callable[[], bool],
    console: Console,
    every_s: float = EVERY_S,
) -> None:
    """Show a table until nothing can change any more, or Ctrl-C.

    On a terminal it is redrawn in its place; elsewhere it is printed whenever it has changed.

    Args:
        table: Reads the store and makes the table.
        settled: Whether it is final.
        console: Where it is shown.
        every_s: Seconds between two looks.
    """
    try:
        if console.is_terminal:
            _redraw(table, settled, console, every_s)
        else:
            _reprint(table, settled, console, every_s)
    except KeyboardInterrupt:  # how one stops watching; the run goes on
        return


def _redraw(
    table: Callable[[], RenderableType], settled: Callable[[], bool], console: Console, every: float
) -> None:
    with Live(table(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not settled():
            time.sleep(every)
            live.update(table(), refresh=True)
        live.vertical_overflow = "visible"  # the last one stays, whole
        live.update(table(), refresh=True)


def _reprint(
    table: Callable[[], RenderableType], settled: Callable[[], bool], console: Console, every: float
) -> None:
    shown = ""
    while True:
        last = settled()  # asked first: what ends in between is in the table
        text = _text(table())
        if text != shown:
            console.file.write(text)
            console.file.flush()
            shown = text
        if last:
            return
        time.sleep(every)


def _text(table: RenderableType) -> str:
    out = io.StringIO()
    Terminal(file=out, width=WIDE).print(table)
    return out.getvalue()
