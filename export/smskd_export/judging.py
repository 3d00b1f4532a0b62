"""From raw samples to the rows of a table: statistics, paired accuracy, and every doubt in words.

The runner brings facts; what they are worth is decided here, once, and kept as ``judged.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smskd.atomic import write_json
from smskd.errors import StoreError
from smskd_export.arrays import read_array
from smskd_export.latency import Flag, LatencySummary, summarise
from smskd_export.manifest import GraphInfo, Manifest, as_json
from smskd_export.measurement import DeviceRow, Measurement, Probe, load_samples
from smskd_export.paired import PairedChange, paired_change
from smskd_export.records import read_record

SCHEMA = 1
JUDGED = "judged.json"

ENQUEUE_LIMIT = 0.8
"""A launch that takes this share of the GPU's time is the bottleneck; trtexec's limit."""
TIMER_LIMIT = 0.01
"""Share of the median that reading the clock may cost."""
CLOCK_LIMIT = 0.02
"""Locked clocks that differ by more before and after were not locked."""

Classes = NDArray[np.int32]


@dataclass(frozen=True)
class JudgedRow:
    """One row of the table.

    Attributes:
        precision: Name from the profile.
        batch: Images an inference.
        scenario: ``single_stream`` or ``sweep``.
        cuda_graph: Whether a CUDA graph was replayed.
        status: ``ok``, ``gate_failed`` or ``failed``; only ``ok`` rows have times.
        reason: Why, if it is not ok.
        top1: Accuracy on the device, in percent; None where it was not measured.
        change: Against PyTorch on the same images; None without accuracy.
        host: Host times of one inference.
        gpu: Times on the GPU; None without one.
        samples_per_s: Images in the windows by their time.
        gross_mj: Energy of one inference; None where power was not read.
        net_mj: The same above idle.
        size_mb: Of the ONNX file, in 10^6 bytes.
        build_s: Seconds of building the engine.
        flags: Doubts.
    """

    precision: str
    batch: int
    scenario: str
    cuda_graph: bool
    status: str
    reason: str
    top1: float | None
    change: PairedChange | None
    host: LatencySummary | None
    gpu: LatencySummary | None
    samples_per_s: float | None
    gross_mj: float | None
    net_mj: float | None
    size_mb: float
    build_s: float | None
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class Judged:
    """A measurement as tables show it.

    Attributes:
        schema: Version of this record.
        name: Name of the student.
        key: Key of the stage run that made it; empty if the bundle does not say.
        bundle_id: Of the bundle.
        target: Name of the target profile.
        runtime: What executed it, with version.
        threads: CPU threads.
        protocol: Name of the protocol.
        device: How the device was reached: "local" or "user@host".
        board: What the device says it is.
        measured_utc: When it ended, ISO 8601.
        torch_top1: Accuracy of the PyTorch student, in percent.
        parameters: Of the student.
        macs: Of one image.
        rankable: Whether a leaderboard may show it beside others: the whole protocol, nothing
            waived, no imitated processor, not stopped early.
        rows: In the order of the profile.
    """

    schema: int
    name: str
    key: str
    bundle_id: str
    target: str
    runtime: str
    threads: int
    protocol: str
    device: str
    board: str
    measured_utc: str
    torch_top1: float
    parameters: int
    macs: int
    rankable: bool
    rows: tuple[JudgedRow, ...]


def judge(
    manifest: Manifest,
    found: Measurement,
    folder: Path,
    device: str,
    labels: NDArray[np.int64] | None,
    torch_classes: Classes,
) -> Judged:
    """Judge what a runner left in ``folder``.

    Args:
        manifest: Of the bundle that was measured.
        found: What :func:`smskd_export.measurement.read_measurement` read there.
        folder: Holds the raw samples.
        device: How it was reached, for people.
        labels: Classes of the test images ``(N,)``; None if there was no test set.
        torch_classes: PyTorch's predictions of them ``(N,)``.

    Raises:
        StoreError: a file is damaged.
    """
    common = tuple(_machine_flags(manifest, found))
    rows = [
        _judge_row(row, _graph_of(manifest, row), folder, common, labels, torch_classes)
        for row in found.rows
    ]
    before = found.before
    return Judged(
        schema=SCHEMA,
        name=manifest.name,
        key=str(manifest.provenance.get("key", "")),
        bundle_id=found.bundle_id,
        target=manifest.target.name,
        runtime=f"{before.runtime} {before.runtime_version}",
        threads=found.threads,
        protocol=found.protocol,
        device=device,
        board=before.board or before.cpu,
        measured_utc=found.ended_utc,
        torch_top1=manifest.torch_top1,
        parameters=manifest.parameters,
        macs=manifest.macs,
        rankable=not (found.quick or found.allowed or before.emulated or found.aborted),
        rows=tuple(rows),
    )


def write_judged(folder: Path, judged: Judged) -> None:
    """Keep the verdict beside the samples; its presence means that a measurement is complete."""
    write_json(folder / JUDGED, json.loads(as_json(judged)))


def read_judged(folder: Path) -> Judged | None:
    """Read the verdict of a measurement, or None if there is none.

    Raises:
        StoreError: it is damaged, or newer than this program.
    """
    return read_record(folder / JUDGED, Judged, SCHEMA, "delete the folder, measure again")


def _graph_of(manifest: Manifest, row: DeviceRow) -> GraphInfo:
    for graph in manifest.graphs:
        if (graph.precision, graph.batch) == (row.precision, row.batch):
            return graph
    raise StoreError(
        f"the measurement has a row {row.id!r} that its bundle knows nothing of", "measure again"
    )


def _judge_row(
    row: DeviceRow,
    graph: GraphInfo,
    folder: Path,
    common: tuple[Flag, ...],
    labels: NDArray[np.int64] | None,
    torch_classes: Classes,
) -> JudgedRow:
    host = _summary(row, folder, row.samples.host_file if row.samples else None)
    gpu = _summary(row, folder, row.samples.gpu_file if row.samples else None)
    flags = [*common, *_row_flags(row, folder, host, gpu)] if row.status == "ok" else []
    return JudgedRow(
        precision=row.precision,
        batch=row.batch,
        scenario=row.scenario,
        cuda_graph=row.cuda_graph,
        status=row.status,
        reason=row.reason,
        top1=row.accuracy.top1 if row.accuracy else None,
        change=_change(row, folder, labels, torch_classes),
        host=host,
        gpu=gpu,
        samples_per_s=row.batch * 1e9 / host.mean_ns if host else None,
        gross_mj=row.energy.gross_mj if row.energy else None,
        net_mj=row.energy.net_mj if row.energy else None,
        size_mb=graph.bytes / 1e6,
        build_s=row.build.build_s if row.build else None,
        flags=tuple(flags),
    )


def _summary(row: DeviceRow, folder: Path, name: str | None) -> LatencySummary | None:
    if row.samples is None or name is None:
        return None
    samples = load_samples(folder, name)
    try:
        return summarise(samples, row.samples.window_sizes)
    except ValueError as error:
        raise StoreError(f"{folder / name} is damaged: {error}", "measure again") from error


def _change(
    row: DeviceRow,
    folder: Path,
    labels: NDArray[np.int64] | None,
    torch_classes: Classes,
) -> PairedChange | None:
    if row.accuracy is None or labels is None:
        return None
    path = folder / row.accuracy.classes_file
    classes = read_array(path, "measure again")
    if not classes.shape == labels.shape == torch_classes.shape:
        raise StoreError(f"{path} has {classes.shape} classes, the test set {labels.shape}")
    return paired_change(classes == labels, torch_classes == labels)


def _machine_flags(manifest: Manifest, found: Measurement) -> list[Flag]:
    """Doubts that concern every row."""
    before, after = found.before, found.after
    flags = [_waived(code, before) for code in found.allowed]
    if found.quick:
        flags.append(
            Flag("quick", "the protocol was shortened", "measure without --quick before comparing")
        )
    if before.emulated:
        flags.append(
            Flag("emulated", "the processor is imitated", "times mean nothing; use a real device")
        )
    if found.aborted:
        flags.append(Flag("aborted", f"stopped early: {found.aborted}", "measure again"))
    if hot := sorted(k for k, n in after.throttle_counts.items() if n > _count(before, k)):
        flags.append(
            Flag(
                "thermal",
                f"the device throttled while measuring ({', '.join(hot)})",
                "cool it, or choose a lower power mode",
            )
        )
    flags += _clock_flags(manifest, before, after)
    if (before.load_1min or 0.0) >= before.cores:
        flags.append(
            Flag(
                "busy",
                f"{before.load_1min:.1f} programs were running on {before.cores} cores",
                "stop other programs and measure again",
            )
        )
    if after.gpu_processes and "gpu_processes" not in found.allowed:
        flags.append(
            Flag(
                "foreign_process",
                f"others were on the GPU afterwards: {', '.join(after.gpu_processes)}",
                "stop them and measure again",
            )
        )
    return flags


def _clock_flags(manifest: Manifest, before: Probe, after: Probe) -> list[Flag]:
    flags = []
    if before.power_mode != after.power_mode:
        flags.append(
            Flag(
                "power_mode_mismatch",
                f"the power mode went from {before.power_mode!r} to {after.power_mode!r}",
                "leave it alone while measuring",
            )
        )
    if manifest.target.requires.clocks_locked:
        moved = sorted(
            name
            for name, khz in before.clocks_khz.items()
            if khz and abs(after.clocks_khz.get(name, khz) - khz) > CLOCK_LIMIT * khz
        )
        if moved:
            flags.append(
                Flag(
                    "clock_drift",
                    f"clocks changed while measuring: {', '.join(moved)}",
                    "run jetson_clocks, and check the temperature",
                )
            )
    return flags


def _count(probe: Probe, counter: str) -> int:
    return probe.throttle_counts.get(counter, 0)


def _waived(code: str, before: Probe) -> Flag:
    seen = {
        "power_mode": f"the power mode is {before.power_mode!r}",
        "arch": f"the device is {before.arch}",
        "board": f"the board is {before.board!r}",
        "runtime_version": f"the runtime is {before.runtime} {before.runtime_version}",
        "compute_capability": f"the GPU has compute capability {before.compute_capability}",
    }
    message = seen.get(code, f"requirement {code} is not met")
    return Flag(f"{code}_waived", f"{message}, other than the target asks for", "never ranked")


def _row_flags(
    row: DeviceRow, folder: Path, host: LatencySummary | None, gpu: LatencySummary | None
) -> list[Flag]:
    flags = list(host.flags) if host else []
    if row.scenario == "single_stream" and row.accuracy is None:
        flags.append(
            Flag("no_accuracy", "accuracy was not measured", "give the test set with --test-set")
        )
    if host and row.samples and row.samples.timer_overhead_ns > TIMER_LIMIT * host.p50_ns:
        share = row.samples.timer_overhead_ns / host.p50_ns
        flags.append(
            Flag("timer", f"reading the clock is {share:.1%} of the median", "use a larger batch")
        )
    if gpu and row.samples and row.samples.enqueue_file and not row.cuda_graph:
        enqueue = float(np.median(load_samples(folder, row.samples.enqueue_file)))
        if enqueue > ENQUEUE_LIMIT * gpu.p50_ns:
            flags.append(
                Flag(
                    "enqueue_bound",
                    "starting the work takes longer than the work",
                    "read the CUDA graph row, or use a larger batch",
                )
            )
    return flags
