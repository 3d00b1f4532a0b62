"""smskd_export: from a trained student to a checked ONNX graph with an honest latency.

The names below are loaded when first used, so that reading a target profile needs neither torch
nor ONNX Runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smskd_export.bundle import export_student
    from smskd_export.cpu_session import CpuSession, Timing, measure_latency
    from smskd_export.latency import Flag, LatencySummary, percentile_bound, summarise
    from smskd_export.onnx_graph import GraphInfo, export_onnx
    from smskd_export.parity import Parity, check_parity
    from smskd_export.report import ExportReport, MeasuredLatency, read_report, verify_bundle
    from smskd_export.targets import ParityThresholds, Protocol, Target, list_targets, load_target

_HOME = {
    "export_student": "bundle",
    "CpuSession": "cpu_session",
    "Timing": "cpu_session",
    "measure_latency": "cpu_session",
    "Flag": "latency",
    "LatencySummary": "latency",
    "percentile_bound": "latency",
    "summarise": "latency",
    "GraphInfo": "onnx_graph",
    "export_onnx": "onnx_graph",
    "Parity": "parity",
    "check_parity": "parity",
    "ExportReport": "report",
    "MeasuredLatency": "report",
    "read_report": "report",
    "verify_bundle": "report",
    "ParityThresholds": "targets",
    "Protocol": "targets",
    "Target": "targets",
    "list_targets": "targets",
    "load_target": "targets",
}

__all__ = [
    "CpuSession",
    "ExportReport",
    "Flag",
    "GraphInfo",
    "LatencySummary",
    "MeasuredLatency",
    "Parity",
    "ParityThresholds",
    "Protocol",
    "Target",
    "Timing",
    "check_parity",
    "export_onnx",
    "export_student",
    "list_targets",
    "load_target",
    "measure_latency",
    "percentile_bound",
    "read_report",
    "summarise",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
