"""Tables of what something costs in percent: the time of a step with it, over one without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cells import (
    NOT_MEASURED,
    NOT_RUN,
    VERDICTS,
    Document,
    Row,
    grid,
    measured,
    quartiles,
)
from benchmarks.interleave import Rounds, Sample, ratios, spread

LEGEND = "Cost: median of the cost in percent of time within each round (quartiles)."


@dataclass(frozen=True)
class Extra:
    """What a contestant is compared with.

    Attributes:
        over: The contestant without the thing that costs.
        at_most: The goal in percent; None if there is none.
    """

    over: str
    at_most: float | None = None


@dataclass
class CostGroup:
    """One table of costs.

    Attributes:
        title: What the work was.
        expected: Contestants in the table's order.
        extras: By contestant, what it is compared with; the others are only compared with.
        bounds: By contestant, the cost in percent that arithmetic alone leads to expect.
        rounds: What was measured; None if nothing was.
        missing: By contestant, why it was not measured.
        notes: What was checked before the measurement.
        remarks: Sentences below the table.
    """

    title: str
    expected: Sequence[str]
    extras: Mapping[str, Extra]
    bounds: Mapping[str, float] = field(default_factory=dict)
    rounds: Rounds | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def document(self) -> Document:
        """As it is stored."""
        return {
            "kind": "cost",
            "title": self.title,
            "rounds": self.rounds.count if self.rounds else 0,
            "notes": dict(self.notes),
            "remarks": list(self.remarks),
            "rows": [self._row(name) for name in self.expected],
        }

    def _row(self, name: str) -> Row:
        extra = self.extras.get(name)
        row: Row = {
            "name": name,
            "extra": asdict(extra) if extra else None,
            "bound_percent": self.bounds.get(name),
        }
        if self.rounds is None or name not in self.rounds.timed:
            return row | {"not_measured": self.missing.get(name, NOT_RUN)}
        row |= measured(name, self.rounds) | {"cost_percent": None, "met": None}
        if extra is None or extra.over not in self.rounds.timed:
            return row
        cost = spread(costs(self.rounds.timed[name], self.rounds.timed[extra.over]))
        met = None if extra.at_most is None else cost.median <= extra.at_most
        return row | {"cost_percent": asdict(cost), "met": met}


def costs(samples: Sequence[Sample], without: Sequence[Sample]) -> list[float]:
    """Percent of time that an image costs more than in ``without``, in each round by itself."""
    return [100.0 * (ratio - 1.0) for ratio in ratios(without, samples)]


def cost_table(group: Document) -> str:
    """One group as a Markdown table."""
    titles = ["contestant", "images/s", "costs %", "by arithmetic %", "goal, at most %", ""]
    return grid(group, titles, [_cells(row) for row in group["rows"]])


def _cells(row: Row) -> list[str]:
    extra, bound = row["extra"], row["bound_percent"]
    wanted = f"{extra['at_most']:g}" if extra and extra["at_most"] is not None else "-"
    expected = "-" if bound is None else f"{bound:.1f}"
    if "not_measured" in row:
        return [row["name"], NOT_MEASURED, "-", expected, wanted, row["not_measured"]]
    cost = quartiles(row["cost_percent"], 1) if row["cost_percent"] else "-"
    verdict = VERDICTS[row["met"]]
    speed = f"{row['images_per_s']['median']:,.0f}"
    return [row["name"], speed, cost, expected, wanted, verdict]
