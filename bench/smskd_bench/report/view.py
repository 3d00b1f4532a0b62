"""Which rows of a leaderboard are shown, and in what order; never what is computed.

Rows that are filtered out stay in the correction for multiple comparisons.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from smskd.errors import UsageError, did_you_mean
from smskd_bench.report.exported import shown_export
from smskd_bench.report.rows import LeaderboardRow

SortKey = Callable[[LeaderboardRow], tuple[bool, float | str]]


def _falling(value: float | None) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else -value


def _rising(value: float | None) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else value


def _latency(row: LeaderboardRow) -> float | None:
    shown = shown_export(row.exported)
    return shown.p50_ms if shown else None


SORTS: dict[str, SortKey] = {
    "accuracy": lambda row: _falling(row.mean),
    "difference": lambda row: _falling(row.versus.difference if row.versus else None),
    "spread": lambda row: _rising(row.std),
    "latency": lambda row: _rising(_latency(row)),
    "parameters": lambda row: _rising(row.parameters),
    "macs": lambda row: _rising(row.macs),
    "epochs": lambda row: _rising(row.epochs),
    "name": lambda row: (False, row.row),
}
"""Orders of ``--sort``; what has no number comes last."""


@dataclass(frozen=True)
class Placed:
    """A row where it is shown.

    Attributes:
        row: The row.
        rank: Its place by mean accuracy among all rows of its pair, from 1.
        depth: 0 for a row of its own; a control is one deeper than what it controls.
    """

    row: LeaderboardRow
    rank: int
    depth: int = 0


def select(
    rows: Sequence[LeaderboardRow], pair: str | None, method: str | None
) -> list[LeaderboardRow]:
    """The rows of one pair, or with one method.

    Args:
        rows: All rows.
        pair: Part of the name of a pair; ``*`` matches anything.
        method: A method, modifier or variant that a stage uses.

    Raises:
        UsageError: no row fits.
    """
    found = list(rows)
    if pair is not None:
        pattern = f"*{pair.replace('[', '[[]')}*"
        found = [row for row in found if fnmatch.fnmatchcase(row.pair, pattern)]
        _some(found, "pair", pair, (row.pair for row in rows))
    if method is not None:
        known = [name for row in found for name in row.methods]
        found = [row for row in found if method in row.methods]
        _some(found, "method", method, known)
    return found


def _some(found: list[LeaderboardRow], kind: str, name: str, known: Iterable[str]) -> None:
    if not found:
        raise UsageError(
            f"no row has the {kind} {name!r}", did_you_mean(name, dict.fromkeys(known))
        )


def ranks(rows: Sequence[LeaderboardRow]) -> dict[tuple[str, str], int]:
    """Place of each row by mean among those of its pair, from 1."""
    places: dict[tuple[str, str], int] = {}
    for pair in dict.fromkeys(row.pair for row in rows):
        best_first = sorted((r for r in rows if r.pair == pair), key=SORTS["accuracy"])
        places |= {(pair, row.row): rank for rank, row in enumerate(best_first, start=1)}
    return places


def ordered(
    shown: Sequence[LeaderboardRow],
    everything: Sequence[LeaderboardRow],
    sort: str = "accuracy",
) -> list[Placed]:
    """Rows in the order of a table; pairs stay together, in the order they came."""
    rank = ranks(everything)
    placed: list[Placed] = []
    for pair in dict.fromkeys(row.pair for row in shown):
        rows = sorted((row for row in shown if row.pair == pair), key=SORTS[sort])
        placed += [Placed(row, rank[pair, row.row]) for row in rows]
    return placed


def indented(placed: Sequence[Placed]) -> list[Placed]:
    """The same with each control under the first row that it controls, one step deeper.

    A control of more than half of the other rows stays where it ranks: it would say nothing there.
    """
    result: list[Placed] = []
    for pair in dict.fromkeys(p.row.pair for p in placed):
        group = {p.row.row: p for p in placed if p.row.pair == pair}
        result += _indent(group)
    return result


def _indent(group: dict[str, Placed]) -> list[Placed]:
    uses: dict[str, int] = {}
    for placed in group.values():
        for name in placed.row.controls:
            uses[name] = uses.get(name, 0) + 1
    inner = {name for name, count in uses.items() if 2 * count <= max(2, len(group) - 1)}
    result: dict[str, Placed] = {}

    def place(name: str, depth: int) -> None:
        if name in result:
            return
        found = group[name]
        result[name] = Placed(found.row, found.rank, depth)
        for other in group:  # in the order of the table
            if other in found.row.controls and other in inner:
                place(other, depth + 1)

    for name in group:
        if name not in inner:
            place(name, 0)
    for name in group:  # rows that control each other in a circle
        place(name, 0)
    return list(result.values())
