"""Every student of a matrix exported for a target and measured, for benchmarks of devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smskd_export import ExportReport
from smskd_export.judging import Judged

from smskd.errors import RefusedError


@dataclass(frozen=True)
class MeasuredStudent:
    """One student.

    Attributes:
        name: Its network.
        export: Folder of the export: report, bundle, test set.
        measurements: Folder of all measurements of its bundle.
        report: What was checked here.
        judged: The newest measurement.
    """

    name: str
    export: Path
    measurements: Path
    report: ExportReport
    judged: Judged


def measured_students(
    matrix: Path, store: Path, data_root: Path | None, target: str, quick: bool
) -> Iterator[MeasuredStudent]:
    """Export and measure what the store does not hold yet, then yield each student.

    Raises:
        SmskdError: a student is not trained yet, or this machine is not the target.
    """
    from rich.console import Console
    from smskd_bench.config import load_matrix
    from smskd_bench.device_runs import MeasureRequest
    from smskd_bench.exporting import ExportRequest, bundle_name, export
    from smskd_bench.measurements import latest, measurement_folder
    from smskd_bench.plan import make_plan
    from smskd_export import load_target, read_report

    plan = make_plan(load_matrix(matrix))
    asked = MeasureRequest(quick=quick, energy=False)
    cells = tuple(cell.name for cell in plan.cells)
    export(ExportRequest(matrix, target, store, data_root, cells, asked), Console(stderr=True))
    for cell in plan.cells:
        key, name = cell.stages[-1], bundle_name(load_target(target))
        folder = store / "exports" / key / name
        report = read_report(folder)
        assert report is not None
        parent = measurement_folder(store, key, name)
        judged = latest(parent, report.bundle_id, None, quick, report.target.threads)
        if judged is None:
            raise RefusedError(
                f"this machine cannot measure for target {target}; why is said above",
                "run this on such a device, or name another --target",
            )
        student = cell.pair.rpartition(">")[2]
        yield MeasuredStudent(student, folder, parent, report, judged)
