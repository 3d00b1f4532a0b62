"""What a stage did to single test images: how many it gained, lost, and answers as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smskd.datasets import dataset_info
from smskd_bench.plan import Cell, Plan
from smskd_bench.site.inline import number
from smskd_bench.store import Record


@dataclass(frozen=True)
class StageChange:
    """One stage of one seed.

    Attributes:
        seed: Of the student.
        stage: From 1.
        methods: What was trained.
        top1: Test accuracy after it, in percent.
        change: Points more than after the stage before; None in the first stage.
        gained: Test images that became right.
        lost: Test images that became wrong.
        kept: Of what was right before, percent still right.
        same: Test images answered as before, in percent.
        reference: Whether the student of the stage before was the reference, and so held it.
    """

    seed: int
    stage: int
    methods: str
    top1: float | None
    change: float | None = None
    gained: int | None = None
    lost: int | None = None
    kept: float | None = None
    same: float | None = None
    reference: bool = False


def stage_changes(
    plan: Plan, cell: Cell, records: Mapping[str, Record], methods: list[str]
) -> list[StageChange]:
    """Each stage of a cell that is done.

    Counts follow from the recorded percentages, which are of a known number of test images.
    """
    found: list[StageChange] = []
    before: float | None = None
    for key, name in zip(cell.stages, methods, strict=True):
        record, spec = records.get(key), plan.nodes[key]
        if record is None:
            break
        images = dataset_info(spec.dataset.name).num_test
        top1 = number(record["test"]["top1"], 8)
        counts = _counts(before, record.get("kept"), images)
        change = None if before is None or top1 is None else top1 - before
        held = spec.reference is not None
        found.append(StageChange(cell.seed, spec.number, name, top1, change, *counts, held))
        before = top1
    return found


def _counts(
    before: float | None, kept: Any, images: int
) -> tuple[int | None, int | None, float | None, float | None]:
    """Images gained and lost, percent kept and the same."""
    if before is None or not isinstance(kept, dict):
        return None, None, None, None
    same, still, gained = (number(kept.get(name), 8) for name in ("same", "kept", "gained"))
    if still is None or gained is None:
        return None, None, still, same
    right = round(before / 100 * images)
    won = round(gained / 100 * (images - right))
    return won, round((100 - still) / 100 * right), still, same
