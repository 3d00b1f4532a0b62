"""Which training images int8 scales come from, and what values the activations take on them."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, create_calibrator

from smskd.errors import DataError, ExportError
from smskd_export.targets import Calibration

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
_AT_A_TIME = 32
"""Images whose activations are held in memory together."""


@dataclass(frozen=True)
class CalibrationImages:
    """Training images, chosen once and for all.

    Attributes:
        indices: Their positions in the training set, in order of use.
        sha256: Hash of their pixels in this order.
        pixels: uint8 ``(n, C, H, W)``.
    """

    indices: tuple[int, ...]
    sha256: str
    pixels: NDArray[np.uint8]


def choose_images(train_images: NDArray[np.uint8], calibration: Calibration) -> CalibrationImages:
    """The first images of a permutation of the training set that depends on the seed only.

    A training set with fewer images than asked for gives all it has.

    Args:
        train_images: All of them, uint8 ``(N, C, H, W)``.
        calibration: How many, and the seed.

    Raises:
        DataError: they are not images.
    """
    if train_images.dtype != np.uint8 or train_images.ndim != 4 or not len(train_images):
        raise DataError(
            "training images must be uint8 of shape (N, C, H, W), "
            f"not {train_images.dtype} {train_images.shape}"
        )
    order = np.random.default_rng(calibration.seed).permutation(len(train_images))
    chosen = order[: calibration.n]
    pixels = np.ascontiguousarray(train_images[chosen])
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return CalibrationImages(tuple(chosen.tolist()), digest, pixels)


class _Reader:
    """Hands out batches the way ONNX Runtime's calibrators ask for them."""

    def __init__(self, name: str, batches: Iterator[NDArray[np.float32]]) -> None:
        self._name, self._batches = name, batches

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, or None after the last one."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def observe(
    proto: Any, images: NDArray[np.uint8], calibration: Calibration, operators: Sequence[str]
) -> Any:
    """Ranges (ONNX Runtime's ``TensorsData``) of what goes into and out of some operators.

    It runs with one thread, so that the ranges are the same on every machine of a kind.

    Args:
        proto: The graph, with a fixed batch size.
        images: uint8 ``(n, C, H, W)``.
        calibration: Says the method.
        operators: Names of the operators.

    Raises:
        ExportError: the graph does not run.
    """
    name, batch = proto.graph.input[0].name, _batch_of(proto)
    with tempfile.TemporaryDirectory(prefix="smskd-calibration-") as folder, quiet():
        plain, observed = Path(folder) / "graph.onnx", Path(folder) / "observed.onnx"
        onnx.save(proto, plain)
        try:
            calibrator = create_calibrator(
                plain,
                list(operators),
                augmented_model_path=str(observed),
                calibrate_method=_METHODS[calibration.method],
            )
            calibrator.infer_session = _session(observed)
            for part in _parts(images, batch):
                calibrator.collect_data(_Reader(name, iter(part)))
            return calibrator.compute_data()
        except Exception as error:  # those of ONNX Runtime have no base class of their own
            raise ExportError(f"the graph cannot be calibrated: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantiser's advice and progress off the terminal."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, ["CPUExecutionProvider"])


def _batch_of(proto: Any) -> int:
    size: int = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return size


def _parts(images: NDArray[np.uint8], batch: int) -> Iterator[list[NDArray[np.float32]]]:
    """Lists of whole batches; the last one is filled up with images from the front."""
    padded = np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))
    batches = padded.reshape(-1, batch, *images.shape[1:])
    step = max(1, _AT_A_TIME // batch)
    for start in range(0, len(batches), step):
        part = batches[start : start + step]
        yield [one.astype(np.float32) / np.float32(255) for one in part]
