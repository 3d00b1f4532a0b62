"""The record of one export: what ``report.json`` in a bundle holds, field by field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from smskd.errors import StoreError
from smskd_export.latency import Flag, LatencySummary
from smskd_export.machine import Machine
from smskd_export.onnx_graph import GraphInfo
from smskd_export.parity import Parity
from smskd_export.targets import Protocol, Target

SCHEMA = 1
REPORT = "report.json"


@dataclass(frozen=True)
class MeasuredLatency:
    """A latency with everything that must be known to read it.

    Attributes:
        summary: The numbers.
        scope: What one sample includes.
        batch: Images an inference.
        threads: Threads of the runtime.
        protocol: How long was measured, as it was applied.
        load_ns: Time to load the graph.
        first_ns: Time of the very first inference.
        timer_overhead_ns: What one reading of the clock adds to a sample.
    """

    summary: LatencySummary
    scope: str
    batch: int
    threads: int
    protocol: Protocol
    load_ns: int
    first_ns: int
    timer_overhead_ns: int


@dataclass(frozen=True)
class ExportReport:
    """Everything known about one exported student.

    Attributes:
        schema: Version of this record.
        name: Name of the student.
        created_utc: When, ISO 8601.
        quick: Whether the protocol was shortened; such a latency is never ranked.
        target: The profile, as it was applied.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        mean: Per channel, of images in 0..1; it is inside the graph.
        std: As mean.
        parameters: Trainable and frozen parameters of the student.
        macs: Multiply-accumulates of one image.
        graph: What the ONNX file holds.
        parity: How the graph compares with PyTorch; always a passed one.
        latency: The measurement, or None.
        not_measured: Why there is no latency; empty if there is one.
        machine: Where this ran.
        versions: Package name to version.
        provenance: What the caller wants to be remembered, e.g. the training run.
        flags: Doubts, in words.
        files: SHA-256 of every other file of the bundle, by path.
    """

    schema: int
    name: str
    created_utc: str
    quick: bool
    target: Target
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int
    macs: int
    graph: GraphInfo
    parity: Parity
    latency: MeasuredLatency | None
    not_measured: str
    machine: Machine
    versions: dict[str, str]
    provenance: dict[str, object]
    flags: tuple[Flag, ...]
    files: dict[str, str]


def write_report(folder: Path, report: ExportReport) -> None:
    """Write ``report.json`` into a bundle."""
    text = json.dumps(asdict(report), indent=2, sort_keys=True, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> ExportReport | None:
    """Read the report of a bundle, or None if there is no bundle.

    Raises:
        StoreError: the report cannot be read, or was written by a newer version.
    """
    path = folder / REPORT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged: {error}", "delete the bundle and export again"
        ) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreError(
            f"{path} has schema {schema}, this program reads {SCHEMA}", "update smskd-bench"
        )
    try:
        return TypeAdapter(ExportReport).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{path} is damaged: {where}: {first['msg']}", "delete the bundle and export again"
        ) from error


def verify_bundle(folder: Path) -> ExportReport:
    """Check that every file of a bundle is the one its report speaks of.

    Raises:
        StoreError: there is no bundle, or a file is missing or was changed.
    """
    report = read_report(folder)
    if report is None:
        raise StoreError(f"{folder} holds no export", "run the export first")
    now = hash_files(folder)
    changed = sorted(
        p for p in report.files.keys() | now.keys() if report.files.get(p) != now.get(p)
    )
    if changed:
        raise StoreError(
            f"{folder}: missing, changed or unknown files: {', '.join(changed)}",
            "delete the bundle and export again",
        )
    return report


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` except the report, by path with forward slashes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }
    hashes.pop(REPORT, None)
    return hashes
