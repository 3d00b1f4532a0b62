"""``smskd-bench seeds``: how many seeds a claim of a given size needs, from the spread so far."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from smskd.errors import StoreError
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.report.grid import Grid, Side, grid_markdown, grid_table
from smskd_bench.report.reading import read_shown
from smskd_bench.report.rows import LeaderboardRow, leaderboard_rows
from smskd_bench.report.tables import WIDE
from smskd_bench.report.view import select
from smskd_bench.stats.comparing import ALPHA
from smskd_bench.stats.power import (
    POWER,
    pooled_std,
    seeds_for_difference,
    seeds_for_equality,
    smallest_difference,
    upper_std,
)
from smskd_bench.store import Store
from smskd_bench.terminal import Terminal

ALL = "all comparisons"
"""In place of a row: the spread that all comparisons of a pair have in common."""


@dataclass(frozen=True)
class SeedsRequest:
    """What the user asked for on the command line."""

    matrix: Path
    store: Path
    difference: float
    only: str | None = None
    power: float = POWER
    pair: str | None = None
    form: str = "table"


@dataclass(frozen=True)
class SeedNeed:
    """Seeds that one comparison needs.

    Attributes:
        pair: Name of the pair.
        row: Name of the row, or :data:`ALL`.
        control: Name of its control; empty for all together.
        n: Seeds so far; for all together the degrees of freedom of the spread.
        std: Standard deviation of the paired differences so far, in points.
        std_upper: What it is not above, with 80 percent confidence.
        difference: True difference that is to be shown, in points.
        alone: Seeds that show it as the only comparison; None: more than 10,000.
        in_table: Seeds that show it among all comparisons of the pair's table (Bonferroni, the
            first step of Holm).
        cautious: The same with ``std_upper``.
        equality: Seeds that show "practically equal" within ``difference``, if there is none.
        smallest_now: The smallest true difference that the seeds so far would show alone.
    """

    pair: str
    row: str
    control: str
    n: int
    std: float
    std_upper: float
    difference: float
    alone: int | None
    in_table: int | None
    cautious: int | None
    equality: int | None
    smallest_now: float | None


def show(request: SeedsRequest, console: Console) -> None:
    """Print the plan.

    Raises:
        SmskdError: the matrix or the store cannot be read, or no comparison has two seeds.
    """
    plan = make_plan(load_matrix(request.matrix), request.only)
    store = Store.peek(request.store)
    rows = leaderboard_rows(plan, store, held=read_shown(plan, store))
    rows = select(rows, request.pair, None)
    needs = seed_needs(rows, request.difference, request.power)
    if not needs:
        raise StoreError(
            f"no comparison in {request.store} has two seeds yet, so no spread is known",
            f"smskd-bench run --matrix {request.matrix}",
        )
    if request.form == "json":
        console.file.write(json.dumps([asdict(need) for need in needs], indent=1) + "\n")
        return
    pairs = dict.fromkeys(need.pair for need in needs)
    grids = [_grid(pair, [need for need in needs if need.pair == pair]) for pair in pairs]
    if request.form == "markdown":
        text = "\n\n".join([*map(grid_markdown, grids), _note(request)])
        console.file.write(f"{text}\n")
    else:
        wide = console if console.is_terminal else Terminal(file=console.file, width=WIDE)
        wide.print(*map(grid_table, grids), Text(_note(request), style="dim"), sep="\n")


def seed_needs(
    rows: Sequence[LeaderboardRow], difference: float, wanted: float = POWER
) -> list[SeedNeed]:
    """What every comparison with two seeds or more needs; first of each pair all of them together.

    Args:
        rows: Rows with their comparisons.
        difference: True difference, in points.
        wanted: Power.
    """
    needs: list[SeedNeed] = []
    for pair in dict.fromkeys(row.pair for row in rows):
        known = [
            (row.row, v, v.std)
            for row in rows
            for v in row.comparisons
            if row.pair == pair and v.std is not None
        ]
        pooled = pooled_std([(v.n, std) for _, v, std in known])
        if pooled is None:
            continue
        std, freedom = pooled
        family, n = known[0][1].family, min(v.n for _, v, _ in known)
        # Comparisons with one control are not independent: as if only half of them were.
        together = max(n - 1, freedom // 2)
        needs.append(_need((pair, ALL, ""), n, std, together, family, difference, wanted))
        needs += [
            _need((pair, row, v.control), v.n, std, v.n - 1, family, difference, wanted)
            for row, v, std in known
        ]
    return needs


def _need(
    place: tuple[str, str, str], n: int, std: float, freedom: int, family: int, difference: float,
    wanted: float,
) -> SeedNeed:  # fmt: skip
    upper, level = upper_std(std, freedom), ALPHA / family
    spread = std or 1e-6  # equal differences in all seeds: the fewest will do, as far as is known
    return SeedNeed(
        *place,
        n=n,
        std=std,
        std_upper=upper,
        difference=difference,
        alone=seeds_for_difference(difference, spread, ALPHA, wanted),
        in_table=seeds_for_difference(difference, spread, level, wanted),
        cautious=seeds_for_difference(difference, upper or spread, level, wanted),
        equality=seeds_for_equality(difference, upper or spread, level, wanted),
        smallest_now=smallest_difference(n, spread, ALPHA, wanted),
    )


def _grid(pair: str, needs: Iterable[SeedNeed]) -> Grid:
    heads: tuple[tuple[str, Side], ...] = (
        ("row", "left"), ("control", "left"), ("n", "right"),
        ("spread", "right"), ("at most", "right"), ("alone", "right"), ("in table", "right"),
        ("cautious", "right"), ("equality", "right"), ("shows now", "right"),
    )  # fmt: skip
    lines = [
        (
            need.row, need.control or "-", str(need.n), f"{need.std:.2f}",
            f"{need.std_upper:.2f}", _count(need.alone), _count(need.in_table),
            _count(need.cautious), _count(need.equality), _points(need.smallest_now),
        )
        for need in needs
    ]  # fmt: skip
    return Grid(heads, tuple(lines), pair)


def _count(seeds: int | None) -> str:
    return "> 10,000" if seeds is None else f"{seeds:,}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _note(request: SeedsRequest) -> str:
    return (
        f"Seeds that show a true difference of {request.difference:g} points with a chance of "
        f"{request.power:.0%} (paired t test, two-sided, {ALPHA:.0%}). alone: as the only "
        "comparison. in table: corrected for all comparisons of the pair. cautious: the same, with "
        "the spread it is not above with 80 % confidence (column at most). equality: seeds that "
        "show practically equal within that difference, if there is none; cautious too. shows now: "
        "the smallest difference that the seeds so far would show alone. Decide before you look: "
        "seeds that are added until a claim holds prove nothing."
    )
