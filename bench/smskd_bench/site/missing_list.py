"""Rows without a number, gathered by their reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smskd_bench.report.missing import WORDS, MissingRow


@dataclass(frozen=True)
class MissingGroup:
    """All that are missing for one reason.

    Attributes:
        words: The reason.
        rows: Which.
        seeds: How many seeds of them.
    """

    words: str
    rows: tuple[MissingRow, ...]
    seeds: int


def missing_groups(missing: Sequence[MissingRow]) -> list[MissingGroup]:
    """Reasons in the order of :data:`smskd_bench.report.missing.WORDS`, those by choice last."""
    found = []
    for reason, words in [*list(WORDS.items())[1:], next(iter(WORDS.items()))]:
        rows = tuple(row for row in missing if row.reason == reason)
        if rows:
            found.append(MissingGroup(words, rows, sum(len(row.seeds) for row in rows)))
    return found
