"""Does a graph still say what the PyTorch model says? A gate before any speed is reported.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smskd.errors import DataError, ExportError
from smskd_export.cpu_session import Floats
from smskd_export.paired import PairedChange, paired_change
from smskd_export.targets import Precision

NOT_FINITE = 1e308
"""Stands for infinite and NaN, which JSON does not know."""


@dataclass(frozen=True)
class Parity:
    """How a graph compares with the PyTorch model.

    Attributes:
        n: Number of images.
        torch_top1: Accuracy of the PyTorch model, in percent.
        onnx_top1: Accuracy of the graph, in percent.
        change: The same, image by image.
        agreement: Images on which both predict the same class, in percent.
        max_abs_diff: Largest difference of any logit; infinite or NaN is written as 1e308.
        mean_abs_diff: Mean difference of the logits; as above.
        min_cosine: Smallest cosine between the two logit vectors of an image; 0 if not finite.
        passed: The verdict.
        reason: Why the verdict is what it is.
    """

    n: int
    torch_top1: float
    onnx_top1: float
    change: PairedChange
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
    reference: Floats,
    got: Floats,
    labels: NDArray[np.int64],
    precision: Precision,
    *,
    accuracy: bool = True,
) -> Parity:
    """Compare logits of a graph with those of the model.

    Use :meth:`Parity.require` to turn a failed verdict into an error.

    Args:
        reference: The model's ``(N, K)``.
        got: The graph's ``(N, K)``.
        labels: Classes of the images ``(N,)``.
        precision: What still counts as the same.
        accuracy: Whether a lower accuracy fails too; that needs the whole test set.

    Raises:
        DataError: the shapes differ.
    """
    if reference.shape != got.shape or labels.shape != reference.shape[:1] or not len(labels):
        raise DataError(
            f"logits {reference.shape} and {got.shape} of {labels.shape} labels cannot be compared"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # a graph may say inf: that is a verdict
        return _compare(reference, got, labels, precision, accuracy)


def _compare(
    reference: Floats,
    got: Floats,
    labels: NDArray[np.int64],
    precision: Precision,
    accuracy: bool,
) -> Parity:
    old_class, new_class = reference.argmax(axis=1), got.argmax(axis=1)
    finite, differences = bool(np.isfinite(got).all()), np.abs(got - reference)
    agreement = _percent(old_class == new_class)
    change = paired_change(new_class == labels, old_class == labels)
    largest = float(differences.max()) if finite else NOT_FINITE
    problems = _problems(largest, agreement, -change.difference if accuracy else 0.0, precision)
    return Parity(
        n=len(labels),
        torch_top1=_percent(old_class == labels),
        onnx_top1=_percent(new_class == labels),
        change=change,
        agreement=agreement,
        max_abs_diff=largest,
        mean_abs_diff=float(differences.mean()) if finite else NOT_FINITE,
        min_cosine=_min_cosine(got, reference) if finite else 0.0,
        passed=not problems,
        reason="; ".join(problems)
        or f"logits within {largest:.3g}, the same class for {agreement:.2f} %",
    )


def _problems(largest: float, agreement: float, lost: float, precision: Precision) -> list[str]:
    problems, limit = [], precision.max_abs_diff
    if largest == NOT_FINITE:
        problems.append("some logits are not finite")
    elif limit is not None and largest > limit:
        problems.append(f"a logit differs by {largest:.3g} (limit {limit:g})")
    if agreement < precision.min_agreement:
        problems.append(
            f"both predict the same class for {agreement:.2f} % of the images "
            f"(limit {precision.min_agreement:g} %)"
        )
    if lost > precision.max_drop:
        problems.append(f"{lost:.2f} points of top-1 are lost (limit {precision.max_drop:g})")
    return problems


def _min_cosine(a: Floats, b: Floats) -> float:
    """Smallest cosine of two rows ``(N, K)``; two zero rows count as equal."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = (x * y).sum(axis=1)
    same = (x == y).all(axis=1)
    cosines = np.divide(dots, norms, out=np.where(same, 1.0, 0.0), where=norms > 0)
    return float(cosines.min())


def _percent(mask: NDArray[np.bool_]) -> float:
    return 100.0 * float(mask.mean())
