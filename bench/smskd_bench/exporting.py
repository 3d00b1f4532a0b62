"""``smskd-bench export``: students of a matrix to bundles in the store, measured on a device."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from smskd_export import ExportReport, export_student, load_target, read_report
from smskd_export.archive import OpenedBundle, open_bundle, write_archive
from smskd_export.measuring import probe
from smskd_export.targets import Target

from smskd.datasets import dataset_info
from smskd.errors import ConfigError, RefusedError, did_you_mean
from smskd_bench.config import load_matrix
from smskd_bench.device_runs import (
    GATE_FAILED,
    MeasureRequest,
    exit_code,
    measure_opened,
    print_measurement,
)
from smskd_bench.file_names import file_name
from smskd_bench.measurements import latest, measurement_folder
from smskd_bench.plan import Cell, Plan, make_plan
from smskd_bench.report.export_lines import host_lines
from smskd_bench.report.rows import LeaderboardRow, best_cell, leaderboard_rows
from smskd_bench.running import RunRequest, run_options
from smskd_bench.store import Store
from smskd_bench.tracking_exports import mirror_measurement
from smskd_bench.worker import Worker


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for on the command line.

    Attributes:
        measuring: How to measure.
        again: Measure again what was measured already.
        archive: File for bundle and test set in one, or None.
    """

    matrix: Path
    target: str
    store: Path
    data_root: Path | None = None
    cells: tuple[str, ...] = ()
    measuring: MeasureRequest = field(default_factory=MeasureRequest)
    again: bool = False
    archive: Path | None = None
    tracking: str = "none"
    project: str = "smskd-bench"


def request(**options: Any) -> ExportRequest:
    """Sort the command line's options into a request."""
    names = MeasureRequest.__dataclass_fields__.keys() & options.keys()
    measuring = MeasureRequest(**{name: options.pop(name) for name in names})
    return ExportRequest(**options, measuring=measuring)


@dataclass(frozen=True)
class _Exported:
    """One student, exported: its cell, what was made, and where it is in the store."""

    cell: Cell
    report: ExportReport
    folder: Path


def export(request: ExportRequest, console: Console) -> int:
    """Export the chosen students, measure them where that can be done, print their tables.

    Returns:
        The exit code: 0, or 3 if a precision failed a gate.

    Raises:
        SmskdError: a student is not trained yet, its graph fails a check, the device refuses.
    """
    target = _target(request)
    plan = make_plan(load_matrix(request.matrix))
    store = Store.open(request.store)
    run_request = RunRequest(request.matrix, request.store, request.data_root)
    worker = Worker(store, run_options(run_request, plan, "cpu"))
    code = 0
    with store.in_use(plan.nodes):
        for cell in _chosen(request, plan, store):
            made = _export_cell(target, cell, plan, worker)
            for line in host_lines(made.report, made.folder):
                console.print(Text(line), soft_wrap=True)
            code = max(code, _measure(request, made, store, console))
            if made.report.left_out:
                code = GATE_FAILED
        _draw(plan, store, console)
    return code


def _target(request: ExportRequest) -> Target:
    target = load_target(request.target)
    threads = request.measuring.threads
    return target if threads is None else target.with_threads(threads)


def _export_cell(target: Target, cell: Cell, plan: Plan, worker: Worker) -> _Exported:
    key = cell.stages[-1]
    folder = worker.store.export_folder(key, bundle_name(target))
    report = read_report(folder)
    if report is None:
        report = _make(target, cell, plan, worker, folder)
    return _Exported(cell, report, folder)


def _make(target: Target, cell: Cell, plan: Plan, worker: Worker, folder: Path) -> ExportReport:
    key = cell.stages[-1]
    spec = plan.nodes[key]
    info, data = dataset_info(spec.dataset.name), worker.data(spec.dataset)
    return export_student(
        worker.deployed(spec),
        name=cell.name,
        dataset=spec.dataset.name,
        image_shape=(info.channels, info.size, info.size),
        num_classes=info.num_classes,
        mean=info.mean,
        std=info.std,
        train_images=data.train_images,
        test_images=data.test.images,
        test_labels=data.test.labels,
        target=target,
        out_dir=folder,
        test_sets=worker.store.root / "exports" / "test_sets",
        provenance={"key": key, "cell": cell.name, "matrix": plan.matrix.name},
    )


def bundle_name(target: Target) -> str:
    """Folder of a bundle: the target's name and a hash of its profile.

    So a changed profile never gets old graphs.
    """
    profile = json.dumps(asdict(target), sort_keys=True)
    return f"{target.name}-{hashlib.sha256(profile.encode()).hexdigest()[:8]}"


def _measure(request: ExportRequest, made: _Exported, store: Store, console: Console) -> int:
    """Measure a bundle unless that was done, or say why not and how; the exit code."""
    opened = open_bundle(made.folder, store.root / "exports")
    if request.archive is not None:
        write_archive(opened, request.archive)
        console.print(Text(f"  archive: {request.archive}"), soft_wrap=True)
    asked = request.measuring
    parent = measurement_folder(store.root, made.cell.stages[-1], made.folder.name)
    threads = made.report.target.threads
    judged = latest(parent, made.report.bundle_id, asked.device, asked.quick, threads)
    if judged is None or request.again or asked.resume:
        refused = _why_not_here(asked, opened)
        if refused:
            for line in _not_measured(request, made, refused):
                console.print(Text(line), soft_wrap=True)
            return 0
        folder, judged = measure_opened(opened, asked, None, parent, console)
        for line in mirror_measurement(
            request.tracking, request.project, store.root, made.folder, folder, judged
        ):
            console.print(Text(line), soft_wrap=True)
    print_measurement(judged, console)
    return exit_code(judged)


def _why_not_here(asked: MeasureRequest, opened: OpenedBundle) -> list[str]:
    """What this machine lacks to be the target; nothing if a device was named or all is waived."""
    if asked.device is not None:
        return []
    _, refusals = probe(opened.bundle, None, python=asked.python)
    return [r.message for r in refusals if r.code not in asked.allow]


def _not_measured(request: ExportRequest, made: _Exported, refused: list[str]) -> Iterator[str]:
    yield "  latency: not measured; this machine is not the target:"
    yield from (f"    {reason}" for reason in refused)
    folder = shlex.quote(str(made.folder))
    yield f"  on the device's network: smskd-bench measure {folder} --device USER@HOST"
    yield (
        "  on the device itself: copy that folder there, then "
        "python3 bundle/run.py bundle --test-set test_set --out results"
    )


def _draw(plan: Plan, store: Store, console: Console) -> None:
    """Keep the picture of all measured students of the matrix up to date, where it can be drawn."""
    from smskd_bench.report.picture import draw, points

    found = points(leaderboard_rows(plan, store))
    if not found:
        return
    for ending in (".png", ".html"):
        path = store.root / "pictures" / f"{file_name(plan.matrix.name)}-devices{ending}"
        try:
            draw(found, path, plan.matrix.name)
        except ConfigError as error:
            console.print(Text(f"no picture: {error.message} ({error.hint})"))
            return
        console.print(Text(f"picture: {path}"), soft_wrap=True)


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
                f"smskd-bench run --matrix {request.matrix} --only {name!r}",
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
