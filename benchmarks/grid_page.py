"""The page of the grid: which methods run on which pairs, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.cells import Document
from benchmarks.record import footer
from benchmarks.sheet import Column, Sheet, sheet_table

if TYPE_CHECKING:
    from benchmarks.grid_cell import Cell, Outcome

GRID = "grid"
TITLE = "Every method on every pair"
OUTCOMES: tuple[Outcome, ...] = ("ok", "declared", "failed")
RUNS = "\N{CHECK MARK}"

READING = (
    f"{RUNS}: the steps ran and every check held. A number: the method says that it cannot work "
    "with the pair, for the reason below. FAILED: neither."
)

HEAD = """\
# Every method on the 13 standard pairs

Each method at its published defaults, and each modifier around `kd`, on the 13 pairs of teacher
and student that papers on CIFAR-100 share. A cell trains the real student with the real teacher
for two steps on 32x32 images of 100 classes, through the stage and the training loop that
`smskd-bench run` uses: one step of the first epoch of 240 and one of the last, so that both phases
of a two-phase method are seen. It is checked that

- every loss term, every gradient and every weight is finite, and the distillation terms by
  themselves have a gradient to the student;
- no weight and no statistic of the teacher moved, and it got no gradient;
- each batch norm of the student counted each step once, also where a method shows the student
  more images;
- what is evaluated after the stage gives finite logits.

The networks are untrained; the teacher's running statistics are those of 64 random images.
The page says that methods run, not how well they teach. `python -m benchmarks.grid` makes it.
"""

PEER = """\
For comparison: of mdistiller at `a08d46f`, 35 of 169 cells (its 13 methods on the same 13 pairs)
raise an error with its default settings, as we found by running them: CRD and ReviewKD on 12 pairs
each, for which widths of features must be typed in by hand, KDSVD on 6, OFD on 5.
"""


def grid_sheet(
    kinds: Mapping[str, str], pairs: Sequence[str], cells: Mapping[tuple[str, str], Cell]
) -> Sheet:
    """The table of all cells.

    Args:
        kinds: By row, what kind of method it is.
        pairs: The columns.
        cells: By row and pair.
    """
    reasons = _numbered(cells.values())
    rows = {
        name: {
            "kind": kind,
            "cells": {pair: _text(cells[name, pair], reasons) for pair in pairs},
        }
        for name, kind in kinds.items()
    }
    return Sheet(
        title=TITLE,
        first="method",
        columns=(
            Column("kind", "{kind}", text=True),
            *(Column(_broken(pair), f"{{cells[{pair}]}}", text=True) for pair in pairs),
        ),
        expected=list(kinds),
        rows=rows,
        notes={**counts(cells.values()), "reasons": list(reasons)},
    )


def counts(cells: Iterable[Cell]) -> dict[str, int]:
    """How many cells there are, and how many of each outcome."""
    counted = Counter(cell.outcome for cell in cells)
    return {"cells": counted.total(), **{o: counted[o] for o in OUTCOMES}}


def summary(notes: Mapping[str, int]) -> str:
    """Counts in a line."""
    said = ", ".join(f"{notes[outcome]} {outcome}" for outcome in OUTCOMES)
    return f"{notes['cells']} cells: {said}"


def page(result: Document) -> str:
    """The page of one result; the same text for the same result."""
    (group,) = result["groups"]
    notes = group["notes"]
    reasons = [f"{number}. {text}" for number, text in enumerate(notes["reasons"], start=1)]
    parts = [
        HEAD,
        f"**{summary(notes)}.**\n",
        PEER,
        sheet_table(group) + "\n",
        *(["Reasons:\n", "\n".join(reasons) + "\n"] if reasons else []),
        footer(result) + "\n",
    ]
    return "\n".join(parts)


def _numbered(cells: Iterable[Cell]) -> dict[str, int]:
    """Different reasons, numbered from 1 in the order in which they come."""
    texts = dict.fromkeys(_reason(cell) for cell in cells if cell.reason)
    return {text: number for number, text in enumerate(texts, start=1)}


def _reason(cell: Cell) -> str:
    return f"{cell.reason} ({cell.where})" if cell.where else cell.reason


def _text(cell: Cell, reasons: Mapping[str, int]) -> str:
    if cell.outcome == "ok":
        return RUNS
    number = reasons[_reason(cell)]
    return f"FAILED {number}" if cell.outcome == "failed" else f"{number}"


def _broken(pair: str) -> str:
    """A pair's name that can be broken between the networks, as a narrow column needs."""
    return pair.replace(">", " > ")
