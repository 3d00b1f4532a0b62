"""What the benchmarks of whole runs should show: a matrix's cost, and what students learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.sheet import Column, Sheet

MATRIX_COST, LEARNING = "matrix_cost", "learning"

SHARED_MATRIX = "shared-prefixes"
ALONE = "each cell alone, teacher given"
ALONE_STAGES = "each cell alone, teacher given, stage runs only"
ALONE_TRAINED = "each cell alone, teacher trained in each"
TOGETHER = "all cells in one run, teacher given"
TOGETHER_TRAINED = "all cells in one run, teacher trained"
BY_CELL = (ALONE, ALONE_STAGES, ALONE_TRAINED)
MATRIX_GOAL = 4.0

LEARNING_PAIR = "resnet14>resnet8"
CONVENTIONAL, LIVE = "conventional", "ours fp32 live"
TABLE, BF16, FOLDED = "ours fp32 table fp16", "ours bf16 live", "ours fp32 live, seeds folded"
TF32, COMPILED = "ours tf32 live", "ours fp32 live, compiled"
LEARNING_MODES = {
    "cpu": (CONVENTIONAL, LIVE, TABLE, BF16, FOLDED),
    "cuda": (CONVENTIONAL, LIVE, TABLE, BF16, FOLDED, TF32, COMPILED),
}
COMPARED_WITH = (CONVENTIONAL, LIVE)


def matrix_sheet(title: str, device: str) -> Sheet:
    """The empty table of what a whole matrix costs."""
    against = [Column(f"against {name}", f"{{against[{name}][median]:.2f}}") for name in BY_CELL]
    return Sheet(
        title=title,
        first="way",
        columns=(
            Column("wall s", "{wall_s:,.0f}"),
            Column("CPU s", "{cpu_s:,.0f}"),
            Column("time is", "{how}", text=True),
            *against,
            Column("CPU time against the first", "{cpu_against[median]:.2f}"),
            Column("goal", "{goal[ratio]:g}"),
            Column("", "{verdict}", text=True),
        ),
        expected=(*BY_CELL, TOGETHER, TOGETHER_TRAINED),
        wanted=_matrix_goals(device),
    )


def _matrix_goals(device: str) -> dict[str, dict[str, Any]]:
    """Only what was measured, and did the same, is asked to be faster."""
    if device != "cpu":
        return {}
    return {TOGETHER: {"goal": {"ratio": MATRIX_GOAL, "against": [ALONE]}}}


def learning_sheet(title: str, modes: Sequence[str]) -> Sheet:
    """The empty table of what ways of training teach."""
    return Sheet(
        title=title,
        first="training",
        columns=(
            Column("top-1 %", "{top1_mean:.2f}"),
            Column("seeds", "{n}"),
            *(column for name in COMPARED_WITH for column in _difference_columns(name)),
        ),
        expected=modes,
    )


def _difference_columns(name: str) -> tuple[Column, Column]:
    found = f"against[{name}]"
    interval = f"{{{found}[mean]:+.2f}} ({{{found}[low]:+.2f}} to {{{found}[high]:+.2f}})"
    return (
        Column(f"minus {name} (95 %)", interval),
        Column("verdict", f"{{{found}[verdict]}}", text=True),
    )
