"""The record of one export: what ``report.json`` beside a bundle holds, field by field.

The bundle says what travels; this says how it was made and what was checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smskd_export.machine import Machine
from smskd_export.manifest import as_json
from smskd_export.parity import Parity
from smskd_export.records import read_record
from smskd_export.targets import Target
from smskd_export.tensorrt_check import TensorRtCheck

SCHEMA = 2
REPORT, BUNDLE, TEST_SET = "report.json", "bundle", "test_set"


@dataclass(frozen=True)
class SweepCheck:
    """The graph of a batch size after the first.

    Attributes:
        batch: B.
        parity: How it compares with PyTorch, on some test images.
        tensorrt: What a TensorRT here said of it; None where the target's runtime is another.
    """

    batch: int
    parity: Parity
    tensorrt: TensorRtCheck | None


@dataclass(frozen=True)
class HostCheck:
    """What was checked of one precision where it was made, whether it passed or not.

    Attributes:
        precision: Name from the profile.
        bytes: Size of the graph of the first batch size.
        parity: How that graph compares with PyTorch, on the whole test set.
        tensorrt: What a TensorRT here said of it; None where the target's runtime is another.
        sweep: The graphs of the other batch sizes; empty if the first one failed.
    """

    precision: str
    bytes: int
    parity: Parity
    tensorrt: TensorRtCheck | None
    sweep: tuple[SweepCheck, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """Everything known about one export.

    Attributes:
        schema: Version of this record.
        name: Name of the student.
        created_utc: When, ISO 8601.
        seconds: How long it took.
        bundle_id: Of the bundle beside this file.
        target: The profile, as it was applied.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        parameters: Trainable and frozen parameters of the student.
        macs: Multiply-accumulates of one image.
        torch_top1: Accuracy of the PyTorch student on the test set, in percent.
        checks: One for each precision whose graphs could be made, in the profile's order.
        left_out: Precision name to the reason why it is not in the bundle.
        machine: Where this ran.
        versions: Package name to version.
        provenance: What the caller wants to be remembered, e.g. the training run.
    """

    schema: int
    name: str
    created_utc: str
    seconds: float
    bundle_id: str
    target: Target
    image_shape: tuple[int, int, int]
    num_classes: int
    parameters: int
    macs: int
    torch_top1: float
    checks: tuple[HostCheck, ...]
    left_out: dict[str, str]
    machine: Machine
    versions: dict[str, str]
    provenance: dict[str, object]


def write_report(folder: Path, report: ExportReport) -> None:
    """Write ``report.json`` beside a bundle."""
    (folder / REPORT).write_text(as_json(report), encoding="utf-8")


def read_report(folder: Path) -> ExportReport | None:
    """Read the report of an export, or None if there is none.

    Raises:
        StoreError: the report cannot be read, or was written by another version.
    """
    again = "delete the folder and export again"
    return read_record(folder / REPORT, ExportReport, SCHEMA, again)
