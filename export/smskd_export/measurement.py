"""What a device runner brings back: ``result.json`` beside its raw samples, read and checked.

<measurement>/
result.json                          this record, written last
events.jsonl                         the runner's lines, in order of time
<row id>-host_ns.npy                 (n,) int64, every timed inference, nothing removed
<row id>-gpu_ns.npy, -enqueue_ns.npy the same by CUDA events and until the call returned
<row id>-classes.npy                 (N,) int32, predicted class of every test image
<row id>-power.csv                   time in ns, watts: of the energy pass
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smskd.errors import StoreError
from smskd_export.arrays import read_array
from smskd_export.records import read_record

SCHEMA = 1
RESULT = "result.json"

Status = Literal["ok", "gate_failed", "failed"]


@dataclass(frozen=True)
class Build:
    """How a graph became something that runs.

    Attributes:
        build_s: Seconds of building the engine; 0 if it came from the cache or needs none.
        cached: Whether it came from the cache.
        load_ns: Time to load the graph or the engine.
        first_ns: Time of the very first inference, which also sets up buffers.
        engine_sha256: Hash of the engine; builds are not the same to the bit.
        engine_bytes: Size of the engine, or of the graph where there is none.
        device_memory_bytes: Memory on the GPU that the engine asks for.
        peak_rss_bytes: Largest memory of the process so far.
        branches: Which way was taken where versions of the runtime differ.
        warnings: What the runtime complained about.
    """

    build_s: float
    cached: bool
    load_ns: int
    first_ns: int
    engine_sha256: str
    engine_bytes: int
    device_memory_bytes: int | None
    peak_rss_bytes: int | None
    branches: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceParity:
    """The graph on the device beside PyTorch's logits.

    Attributes:
        n: Number of images.
        max_abs_diff: Largest difference of any logit; infinite or NaN is written as 1e308.
        mean_abs_diff: Mean difference.
        min_cosine: Smallest cosine of two logit vectors.
        agreement: Images with the same predicted class, in percent.
    """

    n: int
    max_abs_diff: float
    mean_abs_diff: float
    min_cosine: float
    agreement: float


@dataclass(frozen=True)
class DeviceAccuracy:
    """Accuracy by the very object that was timed.

    Attributes:
        n: Number of images.
        top1: Percent.
        top5: Percent; None where there are fewer than 6 classes.
        agreement: Images with the same predicted class as PyTorch, in percent.
        classes_file: Predicted classes ``(N,)``.
    """

    n: int
    top1: float
    top5: float | None
    agreement: float
    classes_file: str


@dataclass(frozen=True)
class Samples:
    """Where the raw times of one row lie.

    Attributes:
        host_file: Host clock, call to result on the host.
        gpu_file: CUDA events around the work; None without a GPU.
        enqueue_file: Host clock until the call that starts the work returned; None without a GPU.
        window_sizes: Samples of each window; their sum is n.
        timer_overhead_ns: Median time between two readings of the clock with nothing between.
        warmup_runs: Inferences before the first window.
        warmup_s: Seconds of them.
        scope: What one sample includes.
    """

    host_file: str
    gpu_file: str | None
    enqueue_file: str | None
    window_sizes: tuple[int, ...]
    timer_overhead_ns: int
    warmup_runs: int
    warmup_s: float
    scope: str


@dataclass(frozen=True)
class Energy:
    """The energy pass: a run of its own, because sampling power costs time.

    Attributes:
        source: ``ina3221``, ``tegrastats``, ``nvml`` or ``rapl``.
        rails: What was summed.
        interval_ms: Between two samples.
        samples: Power samples of the busy part.
        idle_w: Mean power before.
        active_w: Mean power during.
        inferences: Number in the busy part.
        gross_mj: Millijoule an inference (of the row's batch), all power counted.
        net_mj: The same above idle.
        p50_ns: Median latency of this pass.
        power_file: Raw samples.
    """

    source: str
    rails: tuple[str, ...]
    interval_ms: float
    samples: int
    idle_w: float
    active_w: float
    inferences: int
    gross_mj: float
    net_mj: float
    p50_ns: int
    power_file: str


@dataclass(frozen=True)
class DeviceRow:
    """One precision at one batch size.

    Attributes:
        id: ``<precision>-b<batch>`` and ``-graph`` where a CUDA graph was replayed.
        precision: Name from the profile.
        batch: Images an inference.
        scenario: ``single_stream`` for the first batch size, ``sweep`` for the others.
        cuda_graph: Whether the inference was captured and replayed.
        status: ``ok``, or which end it came to; only an ``ok`` row has samples.
        reason: Why, if it is not ok.
        graph_sha256: Of the ONNX file.
        build: None if it was never built.
        parity: None if it never ran.
        accuracy: None where no test set was there, and for the sweep.
        samples: None unless ``ok``.
        energy: None where power cannot be read, or was not asked for.
    """

    id: str
    precision: str
    batch: int
    scenario: Literal["single_stream", "sweep"]
    cuda_graph: bool
    status: Status
    reason: str
    graph_sha256: str
    build: Build | None
    parity: DeviceParity | None
    accuracy: DeviceAccuracy | None
    samples: Samples | None
    energy: Energy | None


@dataclass(frozen=True)
class Probe:
    """The device at one moment. What cannot be read is None or empty.

    Attributes:
        utc: When, ISO 8601.
        arch: Instruction set.
        board: Name of the board or computer.
        cpu: Name of the processor.
        cores: Cores this process may run on.
        os: Name and release of the system.
        kernel: Kernel release.
        l4t: Release of Linux for Tegra.
        python: Version.
        numpy: Version.
        runtime: ``onnxruntime`` or ``tensorrt``.
        runtime_version: Its version.
        cuda: Version of the CUDA runtime.
        gpu: Name of the GPU.
        compute_capability: As "8.7".
        memory_total_mb: Of the machine.
        memory_free_mb: Available now.
        gpu_memory_free_mb: Free on the GPU.
        disk_free_mb: Where the bundle lies.
        power_mode: Name of the nvpmodel mode.
        power_modes: Those on offer, "0=15W".
        clocks_locked: Whether the clocks are held.
        clocks_khz: Current frequencies by name.
        temperatures_c: By sensor.
        throttle_counts: Events so far, by counter.
        load_1min: Runnable processes, averaged over the last minute.
        gpu_processes: Others on the GPU, as "pid name".
        emulated: Whether the processor is imitated; then times mean nothing.
    """

    utc: str
    arch: str
    board: str
    cpu: str
    cores: int
    os: str
    kernel: str
    l4t: str
    python: str
    numpy: str
    runtime: str
    runtime_version: str
    cuda: str
    gpu: str
    compute_capability: str
    memory_total_mb: int | None
    memory_free_mb: int | None
    gpu_memory_free_mb: int | None
    disk_free_mb: int | None
    power_mode: str
    power_modes: tuple[str, ...]
    clocks_locked: bool | None
    clocks_khz: dict[str, int]
    temperatures_c: dict[str, float]
    throttle_counts: dict[str, int]
    load_1min: float | None
    gpu_processes: tuple[str, ...]
    emulated: bool


@dataclass(frozen=True)
class Measurement:
    """Everything one run of the runner brought back.

    Attributes:
        schema: Version of this record.
        bundle_id: Of the bundle.
        runner_sha256: Of the runner that ran.
        protocol: Name of the protocol; ``quick`` is never ranked.
        threads: CPU threads of the runtime.
        affinity: Cores it was held to; empty: any.
        started_utc: When, ISO 8601.
        ended_utc: When, ISO 8601.
        allowed: Codes of requirements that were not met and waived by the user.
        before: The device before.
        after: The device after.
        rows: One for each precision, batch size and way to run.
        files: SHA-256 of every other file, by name.
        aborted: Why it stopped early; empty if it did not.
    """

    schema: int
    bundle_id: str
    runner_sha256: str
    protocol: str
    threads: int
    affinity: tuple[int, ...]
    started_utc: str
    ended_utc: str
    allowed: tuple[str, ...]
    before: Probe
    after: Probe
    rows: tuple[DeviceRow, ...]
    files: dict[str, str] = field(default_factory=dict)
    aborted: str = ""

    @property
    def quick(self) -> bool:
        """Whether the protocol was shortened."""
        return self.protocol == "quick"


def read_measurement(folder: Path) -> Measurement | None:
    """Read and check what a runner left in ``folder``; None if it did not finish.

    Raises:
        StoreError: the record is damaged, newer than this program, or its files were changed.
    """
    again = "delete the folder and measure again"
    found = read_record(folder / RESULT, Measurement, SCHEMA, again)
    if found is not None:
        _check_files(folder, found, again)
    return found


def _check_files(folder: Path, found: Measurement, again: str) -> None:
    for name, digest in found.files.items():
        if Path(name).name != name:
            raise StoreError(f"{folder / RESULT} is damaged: {name!r} is no plain file name", again)
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise StoreError(f"{folder / name} is missing: {error.strerror}", again) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{folder / name} is not the file that was measured", again)
    used = {name for row in found.rows for name in _names(row)}
    if unknown := used - found.files.keys():
        text = f"it speaks of {min(unknown)!r}, which is none of its files"
        raise StoreError(f"{folder / RESULT} is damaged: {text}", again)


def _names(row: DeviceRow) -> Iterator[str]:
    """Files that a row is read from."""
    if row.accuracy is not None:
        yield row.accuracy.classes_file
    if row.samples is not None:
        files = (row.samples.host_file, row.samples.gpu_file, row.samples.enqueue_file)
        yield from filter(None, files)


def load_samples(folder: Path, name: str) -> NDArray[np.int64]:
    """Raw times ``(n,)`` of a row, in nanoseconds.

    Raises:
        StoreError: the file is no list of integers.
    """
    samples = read_array(folder / name, "measure again")
    if samples.ndim != 1 or samples.dtype != np.int64:
        raise StoreError(f"{folder / name} holds {samples.dtype} {samples.shape}, not times")
    return samples
