"""The table of the learning benchmark from what was learnt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.cells import Row
from benchmarks.expected_sheets import COMPARED_WITH
from benchmarks.paired import paired
from benchmarks.sheet import Sheet

Lessons = Mapping[str, Mapping[int, Mapping[str, Any]]]


def filled_sheet(
    sheet: Sheet, lessons: Lessons, seeds: Sequence[int], missing: Mapping[str, str]
) -> Sheet:
    """The sheet with a row for each way that was trained with all seeds."""
    rows = {way: _row(way, lessons, seeds) for way in sheet.expected if way in lessons}
    notes = {
        "seeds": list(seeds),
        "unit": "top-1 in percent, last epoch",
        "revisions": _revisions(lessons),
    }
    return replace(sheet, rows=rows, missing=missing, notes=notes)


def _row(way: str, lessons: Lessons, seeds: Sequence[int]) -> Row:
    mine = lessons[way]
    top1 = [mine[seed]["top1"] for seed in seeds]
    others = [name for name in COMPARED_WITH if name in lessons and name != way]
    against = {
        name: asdict(paired(top1, [lessons[name][seed]["top1"] for seed in seeds]))
        for name in others
    }
    return {
        "n": len(seeds),
        "top1_mean": statistics.fmean(top1),
        "top1": dict(zip(map(str, seeds), top1, strict=True)),
        "seconds": {str(seed): mine[seed]["seconds"] for seed in seeds},
        "seconds_compare": all(mine[seed]["seconds_compare"] for seed in seeds),
        "seeds_at_once": mine[seeds[0]]["seeds_at_once"],
        "trained_sha256": {str(seed): mine[seed]["trained"] for seed in seeds},
        "initial_sha256": {str(seed): mine[seed]["initial"] for seed in seeds},
        "against": against,
    }


def _revisions(lessons: Lessons) -> list[str]:
    """All revisions that results were made with; a work folder may hold several."""
    everyone = [one for by_seed in lessons.values() for one in by_seed.values()]
    return sorted({str(one["code"]["revision"])[:7] for one in everyone})
