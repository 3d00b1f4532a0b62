"""What ``export`` says of one student: what was made, and each precision beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smskd_export.report import ExportReport, HostCheck


def host_lines(report: ExportReport, folder: Path) -> Iterator[str]:
    """The lines above a table of measurements."""
    yield f"{report.name} -> {report.target.name}: {folder}"
    yield (
        f"  PyTorch top-1 {report.torch_top1:.2f} %, {report.parameters:,} parameters, "
        f"{report.macs:,} MACs, opset {report.target.opset}, bundle {report.bundle_id[:12]}"
    )
    for check in report.checks:
        yield f"  {_line(check, report.left_out.get(check.precision))}"
    if any(check.tensorrt for check in report.checks):
        yield f"  {_tensorrt_line(report)}"


def _line(check: HostCheck, left_out: str | None) -> str:
    parity, change = check.parity, check.parity.change
    verdict = "ok" if left_out is None else f"LEFT OUT: {left_out}"
    return (
        f"{check.precision:<10} {check.bytes / 1e6:.2f} MB, top-1 {parity.onnx_top1:.2f} % "
        f"({change.difference:+.2f} [{change.low:+.2f}, {change.high:+.2f}], p {change.p:.2g}), "
        f"agreement {parity.agreement:.2f} %, largest logit difference {parity.max_abs_diff:.1e}, "
        f"n {parity.n}: {verdict}"
    )


def _tensorrt_line(report: ExportReport) -> str:
    checks = {check.precision: check.tensorrt for check in report.checks if check.tensorrt}
    first = next(iter(checks.values()))
    if not first.module:
        return first.message
    built = [name for name, check in checks.items() if check.built]
    return f"parsed and built by {first.module} {first.version}: {', '.join(built) or 'none'}"
