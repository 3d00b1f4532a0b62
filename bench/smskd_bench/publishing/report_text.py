"""What the W&B report says, as plain data; the sender makes blocks and panels of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smskd_bench.publishing.documents import canonical
from smskd_bench.publishing.names import RUN_CHARS, field_name, shortened
from smskd_bench.report.leaderboard import Leaderboard
from smskd_bench.report.tables import View, render
from smskd_bench.report.view import Placed

MOST_ROWS = 100
"""Rows written out in the text; the tables beside it have all of them."""


@dataclass(frozen=True)
class ReportText:
    """A report.

    Attributes:
        title: By which it is found again.
        board: Id of the matrix, in the configuration of all its rows.
        intro: What is compared, in sentences.
        table: The ranked rows as Markdown, with how to read them.
        targets: Parts of the names of the fields of each target that was measured.
        curves: Whether there are learning curves.
        picture: Whether there is a picture of accuracy against latency.
    """

    title: str
    board: str
    intro: tuple[str, ...]
    table: str
    targets: tuple[str, ...]
    curves: bool
    picture: bool

    def message(self) -> dict[str, Any]:
        """For the sender; ``digest`` included."""
        fields = asdict(self)
        return {**fields, "digest": hashlib.sha256(canonical(fields).encode()).hexdigest()}


def report_text(
    board: Leaderboard, placed: Sequence[Placed], board_id: str, group: str, curves: bool,
    picture: bool,
) -> ReportText:  # fmt: skip
    """The report of one leaderboard."""
    rows = [p.row for p in placed]
    measured = [e for row in rows for e in row.exported if e.p50_ms is not None]
    return ReportText(
        title=shortened(f"Leaderboard of {group}", RUN_CHARS),
        board=board_id,
        intro=tuple(_intro(board, len(rows))),
        table=render(rows[:MOST_ROWS], "markdown", View(everything=tuple(rows), notes=())),
        targets=tuple(dict.fromkeys(field_name(e.target) for e in measured)),
        curves=curves,
        picture=picture,
    )


def _intro(board: Leaderboard, rows: int) -> list[str]:
    basis = board.basis
    lines = [
        f"Compact students trained by knowledge distillation: {rows} rows on {basis.dataset}, "
        f"protocol {basis.protocol}, recipe {basis.recipe}. Every number comes from the store of "
        "smskd-bench; what was not measured is absent.",
        board.test_set.text,
        "Written by `smskd-bench leaderboard --publish wandb`, and replaced when it is published "
        "again: write comments, not changes.",
    ]
    if rows > MOST_ROWS:
        lines.append(f"The text shows the first {MOST_ROWS} of {rows} rows; the table has all.")
    return lines
