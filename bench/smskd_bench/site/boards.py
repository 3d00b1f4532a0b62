"""One board of a site, and the records its pages are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smskd_bench.plan import Cell, Plan
from smskd_bench.report.leaderboard import Leaderboard
from smskd_bench.site.curves import thinned
from smskd_bench.site.ledger import LedgerPart
from smskd_bench.store import Record, Store

REMEMBERED = 512
"""Results kept at hand: rows share their first stages and their teachers."""


@dataclass(frozen=True)
class SiteBoard:
    """One matrix of a site.

    Attributes:
        number: From 1, in the order of the command line.
        name: For names of files.
        page: File of its page.
        file: The matrix file, as the user named it.
        plan: The matrix.
        store: Where the results are.
        board: The rows.
        ledger: Claims and published numbers.
    """

    number: int
    name: str
    page: str
    file: Path
    plan: Plan
    store: Store
    board: Leaderboard
    ledger: LedgerPart

    def cells(self) -> dict[tuple[str, str], list[Cell]]:
        """Cells of each row, by pair and row."""
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.plan.cells:
            found.setdefault((cell.pair, cell.row), []).append(cell)
        return found


@dataclass
class RecordShelf:
    """Reads results, and keeps the latest with thin histories: a site is larger than memory."""

    store: Store
    kept: OrderedDict[str, Record | None] = field(default_factory=OrderedDict)

    def of_row(self, cells: Iterable[Cell]) -> dict[str, Record]:
        """Results of all that a row is made of, as far as they are there."""
        keys = dict.fromkeys(key for cell in cells for key in cell.everything)
        found = {key: self._record(key) for key in keys}
        return {key: record for key, record in found.items() if record is not None}

    def _record(self, key: str) -> Record | None:
        if key in self.kept:
            self.kept.move_to_end(key)
        else:
            self.kept[key] = self._read(key)
            if len(self.kept) > REMEMBERED:
                self.kept.popitem(last=False)
        return self.kept[key]

    def _read(self, key: str) -> Record | None:
        record = self.store.result(key)
        if record is None:
            return None
        history: list[dict[str, Any]] = [
            {"epoch": epoch, **row} for epoch, row in thinned(record.get("history"))
        ]
        return {**record, "history": history}
