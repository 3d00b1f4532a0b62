"""Export one student: graphs in every precision, gates, and a bundle that proves them.

The steps are in the order in which they can refuse; a student that fails leaves nothing behind.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from smskd.cost import model_cost
from smskd.errors import ConfigError, DataError, ExportError
from smskd_export.bundle import CLASSES, INPUTS, LOGITS, seal_bundle
from smskd_export.cpu_session import CpuSession, Floats
from smskd_export.graph_maker import GraphMaker, Student
from smskd_export.machine import describe_machine, package_versions
from smskd_export.manifest import (
    CALIBRATION,
    PROTOCOL,
    RUNNER,
    SCHEMA,
    GraphInfo,
    Manifest,
    TestSet,
)
from smskd_export.onnx_graph import write_graph
from smskd_export.parity import Parity, check_parity
from smskd_export.publish import published
from smskd_export.quantise import scales_sha256
from smskd_export.reference import scale, session_logits, torch_logits
from smskd_export.report import (
    BUNDLE,
    TEST_SET,
    ExportReport,
    HostCheck,
    SweepCheck,
    write_report,
)
from smskd_export.report import SCHEMA as REPORT_SCHEMA
from smskd_export.runner import RUNNER as RUNNER_FILE
from smskd_export.targets import Precision, Target
from smskd_export.tensorrt_check import TensorRtCheck, check_with_tensorrt
from smskd_export.test_sets import place_test_set

SPOT_CHECK = 256
"""Images that graphs of the batch sizes after the first are checked with."""


def export_student(
    model: nn.Module,
    *,
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    train_images: Tensor | NDArray[np.uint8],
    test_images: Tensor | NDArray[np.uint8],
    test_labels: Tensor | NDArray[np.int64],
    target: Target,
    out_dir: Path,
    provenance: Mapping[str, object],
    dataset: str = "",
    test_sets: Path | None = None,
) -> ExportReport:
    """Export ``model`` for ``target`` into the new directory ``out_dir``.

    It gets ``bundle/`` (for the same student the same bytes), ``test_set/`` and ``report.json``.

    Args:
        model: A classifier of normalised images; it is left untouched.
        name: Name of the student, for people.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        mean: Per channel, of images in 0..1.
        std: As mean.
        train_images: Training images, uint8 ``(N, C, H, W)``: int8 scales come from some of them.
        test_images: The whole test set, uint8 ``(N, C, H, W)``.
        test_labels: Its classes ``(N,)``.
        target: Profile to export for.
        out_dir: Directory to make; complete afterwards, or absent.
        provenance: Whatever JSON should be remembered, e.g. the key of the training run.
        dataset: Name of the data set.
        test_sets: Where test sets are kept once for many bundles.

    Raises:
        ConfigError: ``provenance`` is not JSON, or a quantiser is missing.
        DataError: the images are not what they should be.
        ExportError: the model cannot be exported, or its first precision fails.
        StoreError: ``out_dir`` exists or cannot be written.
    """
    start = time.perf_counter()
    origin = _as_json(provenance)
    pixels = _images("test", test_images, image_shape)
    labels = _labels(test_labels, len(pixels), num_classes)
    training = _images("training", train_images, image_shape)
    student = Student(model, image_shape, num_classes, tuple(mean), tuple(std), training)
    with published(out_dir) as folder:
        making = _Making(student, target, folder / BUNDLE, pixels, labels)
        making.make_graphs()
        tests = place_test_set(pixels, labels, folder / TEST_SET, test_sets)
        making.write_rest(tests)
        manifest = making.manifest(name, dataset, tests, origin)
        sealed = seal_bundle(folder / BUNDLE, manifest)
        report = _report(manifest, sealed, making.checks, time.perf_counter() - start)
        write_report(folder, report)
    return report


class _Making:
    """A bundle that is being made in ``folder``.

    Attributes:
        checks: What was checked so far.
        graphs: Those that are in the bundle so far.
        left_out: Why a precision is not in the bundle.
    """

    def __init__(
        self,
        student: Student,
        target: Target,
        folder: Path,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
    ) -> None:
        self._student, self._target, self._folder = student, target, folder
        self._images, self._labels = images, labels
        self._maker = GraphMaker(student, target)
        self._scales: dict[str, str] = {}
        self.checks: list[HostCheck] = []
        self.graphs: list[GraphInfo] = []
        self.left_out: dict[str, str] = {}

    def make_graphs(self) -> None:
        """Make, write and check the graphs of every precision; only the first one must pass."""
        (self._folder / "model").mkdir(parents=True)
        first = self._target.precisions[0]
        self._maker.make(first, self._target.batches[0])  # refuses before the test set is run
        self._logits = torch_logits(
            self._student.model, self._images, self._student.mean, self._student.std
        )
        self._classes = self._logits.argmax(axis=1)
        for precision in self._target.precisions:
            try:
                self._make_precision(precision)
            except ExportError as error:
                if precision == first:
                    raise
                self._leave_out(precision, error.message)

    def write_rest(self, tests: TestSet) -> None:
        """Write everything beside the graphs and the manifest."""
        (self._folder / "parity").mkdir()
        n = self._target.protocol.parity_images
        arrays = {
            INPUTS: scale(self._images[:n]),
            LOGITS: self._logits[:n],
            CLASSES: self._classes.astype(np.int32),
        }
        for path, array in arrays.items():
            np.save(self._folder / path, array, allow_pickle=False)
        if self._scales:
            _write_json(self._folder / CALIBRATION, self._calibration_record())
        _write_json(self._folder / PROTOCOL, self._protocol(tests))
        shutil.copyfile(RUNNER_FILE, self._folder / RUNNER)

    def manifest(
        self, name: str, dataset: str, tests: TestSet, provenance: dict[str, object]
    ) -> Manifest:
        """The manifest, without the hashes of the files."""
        student, cost = self._student, model_cost(self._student.model, self._student.image_shape)
        return Manifest(
            schema=SCHEMA,
            name=name,
            dataset=dataset,
            image_shape=student.image_shape,
            num_classes=student.num_classes,
            mean=tuple(student.mean),
            std=tuple(student.std),
            parameters=cost.parameters,
            macs=cost.macs,
            torch_top1=self._top1,
            target=self._target,
            graphs=tuple(self.graphs),
            left_out=self.left_out,
            test_set=tests,
            versions=package_versions(),
            provenance=provenance,
            files={},
        )

    @property
    def _top1(self) -> float:
        return 100.0 * float((self._classes == self._labels).mean())

    def _make_precision(self, precision: Precision) -> None:
        """Make the graphs of one precision; the check of the first one comes before the others."""
        first, *others = self._target.batches
        graph = self._write(precision, first)
        parity = self._parity(precision, graph)
        check = HostCheck(precision.name, graph.bytes, parity, self._tensorrt(precision, graph))
        self.checks.append(check)
        parity.require()
        _require_built(check.tensorrt)
        self.graphs.append(graph)
        for batch in others:
            graph = self._write(precision, batch)
            spot = self._parity(precision, graph, SPOT_CHECK)
            swept = SweepCheck(batch, spot, self._tensorrt(precision, graph))
            self.checks[-1] = replace(self.checks[-1], sweep=(*self.checks[-1].sweep, swept))
            spot.require()
            _require_built(swept.tensorrt)
            self.graphs.append(graph)

    def _write(self, precision: Precision, batch: int) -> GraphInfo:
        proto = self._maker.make(precision, batch)
        path = f"model/{precision.name}-b{batch}.onnx"
        if precision.quantised:
            self._scales[path] = scales_sha256(proto)
        info = write_graph(proto, self._folder / path, precision.name)
        return replace(info, path=path)

    def _leave_out(self, precision: Precision, reason: str) -> None:
        self.left_out[precision.name] = reason
        self.graphs = [graph for graph in self.graphs if graph.precision != precision.name]
        for batch in self._target.batches:
            path = f"model/{precision.name}-b{batch}.onnx"
            (self._folder / path).unlink(missing_ok=True)
            self._scales.pop(path, None)

    def _parity(self, precision: Precision, graph: GraphInfo, n: int | None = None) -> Parity:
        """Compare a graph with PyTorch on the first ``n`` test images, or on all."""
        got = self._run(precision, graph, self._images[:n])
        labels = self._labels[:n]
        return check_parity(self._logits[:n], got, labels, precision, accuracy=n is None)

    def _run(self, precision: Precision, graph: GraphInfo, images: NDArray[np.uint8]) -> Floats:
        """Logits of a graph; those for other processors as written, not as this one would cut."""
        as_written = precision.quantised and not _runs_here(self._target)
        session = CpuSession(self._folder / graph.path, as_written=as_written)
        return session_logits(session, images)

    def _tensorrt(self, precision: Precision, graph: GraphInfo) -> TensorRtCheck | None:
        if self._target.runtime != "tensorrt":
            return None
        return check_with_tensorrt(self._folder / graph.path, precision, self._target)

    def _calibration_record(self) -> dict[str, Any]:
        chosen = self._maker.calibration_images
        return {
            "schema": 1,
            "split": "train",
            **asdict(self._target.calibration),
            "n": len(chosen.indices),
            "of": len(self._student.train_images),
            "indices": chosen.indices,
            "pixels_sha256": chosen.sha256,
            "scales_sha256": self._scales,
        }

    def _protocol(self, tests: TestSet) -> dict[str, Any]:
        """What the runner reads."""
        target = self._target
        kept = [p for p in target.precisions if p.name not in self.left_out]
        names = ("name", "runtime", "threads", "affinity", "tf32", "workspace_mb", "opset")
        return {
            "schema": 1,
            "target": {name: getattr(target, name) for name in names},
            "protocol": asdict(target.protocol),
            "quick": asdict(target.protocol.shortened()),
            "requires": asdict(target.requires),
            "precisions": [{**asdict(p), "quantised": p.quantised} for p in kept],
            "batches": target.batches,
            "graphs": [
                {"precision": g.precision, "batch": g.batch, "path": g.path, "sha256": g.sha256}
                for g in self.graphs
            ],
            "num_classes": self._student.num_classes,
            "image_shape": self._student.image_shape,
            "torch_top1": self._top1,
            "test_set": asdict(tests),
        }


def _report(
    manifest: Manifest, sealed: str, checks: Sequence[HostCheck], seconds: float
) -> ExportReport:
    return ExportReport(
        schema=REPORT_SCHEMA,
        name=manifest.name,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        bundle_id=sealed,
        target=manifest.target,
        image_shape=manifest.image_shape,
        num_classes=manifest.num_classes,
        parameters=manifest.parameters,
        macs=manifest.macs,
        torch_top1=manifest.torch_top1,
        checks=tuple(checks),
        left_out=manifest.left_out,
        machine=describe_machine(),
        versions=manifest.versions,
        provenance=manifest.provenance,
    )


def _runs_here(target: Target) -> bool:
    """Whether devices of this target compute with the integer kernels of this processor."""
    arch = target.requires.arch
    return target.runtime == "onnxruntime" and (not arch or platform.machine() in arch)


def _require_built(check: TensorRtCheck | None) -> None:
    """Refuse a graph that a TensorRT on this machine refuses."""
    if check is not None and False in (check.parsed, check.built):
        raise ExportError(f"{check.module} {check.version} refuses the graph: {check.message}")


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _as_json(provenance: Mapping[str, object]) -> dict[str, object]:
    """Check provenance before minutes of work, and copy it."""
    try:
        copied: dict[str, object] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance is not JSON: {error}") from error
    return copied


def _images(
    which: str, images: Tensor | NDArray[np.uint8], image_shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Images as a numpy array on the CPU, after a check."""
    pixels: NDArray[np.uint8] = images.cpu().numpy() if isinstance(images, Tensor) else images
    if pixels.dtype != np.uint8 or pixels.shape[1:] != tuple(image_shape) or not len(pixels):
        raise DataError(
            f"{which} images are {pixels.dtype} {pixels.shape}, expected uint8 (N, *{image_shape})"
        )
    return pixels


def _labels(labels: Tensor | NDArray[np.int64], n: int, num_classes: int) -> NDArray[np.int64]:
    classes: NDArray[np.int64] = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if classes.shape != (n,):
        raise DataError(f"{n} test images need as many labels, not {classes.shape}")
    if not 0 <= classes.min() <= classes.max() < num_classes:
        raise DataError(
            f"test labels run from {classes.min()} to {classes.max()}, "
            f"expected 0 to {num_classes - 1}"
        )
    return classes
