"""A whole leaderboard as data: what the terminal, a web page and W&B show, computed once."""

from __future__ import annotations

from dataclasses import dataclass

from smskd.errors import UsageError, did_you_mean
from smskd_bench.plan import Plan
from smskd_bench.report.basis import Basis, basis_of
from smskd_bench.report.evaluation_count import EvaluationCount
from smskd_bench.report.held import Held, read_held
from smskd_bench.report.missing import Missing, MissingRow
from smskd_bench.report.rows import Controls, LeaderboardRow, compared_rows, leaderboard_rows
from smskd_bench.stats.comparing import MARGIN
from smskd_bench.store import Store


@dataclass(frozen=True)
class Leaderboard:
    """The rows of one matrix from one store.

    Attributes:
        matrix: Name of the matrix.
        basis: What all rows have in common.
        margin: Points of accuracy that count as practically none.
        rows: The pairs in the matrix's order, within a pair the best mean first.
        missing: Every row of every pair that lacks seeds, with the reason.
        test_set: How often the test set was looked at.
    """

    matrix: str
    basis: Basis
    margin: float
    rows: tuple[LeaderboardRow, ...]
    missing: tuple[MissingRow, ...]
    test_set: EvaluationCount


def read_leaderboard(
    plan: Plan,
    store: Store,
    margin: float = MARGIN,
    against: str | None = None,
    held: Held | None = None,
) -> Leaderboard:
    """Read a leaderboard from a store.

    Args:
        plan: The matrix.
        store: Where the results are.
        margin: Points of accuracy that count as practically none.
        against: Compare every row with this one instead of with its controls: the name of a row,
            ``pair/row``, or a cell ``pair/row/s0`` (then at this seed only).
        held: What the store holds, where it was read already.

    Raises:
        UsageError: there is no such row, or the margin is no number above 0.
        StoreError: a result cannot be read.
    """
    if not 0 < margin < 100:
        raise UsageError(f"a margin of {margin} points", "give a number above 0, such as 0.3")
    held = held or read_held(plan, store)
    rows = leaderboard_rows(plan, store, margin, held=held)
    if against is not None:
        rows = _against(plan, rows, margin, against)
    missing = [reason for row in rows for reason in row.missing]
    return Leaderboard(
        matrix=plan.matrix.name,
        basis=basis_of(plan),
        margin=margin,
        rows=tuple(rows),
        missing=(*missing, *Missing(plan, store).of_other_pairs()),
        test_set=held.test_set,
    )


def _against(
    plan: Plan, rows: list[LeaderboardRow], margin: float, name: str
) -> list[LeaderboardRow]:
    """The rows, compared with one row; with that of a cell, only the rows of its pair."""
    if any(row.row == name for row in rows):
        pairs = dict.fromkeys(row.pair for row in rows)
        of_pairs = ([row for row in rows if row.pair == pair] for pair in pairs)
        return [r for found in of_pairs for r in compared_rows(found, margin, _always(name))]
    for row in rows:
        place = f"{row.pair}/{row.row}"
        found = [other for other in rows if other.pair == row.pair]
        if name == place:
            return compared_rows(found, margin, _always(row.row))
        for cell in plan.cells:
            if cell.name == name and (cell.pair, cell.row) == (row.pair, row.row):
                return compared_rows(found, margin, _always(row.row), only_seed=cell.seed)
    known = [*(row.row for row in rows), *(f"{row.pair}/{row.row}" for row in rows)]
    raise UsageError(f"no row or cell is named {name!r}", did_you_mean(name, dict.fromkeys(known)))


def _always(name: str) -> Controls:
    return lambda row: (name,)
