"""Tables that set the measured time of a step beside the least that the device could need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.cells import NOT_MEASURED, NOT_RUN, Document, Row, grid, measured, quartiles
from benchmarks.interleave import Rounds, spread

if TYPE_CHECKING:
    from benchmarks.counts import Floor

LEGEND = "Step and fraction reached (floor over step): median over the rounds (quartiles)."


@dataclass
class FloorGroup:
    """One table of floors.

    Attributes:
        title: The pair of networks.
        expected: Kinds of step in the table's order.
        steps: Steps of one measurement.
        floors: By kind, its counts and its least time.
        rounds: What was measured; None if nothing was.
        missing: By kind, why it was not measured.
        notes: The device's measured peaks.
        remarks: Sentences below the table.
    """

    title: str
    expected: Sequence[str]
    steps: int = 1
    floors: Mapping[str, Floor] = field(default_factory=dict)
    rounds: Rounds | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def document(self) -> Document:
        """As it is stored."""
        return {
            "kind": "floor",
            "title": self.title,
            "rounds": self.rounds.count if self.rounds else 0,
            "notes": dict(self.notes),
            "remarks": list(self.remarks),
            "rows": [self._row(name) for name in self.expected],
        }

    def _row(self, name: str) -> Row:
        if self.rounds is None or name not in self.rounds.timed or name not in self.floors:
            return {"name": name, "not_measured": self.missing.get(name, NOT_RUN)}
        floor = self.floors[name]
        step_s = [sample.wall_s / self.steps for sample in self.rounds.timed[name]]
        return {
            "name": name,
            **asdict(floor),
            **measured(name, self.rounds),
            "step_ms": asdict(spread([1e3 * s for s in step_s])),
            "reached": asdict(spread([floor.seconds / s for s in step_s])),
        }


def floor_table(group: Document) -> str:
    """One group as a Markdown table."""
    titles = [
        "step", "GMAC", "MB", "floor ms", "of it by arithmetic", "step ms", "reached", "",
    ]  # fmt: skip
    return grid(group, titles, [_cells(row) for row in group["rows"]])


def _cells(row: Row) -> list[str]:
    if "not_measured" in row:
        return [row["name"], NOT_MEASURED, *["-"] * 5, row["not_measured"]]
    return [
        row["name"],
        f"{row['macs'] / 1e9:.2f}",
        f"{row['bytes'] / 1e6:.0f}",
        f"{1e3 * row['seconds']:.3g}",
        f"{row['arithmetic_s'] / row['seconds']:.0%}",
        quartiles(row["step_ms"]),
        quartiles(row["reached"]),
        "",
    ]
