"""The table of the matrix benchmark from its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.cells import Row
from benchmarks.expected_sheets import (
    ALONE,
    ALONE_STAGES,
    ALONE_TRAINED,
    BY_CELL,
    TOGETHER,
    TOGETHER_TRAINED,
)
from benchmarks.interleave import spread
from benchmarks.matrix_rounds import CellAlone, MeasuredRound
from benchmarks.sheet import Sheet

Seconds = Callable[[MeasuredRound], float]

WALL: dict[str, Seconds] = {
    ALONE: lambda r: sum(cell.timed.wall_s for cell in r.cells),
    ALONE_STAGES: lambda r: sum(cell.stages_s for cell in r.cells),
    # The teacher is then trained where it would have been read and evaluated.
    ALONE_TRAINED: lambda r: sum(c.timed.wall_s - c.teacher_s + r.teacher_s for c in r.cells),
    TOGETHER: lambda r: r.together.wall_s,
    TOGETHER_TRAINED: lambda r: r.trained.wall_s,
}
CPU: dict[str, Seconds] = {
    ALONE: lambda r: sum(cell.timed.cpu_s for cell in r.cells),
    TOGETHER: lambda r: r.together.cpu_s,
    TOGETHER_TRAINED: lambda r: r.trained.cpu_s,
}


def filled_sheet(sheet: Sheet, rounds: Sequence[MeasuredRound]) -> Sheet:
    """The sheet with every row filled in; all measurements go into its notes."""
    rows = {name: _row(sheet, name, rounds) for name in sheet.expected}
    notes = {"students": compared([c for r in rounds for c in r.cells])}
    return replace(sheet, rows=rows, notes=notes | {"rounds": [asdict(r) for r in rounds]})


def compared(cells: Sequence[CellAlone]) -> dict[str, Any]:
    """How the students of cells alone and of the run of all cells compare."""
    apart = [abs(cell.top1 - cell.top1_together) for cell in cells]
    return {
        "cells": len(cells),
        "same_bits": sum(cell.same_bits for cell in cells),
        "largest_top1_difference": max(apart),
        "mean_top1_difference": statistics.fmean(c.top1_together - c.top1 for c in cells),
    }


def in_words(found: dict[str, Any]) -> str:
    """The comparison of the students as a sentence."""
    return (
        f"Students of both ways: the same bits in {found['same_bits']} of {found['cells']} cells; "
        f"top-1 differs by at most {found['largest_top1_difference']:.2f} points, "
        f"{found['mean_top1_difference']:+.2f} on average."
    )


def _row(sheet: Sheet, name: str, rounds: Sequence[MeasuredRound]) -> Row:
    wall = [WALL[name](r) for r in rounds]
    row: Row = {
        "wall_s": statistics.median(wall),
        "how": "measured" if name in CPU else "computed",
        "samples": wall,
    }
    if name in CPU:
        row["cpu_s"] = statistics.median(CPU[name](r) for r in rounds)
        row["cpu_samples"] = [CPU[name](r) for r in rounds]
    if name not in BY_CELL:
        row["against"] = {b: asdict(_ratio(WALL[b], WALL[name], rounds)) for b in BY_CELL}
        row["cpu_against"] = asdict(_ratio(CPU[ALONE], CPU[name], rounds))
    if goal := sheet.wanted.get(name, {}).get("goal"):
        met = all(row["against"][b]["median"] >= goal["ratio"] for b in goal["against"])
        row |= {"met": met, "verdict": "met" if met else "not met"}
    return {"verdict": "", **row}


def _ratio(slow: Seconds, fast: Seconds, rounds: Sequence[MeasuredRound]) -> Any:
    return spread([slow(r) / fast(r) for r in rounds])
