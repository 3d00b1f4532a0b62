"""Training time of a row against a control, from what the stage runs took; only like with like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smskd_bench.plan import Cell, Plan
from smskd_bench.stats.comparing import FEWEST
from smskd_bench.stats.sample import sample
from smskd_bench.store import Record, Store


@dataclass(frozen=True)
class ExtraTime:
    """Additional training time of the stages that two rows do not share, in percent.

    Attributes:
        n: Timings that compare: cells of both on the same kind of device with the same shortcuts.
        percent: Geometric mean of the ratios, less one; None without a timing that compares.
        low: Lower end of its 95 percent interval; None where nothing can be said.
        high: Upper end.
        why: Why nothing can be said, or empty.
    """

    n: int
    percent: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""


def extra_time(plan: Plan, store: Store, pairs: Sequence[str], row: str, control: str) -> ExtraTime:
    """Compare two rows at equal pair and seed."""
    cells = {(cell.pair, cell.row, cell.seed): cell for cell in plan.cells}
    ratios, unlike, folded = [], 0, 0
    for (pair, name, seed), ours in cells.items():
        theirs = cells.get((pair, control, seed))
        if name != row or pair not in pairs or theirs is None:
            continue
        records = _own(store, ours, theirs), _own(store, theirs, ours)
        seconds = [_seconds(found) for found in records]
        if None in seconds:
            continue
        if len({how for found in records for how in map(_how, found)}) != 1:
            unlike += 1
            continue
        folded += any(_folded(record) > 1 for found in records for record in found)
        ratios.append(math.log((seconds[0] or 0.0) / (seconds[1] or 1.0)))
    return _summary(ratios, unlike, folded)


def _own(store: Store, cell: Cell, other: Cell) -> list[Record]:
    """Results of the stages that the other cell does not share; empty if one is missing."""
    found = [store.result(key) for key in cell.stages if key not in other.stages]
    return [record for record in found if record] if None not in found else []


def _seconds(records: Sequence[Record]) -> float | None:
    total = math.fsum(float(record.get("train_seconds", 0.0)) for record in records)
    return total if total > 0 and math.isfinite(total) else None


def _how(record: Record) -> tuple[str, ...]:
    """Device, threads and shortcuts; a reference's own table is no difference in the machine."""
    paths = record.get("fast_paths", {})
    sessions = record.get("sessions", ())
    devices = sorted({f"{s.get('device')} {s.get('threads')}" for s in sessions})
    return (*devices, *(str(paths.get(name)) for name in ("teacher", "folded", "compiled")))


def _folded(record: Record) -> int:
    found = record.get("fast_paths", {}).get("folded", 1)
    return max(found) if isinstance(found, list) else int(found)


def _summary(ratios: Sequence[float], unlike: int, folded: int) -> ExtraTime:
    if not ratios:
        why = "made on different devices or with different shortcuts" if unlike else "no timings"
        return ExtraTime(0, why=why)
    known = sample(ratios)
    percent = 100.0 * math.expm1(known.mean)
    if folded:
        return ExtraTime(
            known.n, percent, why="seeds were trained as one network, so they are one timing"
        )
    if known.n < FEWEST or known.interval is None:
        return ExtraTime(known.n, percent, why=f"{known.n} of at least {FEWEST} timings")
    low, high = (100.0 * math.expm1(end) for end in (known.interval.low, known.interval.high))
    return ExtraTime(known.n, percent, low, high)
