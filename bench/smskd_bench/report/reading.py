"""Reading a store for a table, with a bar where that takes more than a moment."""

from __future__ import annotations

import time

from rich.console import Console

from smskd_bench.bars import counting_bar
from smskd_bench.plan import Plan
from smskd_bench.report.held import Held, read_held
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal

MOMENT_S = 1.5
"""Before that, a bar would only flicker."""


def read_shown(plan: Plan, store: Store, console: Console | None = None) -> Held:
    """Read what rows need of every stage run of a plan, and show how far that is.

    Args:
        plan: The matrix.
        store: Where its results are.
        console: Where the bar is shown, if it is a terminal; by default standard error, so that
            what is printed can be taken elsewhere.

    Raises:
        StoreError: a result cannot be read.
    """
    console = console or Terminal(stderr=True)
    if not console.is_terminal:
        return read_held(plan, store)
    bar = counting_bar(console, "reading the store", "stage runs")
    task, started = bar.add_task("", total=len(plan.nodes)), time.monotonic()

    def told(done: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > MOMENT_S:
            bar.start()
        bar.update(task, completed=done)

    try:
        return read_held(plan, store, told)
    finally:
        if bar.live.is_started:
            bar.stop()
