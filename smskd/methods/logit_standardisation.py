"""Logit standardisation: each sample's logits get mean 0 and deviation 1 before they are compared.

Paper: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation",
arXiv 2403.01427.
Change: ``z <- (z - mean(z)) / (std(z) + 1e-7)`` over the K classes of each sample, for student and
teachers, ahead of any loss on logits. The student then need not match the teacher's logits in
range. The label loss sees the logits as they were. The temperature stays with the method.

Deviations from the authors' code (logit-standardization-KD): none. Like it, this uses the unbiased
standard deviation (division by K - 1, torch's default) and lets the gradient flow through the
student's mean and deviation. The biased one (division by K) would only act as a temperature that
is sqrt(K / (K - 1)) times lower, 0.5 % for 100 classes.
Defaults: 1e-7 from that code. It goes with stronger weights than plain KD: CE 0.1, KD 9 and tau 2
for most pairs of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from smskd.methods.base import Modifier, PairShapes, Signals

EPSILON = 1e-7


@dataclass(frozen=True)
class LogitStandardisation(Modifier):
    """Standardise the logits of student and teachers; no hyper-parameters."""

    name: ClassVar[str] = "logit_standardisation"
    paper: ClassVar[str] = "Sun 2024, arXiv 2403.01427"

    def check(self, shapes: PairShapes) -> str | None:
        """One class has no deviation."""
        if shapes.student.num_classes < 2:
            return (
                f"{shapes.student.num_classes} classes; expected at least 2, over which the "
                "standard deviation is taken"
            )
        return None

    def modify(self, signals: Signals, modules: nn.Module) -> Signals:
        """The signals with standardised logits."""
        teachers = [standardise(teacher.logits) for teacher in signals.teachers]
        return signals.with_logits(standardise(signals.student.logits), teachers)


def standardise(logits: Tensor) -> Tensor:
    """Zero mean and unit deviation for each sample of ``(B, K)``."""
    mean = logits.mean(dim=1, keepdim=True)
    return (logits - mean) / (logits.std(dim=1, keepdim=True) + EPSILON)
