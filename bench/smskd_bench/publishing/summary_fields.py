"""The summary of a row in W&B: flat fields made for ranking, each only if it was measured.

``docs/wandb.md`` explains every field; a test compares the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from smskd_bench.plan import Cell
from smskd_bench.publishing.documents import measured
from smskd_bench.publishing.names import field_name
from smskd_bench.report.basis import Basis
from smskd_bench.report.columns import SIGNS
from smskd_bench.report.exported import ExportedNumbers, shown_export
from smskd_bench.report.rows import LeaderboardRow
from smskd_bench.stats.comparing import WORDS

SUMMARY_SCHEMA = 1
"""Form of the summary; raise it when a field changes its meaning."""


@dataclass(frozen=True)
class Trained:
    """What is known of one finished cell of a row.

    Attributes:
        cell: It.
        top1: Test accuracy in percent.
        seconds: Training time of its own stages, teachers and assistants left out; None if a
            result does not say.
        folded: Whether seeds were trained together, so that the time is that of all of them.
    """

    cell: Cell
    top1: float
    seconds: float | None
    folded: bool = False


def row_summary(
    row: LeaderboardRow, rank: int, basis: Basis, trained: Iterable[Trained]
) -> dict[str, object]:
    """All fields of one row that have a value."""
    cells = sorted(trained, key=lambda t: t.cell.seed)
    return measured(
        {
            "schema": SUMMARY_SCHEMA,
            "rank": rank if row.mean is not None else None,
            **_accuracy(row),
            **_comparison(row),
            **_cost(row, cells),
            **dict(_devices(row.exported)),
            **_state(row),
            **_origin(basis, cells),
        }
    )


def _accuracy(row: LeaderboardRow) -> Mapping[str, object]:
    interval = row.interval
    return {
        "accuracy/mean": row.mean,
        "accuracy/std": row.std,
        "accuracy/low": max(0.0, interval.low) if interval else None,
        "accuracy/high": min(100.0, interval.high) if interval else None,
        "accuracy/n": len(row.top1),
        "accuracy/seeds": row.seeds,
        "accuracy/kept": row.kept,
        "accuracy/teacher": row.teacher_top1,
    }


def _comparison(row: LeaderboardRow) -> Mapping[str, object]:
    versus = row.versus
    if versus is None:
        return {}
    return {
        "control": versus.control,
        "difference/mean": round(versus.difference, 9) + 0.0,  # there is no -0.0
        "difference/std": versus.std,
        "difference/low": versus.low,
        "difference/high": versus.high,
        "difference/n": versus.n,
        "difference/p": versus.p,
        "difference/p_holm": versus.p_holm,
        "difference/p_unequal_holm": versus.p_unequal_holm,
        "difference/comparisons": versus.family,
        "difference/margin": versus.margin,
        "verdict": WORDS[versus.verdict],
        "verdict/sign": SIGNS[versus.verdict],
        "verdict/why": versus.why or None,
    }


def _cost(row: LeaderboardRow, cells: list[Trained]) -> Mapping[str, object]:
    seconds = [t.seconds for t in cells if t.seconds is not None]
    complete = bool(cells) and len(seconds) == len(cells)
    return {
        "cost/parameters": row.parameters,
        "cost/macs": row.macs,
        "cost/epochs": row.epochs,
        "cost/train_seconds": statistics.fmean(seconds) if complete else None,
        "cost/seeds_folded": any(t.folded for t in cells) if complete else None,
        "cost/test_evaluations": row.test_evaluations,
    }


def _devices(exported: Iterable[ExportedNumbers]) -> Iterator[tuple[str, object]]:
    """Of each target the export that the table would show: fp32, one image at a time."""
    found = list(exported)
    for target in dict.fromkeys(e.target for e in found):
        shown = shown_export([e for e in found if e.target == target])
        if shown is None:
            continue
        name = field_name(target)
        yield f"latency/{name}/p50_ms", shown.p50_ms
        yield f"latency/{name}/p90_ms", shown.p90_ms
        yield f"latency/{name}/p99_ms", shown.p99_ms
        yield f"device/{name}/top1", shown.top1
        yield f"device/{name}/size_mb", shown.size_mb
        yield f"device/{name}/energy_mj", shown.gross_mj
        yield f"device/{name}/name", shown.device or None
        yield f"device/{name}/runtime", shown.runtime
        yield f"device/{name}/protocol", shown.protocol


def _state(row: LeaderboardRow) -> Mapping[str, object]:
    return {
        "status": row.status,
        "note": row.note or None,
        "missing": "; ".join(reason.text for reason in row.missing) or None,
    }


def _origin(basis: Basis, cells: list[Trained]) -> Mapping[str, object]:
    return {
        "store/keys": [t.cell.stages[-1] for t in cells] or None,
        "store/seeds": [t.cell.seed for t in cells] or None,
        "store/top1": [t.top1 for t in cells] or None,
        "version/protocol": basis.protocol,
        "version/loop": basis.loop,
        "version/spec": basis.schema,
        "version/recipe": basis.recipe,
        "version/dataset": basis.dataset,
        "version/data": basis.fingerprint,
        "version/data_reader": basis.data_version,
    }
