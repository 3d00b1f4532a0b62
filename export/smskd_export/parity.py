"""Does the graph still say what the PyTorch model says? A gate before any speed is reported.

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from smskd.errors import DataError, ExportError
from smskd_export.onnx_graph import frozen_copy
from smskd_export.targets import ParityThresholds

Floats = NDArray[np.float32]

_TORCH_BATCH = 250
_SPOT_CHECK = 256


class Session(Protocol):
    """Anything that executes a graph."""

    batch: int | None

    def run(self, images: Floats) -> Floats:
        """Map images ``(B, C, H, W)`` in 0..1 to logits ``(B, K)``."""


@dataclass(frozen=True)
class Parity:
    """How the graph compares with the PyTorch model on a test set.

    Attributes:
        n: Number of images.
        torch_top1: Accuracy of the PyTorch model, in percent.
        onnx_top1: Accuracy of the graph, in percent.
        agreement: Images on which both predict the same class, in percent.
        max_abs_diff: Largest difference of any logit.
        mean_abs_diff: Mean difference of the logits.
        min_cosine: Smallest cosine between the two logit vectors of an image.
        passed: The verdict.
        reason: Why the verdict is what it is.
    """

    n: int
    torch_top1: float
    onnx_top1: float
    agreement: float
    max_abs_diff: float
    mean_abs_diff: float
    min_cosine: float
    passed: bool
    reason: str

    def require(self) -> None:
        """Do nothing if the gate was passed.

        Raises:
            ExportError: it was not.
        """
        if not self.passed:
            raise ExportError(
                f"the exported graph does not repeat the PyTorch model: {self.reason}",
                "no latency is reported for a wrong graph; check mean and std, and that the model "
                "computes the same twice in evaluation mode",
            )


def check_parity(
    model: nn.Module,
    session: Session,
    images_u8: NDArray[np.uint8],
    labels: NDArray[np.int64],
    mean: Sequence[float],
    std: Sequence[float],
    thresholds: ParityThresholds,
    batches: Sequence[int] = (64, 1),
) -> Parity:
    """Compare the graph with the model on all images.

    The largest of ``batches`` runs over all images; every smaller one repeats the first 256, so
    that the code path that is timed is also one that was checked. A graph with a fixed batch size
    runs at that size. Use :meth:`Parity.require` to turn a failed verdict into an error.

    Args:
        model: The classifier of normalised images that was exported; it is left untouched.
        session: Executes the exported graph.
        images_u8: Test images ``(N, C, H, W)``, uint8.
        labels: Their classes ``(N,)``.
        mean: Per channel, of images in 0..1.
        std: Per channel, of images in 0..1.
        thresholds: What still counts as the same.
        batches: Batch sizes to run a graph at whose batch size is free.

    Raises:
        DataError: the images or labels are not what they should be.
    """
    _check_data(images_u8, labels)
    reference = torch_logits(model, images_u8, mean, std)
    sizes = [session.batch] if session.batch else sorted(set(batches), reverse=True)
    got = session_logits(session, images_u8, sizes[0])
    spots = [session_logits(session, images_u8[:_SPOT_CHECK], size) for size in sizes[1:]]
    with np.errstate(invalid="ignore", over="ignore"):  # a graph may say inf: that is a verdict
        worst_spot = float(np.max([0.0, *(_max_diff(s, reference[: len(s)]) for s in spots)]))
        return _compare(reference, got, labels, thresholds, worst_spot)


def scale(images_u8: NDArray[np.uint8]) -> Floats:
    """Images as the graph takes them: float32 in 0..1."""
    return images_u8.astype(np.float32) / np.float32(255)


def torch_logits(
    model: nn.Module, images_u8: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> Floats:
    """Logits ``(N, K)`` of the model in float32 on the CPU, normalised outside of any graph."""
    frozen = frozen_copy(model)
    mean_t, std_t = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
    with torch.no_grad():
        parts = [
            frozen((torch.from_numpy(scale(part)) - mean_t) / std_t)
            for part in np.split(images_u8, range(_TORCH_BATCH, len(images_u8), _TORCH_BATCH))
        ]
    logits: Floats = torch.cat(parts).numpy()
    return logits


def session_logits(session: Session, images_u8: NDArray[np.uint8], batch: int) -> Floats:
    """Logits ``(N, K)`` of the graph, run ``batch`` images at a time."""
    parts = []
    for start in range(0, len(images_u8), batch):
        part = scale(images_u8[start : start + batch])
        missing = batch - len(part) if session.batch else 0
        full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(session.run(full)[: len(part)])
    return np.concatenate(parts)


def _compare(
    reference: Floats,
    got: Floats,
    labels: NDArray[np.int64],
    thresholds: ParityThresholds,
    worst_spot: float,
) -> Parity:
    ref_class, got_class = reference.argmax(axis=1), got.argmax(axis=1)
    agreement = _percent(ref_class == got_class)
    max_diff = float(np.maximum(_max_diff(got, reference), worst_spot))  # keeps a NaN
    problems = _problems(max_diff, agreement, thresholds)
    within = f"logits within {thresholds.max_abs_diff:g}, agreement {agreement:.2f} %"
    return Parity(
        n=len(labels),
        torch_top1=_percent(ref_class == labels),
        onnx_top1=_percent(got_class == labels),
        agreement=agreement,
        max_abs_diff=max_diff,
        mean_abs_diff=float(np.abs(got - reference).mean()),
        min_cosine=_min_cosine(got, reference),
        passed=not problems,
        reason="; ".join(problems) or within,
    )


def _problems(max_diff: float, agreement: float, thresholds: ParityThresholds) -> list[str]:
    problems = []
    if not np.isfinite(max_diff):
        problems.append("some logits are not finite")
    elif max_diff > thresholds.max_abs_diff:
        problems.append(f"a logit differs by {max_diff:.3g} (limit {thresholds.max_abs_diff:g})")
    if agreement < thresholds.min_agreement:
        problems.append(
            f"both predict the same class for {agreement:.2f} % of the images "
            f"(limit {thresholds.min_agreement:g} %)"
        )
    return problems


def _max_diff(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).max())


def _min_cosine(a: Floats, b: Floats) -> float:
    """Smallest cosine of two rows ``(N, K)``; two zero rows count as equal."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = (x * y).sum(axis=1)
    cosines = np.divide(dots, norms, out=np.where(dots == norms, 1.0, 0.0), where=norms > 0)
    return float(cosines.min())


def _percent(mask: NDArray[np.bool_]) -> float:
    return 100.0 * float(mask.mean())


def _check_data(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise DataError(
            f"test images must be uint8 of shape (N, C, H, W), not {images.dtype} {images.shape}"
        )
    if labels.shape != (len(images),):
        raise DataError(f"{len(images)} test images need as many labels, not {labels.shape}")
