"""smskd_export: from a trained student to a bundle, a device, and numbers that can be trusted.

The names below are loaded when first used, so that reading a target profile or measuring a bundle
needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smskd_export.archive import OpenedBundle, open_bundle, write_archive
    from smskd_export.bundle import verify_bundle
    from smskd_export.judging import Judged, JudgedRow, judge, read_judged
    from smskd_export.latency import Flag, LatencySummary, percentile_bound, summarise
    from smskd_export.manifest import GraphInfo, Manifest, read_manifest
    from smskd_export.measurement import Measurement, read_measurement
    from smskd_export.measuring import measure, probe
    from smskd_export.onnx_graph import export_onnx
    from smskd_export.paired import PairedChange, paired_change
    from smskd_export.report import ExportReport, read_report
    from smskd_export.student_export import export_student
    from smskd_export.targets import Precision, Protocol, Target, list_targets, load_target

_HOME = {
    "OpenedBundle": "archive",
    "open_bundle": "archive",
    "write_archive": "archive",
    "verify_bundle": "bundle",
    "export_student": "student_export",
    "Judged": "judging",
    "JudgedRow": "judging",
    "judge": "judging",
    "read_judged": "judging",
    "Flag": "latency",
    "LatencySummary": "latency",
    "percentile_bound": "latency",
    "summarise": "latency",
    "GraphInfo": "manifest",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "Measurement": "measurement",
    "read_measurement": "measurement",
    "measure": "measuring",
    "probe": "measuring",
    "export_onnx": "onnx_graph",
    "PairedChange": "paired",
    "paired_change": "paired",
    "ExportReport": "report",
    "read_report": "report",
    "Precision": "targets",
    "Protocol": "targets",
    "Target": "targets",
    "list_targets": "targets",
    "load_target": "targets",
}

__all__ = [
    "ExportReport",
    "Flag",
    "GraphInfo",
    "Judged",
    "JudgedRow",
    "LatencySummary",
    "Manifest",
    "Measurement",
    "OpenedBundle",
    "PairedChange",
    "Precision",
    "Protocol",
    "Target",
    "export_onnx",
    "export_student",
    "judge",
    "list_targets",
    "load_target",
    "measure",
    "open_bundle",
    "paired_change",
    "percentile_bound",
    "probe",
    "read_judged",
    "read_manifest",
    "read_measurement",
    "read_report",
    "summarise",
    "verify_bundle",
    "write_archive",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
