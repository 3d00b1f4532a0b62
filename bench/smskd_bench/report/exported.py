"""What the exported students of a row measured, from the bundles and measurements in a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smskd_bench.measurements import found, measurement_folder

if TYPE_CHECKING:
    from smskd_export.judging import Judged, JudgedRow
    from smskd_export.report import ExportReport


@dataclass(frozen=True)
class ExportedNumbers:
    """One precision of an exported student on one device.

    Attributes:
        target: Name of the target profile.
        device: How the device was reached; empty if nothing was measured yet.
        runtime: What executed it, with version.
        threads: CPU threads.
        protocol: Name of the protocol.
        precision: Name from the profile.
        batch: Images an inference.
        cuda_graph: Whether a CUDA graph was replayed.
        status: ``ok``, ``gate_failed``, ``failed`` or ``not measured``.
        top1: Accuracy in percent: on the device, else of the graph where it was made.
        change: Points against PyTorch on the same images.
        change_low: Lower end of its 95 percent interval.
        change_high: Upper end.
        p50_ms: Median of one inference; None if it was not measured.
        p90_ms: Upper bound of the 90th percentile.
        p99_ms: Upper bound of the 99th percentile.
        samples_per_s: Images a second.
        gross_mj: Energy of one inference, where power could be read.
        size_mb: Size of the graph in 10^6 bytes.
        measured_utc: When, ISO 8601.
        flags: Doubts, in words.
    """

    target: str
    device: str
    runtime: str
    threads: int
    protocol: str
    precision: str
    batch: int
    cuda_graph: bool
    status: str
    top1: float | None
    change: float | None
    change_low: float | None
    change_high: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    samples_per_s: float | None
    gross_mj: float | None
    size_mb: float
    measured_utc: str
    flags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Precision, batch size and way to run, for tables and pictures."""
        return f"{self.precision} b{self.batch}" + (" graph" if self.cuda_graph else "")


def exported_keys(root: Path) -> set[str]:
    """Keys of the stage runs of which something was exported."""
    folder = root / "exports"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def exported_numbers(root: Path, keys: Iterable[str]) -> list[ExportedNumbers]:
    """Everything exported from the stage runs ``keys``: what was measured, else what was made."""
    return [numbers for key in keys for numbers in _of_one(root, key)]


def _of_one(root: Path, key: str) -> Iterator[ExportedNumbers]:
    folder = root / "exports" / key
    if not folder.is_dir():  # most stage runs; nothing of the exporter is imported for them
        return
    from smskd_export.report import read_report

    for bundle in sorted(path.parent for path in folder.glob("*/report.json")):
        judged = [j for j in found(measurement_folder(root, key, bundle.name)) if j.rankable]
        for measurement in _newest_each(judged):
            for row in measurement.rows:
                yield _measured(measurement, row)
        report = None if judged else read_report(bundle)
        if report is not None:
            yield from _made(report)


def _newest_each(judged: list[Judged]) -> list[Judged]:
    """The newest measurement of each device and number of threads."""
    newest: dict[tuple[str, int], Judged] = {}
    for one in sorted(judged, key=lambda one: one.measured_utc):
        newest[one.device, one.threads] = one
    return list(newest.values())


def _measured(judged: Judged, row: JudgedRow) -> ExportedNumbers:
    host, change = row.host, row.change
    return ExportedNumbers(
        target=judged.target,
        device=judged.device,
        runtime=judged.runtime,
        threads=judged.threads,
        protocol=judged.protocol,
        precision=row.precision,
        batch=row.batch,
        cuda_graph=row.cuda_graph,
        status=row.status,
        top1=row.top1,
        change=change.difference if change else None,
        change_low=change.low if change else None,
        change_high=change.high if change else None,
        p50_ms=_ms(host.p50_ns if host else None),
        p90_ms=_ms(host.p90_bound_ns if host else None),
        p99_ms=_ms(host.p99_bound_ns if host else None),
        samples_per_s=row.samples_per_s,
        gross_mj=row.gross_mj,
        size_mb=row.size_mb,
        measured_utc=judged.measured_utc,
        flags=tuple(f"{flag.message}; {flag.remedy}" for flag in row.flags),
    )


def _made(report: ExportReport) -> Iterator[ExportedNumbers]:
    """A bundle that no device has measured yet: its single-stream graphs."""
    target = report.target
    for check in report.checks:
        yield ExportedNumbers(
            target=target.name,
            device="",
            runtime=target.runtime,
            threads=target.threads,
            protocol=target.protocol.name,
            precision=check.precision,
            batch=target.batches[0],
            cuda_graph=False,
            status="not measured" if check.parity.passed else "gate_failed",
            top1=check.parity.onnx_top1,
            change=check.parity.change.difference,
            change_low=check.parity.change.low,
            change_high=check.parity.change.high,
            p50_ms=None,
            p90_ms=None,
            p99_ms=None,
            samples_per_s=None,
            gross_mj=None,
            size_mb=check.bytes / 1e6,
            measured_utc=report.created_utc,
        )


def _ms(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e6


def shown_export(exported: Iterable[ExportedNumbers]) -> ExportedNumbers | None:
    """The export a table shows, all of its columns from the same one.

    One image at a time in fp32, as the accuracy beside it is fp32's; the newest that was timed.
    """
    plain = [e for e in exported if e.precision == "fp32" and not e.cuda_graph]
    first = [e for e in plain if e.batch == min(other.batch for other in plain)]
    timed = [export for export in first if export.p50_ms is not None]
    return max(timed or first, key=lambda export: export.measured_utc, default=None)
