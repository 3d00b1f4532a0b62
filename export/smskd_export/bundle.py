"""Export one student: graph, parity gate, latency, and a directory that proves them.

The steps are in the order in which they can refuse; a student that fails one leaves no bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from smskd.cost import model_cost
from smskd.errors import ConfigError, DataError, ExportError
from smskd_export.cpu_session import SCOPE, CpuSession, measure_latency
from smskd_export.latency import Flag, summarise
from smskd_export.machine import describe_machine, package_versions
from smskd_export.onnx_graph import GraphInfo, export_onnx
from smskd_export.parity import check_parity, scale, torch_logits
from smskd_export.publish import published
from smskd_export.report import SCHEMA, ExportReport, MeasuredLatency, hash_files, write_report
from smskd_export.targets import Target

GRAPH = "student.onnx"
SAMPLES = "latency_ns.npy"
_PARITY_IMAGES = 16
_QUICK = Flag(
    "quick",
    "the protocol was shortened to try things out",
    "export without the quick option before comparing latencies",
)


def export_student(
    model: nn.Module,
    *,
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    test_images: Tensor | NDArray[np.uint8],
    test_labels: Tensor | NDArray[np.int64],
    target: Target,
    out_dir: Path,
    provenance: Mapping[str, object],
    quick: bool = False,
) -> ExportReport:
    """Export ``model`` for ``target`` into the new directory ``out_dir``.

    Args:
        model: A classifier of normalised images; it is left untouched.
        name: Name of the student, for people.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        mean: Per channel, of images in 0..1.
        std: Per channel, of images in 0..1.
        test_images: The whole test set, uint8 ``(N, C, H, W)``.
        test_labels: Its classes ``(N,)``.
        target: Profile to export for.
        out_dir: Directory to make; complete afterwards, or absent.
        provenance: Whatever JSON should be remembered, e.g. the key of the training run.
        quick: Shorten the measurement and mark the report: good for a smoke test only.

    Raises:
        ConfigError: ``provenance`` is not JSON.
        DataError: the test set is not what it should be.
        ExportError: the model cannot be exported, or its graph fails a check or the parity gate.
        StoreError: ``out_dir`` exists or cannot be written.
    """
    origin = _as_json(provenance)
    images, labels = _test_set(test_images, test_labels, image_shape, num_classes)
    with published(out_dir) as folder:
        graph = export_onnx(model, image_shape, mean, std, target, folder / GRAPH)
        _check_classes(graph, num_classes)
        session = CpuSession(folder / GRAPH, target.threads)
        machine = describe_machine()
        parity = check_parity(
            model, session, images, labels, mean, std, target.parity, target.batches
        )
        parity.require()
        _write_parity_files(folder / "parity", model, images[:_PARITY_IMAGES], mean, std)
        latency = _measure(session, image_shape, target, quick, folder)
        cost = model_cost(model, image_shape)
        report = ExportReport(
            schema=SCHEMA,
            name=name,
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            quick=quick,
            target=target,
            image_shape=image_shape,
            num_classes=num_classes,
            mean=tuple(mean),
            std=tuple(std),
            parameters=cost.parameters,
            macs=cost.macs,
            graph=graph,
            parity=parity,
            latency=latency,
            not_measured="" if latency else _why_not_measured(target),
            machine=machine,
            versions=package_versions(),
            provenance=origin,
            flags=(*((_QUICK,) if quick else ()), *(latency.summary.flags if latency else ())),
            files=hash_files(folder),
        )
        write_report(folder, report)
    return report


def _measure(
    session: CpuSession,
    image_shape: tuple[int, int, int],
    target: Target,
    quick: bool,
    folder: Path,
) -> MeasuredLatency | None:
    """Time the graph and keep the raw samples, if this machine is the one to time."""
    if not target.measure_here:
        return None
    protocol = target.protocol.shortened() if quick else target.protocol
    timing = measure_latency(session, image_shape, protocol)
    np.save(folder / SAMPLES, timing.samples_ns, allow_pickle=False)
    return MeasuredLatency(
        summary=summarise(timing.samples_ns, timing.window_sizes),
        scope=SCOPE,
        batch=session.batch or 1,
        threads=target.threads,
        protocol=protocol,
        load_ns=session.load_ns,
        first_ns=timing.first_ns,
        timer_overhead_ns=timing.timer_overhead_ns,
    )


def _why_not_measured(target: Target) -> str:
    return (
        f"not measured: target {target.name!r} is timed by {target.runtime} on its own device; "
        "here the graph was made and compared with PyTorch through ONNX Runtime"
    )


def _write_parity_files(
    folder: Path,
    model: nn.Module,
    images: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Keep some inputs as the graph takes them, and PyTorch's logits, to check any runtime."""
    folder.mkdir()
    np.save(folder / "inputs.npy", scale(images), allow_pickle=False)
    np.save(folder / "logits.npy", torch_logits(model, images, mean, std), allow_pickle=False)


def _check_classes(graph: GraphInfo, num_classes: int) -> None:
    if graph.output_shape[1] != num_classes:
        raise ExportError(
            f"the model gives {graph.output_shape[1]} logits, the dataset has {num_classes} classes"
        )


def _as_json(provenance: Mapping[str, object]) -> dict[str, object]:
    """Check provenance before minutes of work, and copy it."""
    try:
        copied: dict[str, object] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance is not JSON: {error}") from error
    return copied


def _test_set(
    images: Tensor | NDArray[np.uint8],
    labels: Tensor | NDArray[np.int64],
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The test set as numpy arrays on the CPU, after a check of shapes and classes."""
    pixels: NDArray[np.uint8] = images.cpu().numpy() if isinstance(images, Tensor) else images
    classes: NDArray[np.int64] = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if pixels.shape[1:] != tuple(image_shape):
        raise DataError(f"test images have shape {pixels.shape}, expected (N, *{image_shape})")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise DataError(
            f"test labels run from {classes.min()} to {classes.max()}, "
            f"expected 0 to {num_classes - 1}"
        )
    return pixels, classes
