"""Accuracy against what it costs: the points of the board's picture, by axis and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smskd_bench.report.exported import ExportedNumbers
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.site.inline import number, visible


def cost_points(rows: Sequence[LeaderboardRow]) -> dict[str, Any]:
    """Devices, and every measured export by the place of its row.

    Parameters, MACs and accuracy of the rows themselves are in the table's data already.
    """
    places: dict[str, int] = {}
    points = []
    for index, row in enumerate(rows):
        for export in row.exported:
            if export.p50_ms is None or export.top1 is None or export.batch != 1:
                continue
            where = visible(f"{export.target} on {export.device}")
            points.append(_point(index, places.setdefault(where, len(places)), export))
    return {"places": list(places), "points": points}


def _point(index: int, place: int, export: ExportedNumbers) -> dict[str, Any]:
    return {
        "row": index,
        "place": place,
        "label": visible(export.label),
        "top1": number(export.top1, 8),
        "ms": number(export.p50_ms),
        "mj": number(export.gross_mj),
        "mb": number(export.size_mb),
    }


def has_energy(rows: Sequence[LeaderboardRow]) -> bool:
    """Whether the energy of any export was measured."""
    return any(export.gross_mj is not None for row in rows for export in row.exported)
