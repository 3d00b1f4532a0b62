"""A bar for work that is counted: what it is, how far, and how long it will take."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def counting_bar(console: Console, what: str = "{task.description}", unit: str = "") -> Progress:
    """A bar that goes away at its end; nothing where the output is no terminal.

    Args:
        console: Where it is shown.
        what: Text before the bar; by default the description of each task.
        unit: What is counted.
    """
    return Progress(
        TextColumn(what, markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}," if unit else ""),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
