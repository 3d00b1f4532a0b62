"""``smskd-bench export``: students of a matrix to bundles in the store, timed if possible here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from smskd_export import ExportReport, export_student, load_target, read_report
from smskd_export.targets import Target

from smskd.datasets import dataset_info
from smskd.errors import ConfigError, RefusedError, did_you_mean
from smskd_bench.config import load_matrix
from smskd_bench.environment import processor_name
from smskd_bench.plan import Cell, Plan, make_plan
from smskd_bench.report.rows import LeaderboardRow, best_cell, exported_numbers, leaderboard_rows
from smskd_bench.running import RunRequest, run_options
from smskd_bench.store import Store
from smskd_bench.worker import Worker


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for on the command line."""

    matrix: Path
    target: str
    store: Path
    data_root: Path | None = None
    cells: tuple[str, ...] = ()
    quick: bool = False


def export(request: ExportRequest, console: Console) -> None:
    """Export the chosen students and print one line each.

    Raises:
        RefusedError: a student is not trained yet, or its graph fails a check.
    """
    target = load_target(request.target)
    plan = make_plan(load_matrix(request.matrix))
    store = Store.open(request.store)
    run_request = RunRequest(request.matrix, request.store, request.data_root)
    worker = Worker(store, run_options(run_request, plan, "cpu"))
    for cell in _chosen(request, plan, store):
        report, folder = _export_cell(request, target, cell, plan, worker)
        for line in _lines(cell, report, folder):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _export_cell(
    request: ExportRequest, target: Target, cell: Cell, plan: Plan, worker: Worker
) -> tuple[ExportReport, Path]:
    key = cell.stages[-1]
    folder = worker.store.export_folder(key, bundle_name(target, request.quick))
    report = read_report(folder)
    if report is not None:
        return report, folder
    spec = plan.nodes[key]
    info, data = dataset_info(spec.dataset.name), worker.data(spec.dataset)
    made = export_student(
        worker.deployed(spec),
        name=cell.name,
        image_shape=(info.channels, info.size, info.size),
        num_classes=info.num_classes,
        mean=info.mean,
        std=info.std,
        test_images=data.test.images,
        test_labels=data.test.labels,
        target=target,
        out_dir=folder,
        provenance={"key": key, "cell": cell.name, "matrix": plan.matrix.name},
        quick=request.quick,
    )
    return made, folder


def bundle_name(target: Target, quick: bool) -> str:
    """Folder of a bundle: the target's name and a hash of its profile and, if timed, the machine.

    So a changed profile or another machine on the same store never gets old numbers.
    """
    where = processor_name() if target.measure_here else ""
    profile = json.dumps([asdict(target), where], sort_keys=True)
    digest = hashlib.sha256(profile.encode()).hexdigest()[:8]
    return f"{target.name}-{digest}" + ("-quick" if quick else "")


def _chosen(request: ExportRequest, plan: Plan, store: Store) -> Iterator[Cell]:
    """The cells named, or for each pair the lowest seed of the row that ranks first."""
    if not request.cells:
        yield from _best(plan, store)
        return
    by_name = {cell.name: cell for cell in plan.cells}
    for name in request.cells:
        if name not in by_name:
            raise ConfigError(f"no cell {name!r}", did_you_mean(name, by_name))
        if not store.is_done(by_name[name].stages[-1]):
            raise RefusedError(
                f"{name} is not trained yet",
                f"smskd-bench run --matrix {request.matrix} --only '{name}'",
            )
        yield by_name[name]


def _best(plan: Plan, store: Store) -> Iterator[Cell]:
    rows = [row for row in leaderboard_rows(plan, store) if row.mean is not None]
    first: dict[str, LeaderboardRow] = {}
    for row in rows:
        first.setdefault(row.pair, row)
    if not first:
        raise RefusedError(
            f"no student of {plan.matrix.name} is trained yet in {store.root}",
            f"smskd-bench run --matrix {plan.loaded.file}",
        )
    for pair, row in first.items():
        if cell := best_cell(plan, store, pair, row.row):
            yield cell


def _lines(cell: Cell, report: ExportReport, folder: Path) -> Iterator[str]:
    numbers, parity = exported_numbers(report), report.parity
    yield f"{cell.name} -> {report.target.name}: {folder}"
    yield (
        f"  top-1 {parity.onnx_top1:.2f} % (PyTorch {parity.torch_top1:.2f} %), "
        f"agreement {parity.agreement:.2f} %, largest logit difference {parity.max_abs_diff:.1e}, "
        f"n {parity.n}"
    )
    yield (
        f"  {numbers.size_mb:.2f} MB, {report.parameters:,} parameters, {report.macs:,} MACs, "
        f"opset {report.graph.opset}, sha256 {report.graph.sha256[:12]}"
    )
    if numbers.p50_ms is None:
        yield f"  latency {report.not_measured}"
    else:
        yield (
            f"  latency p50 {numbers.p50_ms:.3f} ms, p90 {numbers.p90_ms:.3f} ms, "
            f"p99 {numbers.p99_ms:.3f} ms (batch 1, {report.target.threads} thread)"
        )
    for flag in numbers.flags:
        yield f"  note: {flag}"
