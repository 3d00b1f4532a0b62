"""Tf-KD (reg): distil from a made-up teacher that is nearly sure of the true class. No teacher.

Paper: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
Regularization", arXiv 1909.11723.
Loss: ``ce_weight * CE + weight * multiplier * mean(KL(u || p_s))``, mean over batch and classes
``(B, K)``. The virtual teacher v gives ``confidence`` to the true class and shares the rest among
the others; ``u = softmax(v / tau)``. At the defaults u is nearly uniform: the true class has 5 %
more than each other.

Deviations from the authors' code: none. Two things there are easily missed: v enters the softmax as
it is, in the place of logits, not as log v; and ``p_s`` is not softened (``student_temperature``
softens it, without a factor tau^2). As in :mod:`smskd.methods.tfkd_self` the mean runs over the
classes too, which the multiplier makes up for.
Defaults: theirs for ResNet18 on CIFAR-100 (alpha 0.1, that is CE 0.9 and weight 0.1; tau 20,
multiplier 100, confidence 0.99). Others there, as (alpha, tau, multiplier): MobileNetV2
(0.95, 40, 1), ShuffleNetV2 (0.95, 10, 1), GoogLeNet (0.1, 40, 50).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class TfKDReg(Method):
    """Hyper-parameters of Tf-KD with a virtual teacher.

    Attributes:
        weight: Weight of the regularising term (alpha).
        temperature: tau, softens the virtual teacher.
        multiplier: Factor that makes up for the mean over the classes.
        confidence: The virtual teacher's probability of the true class, between 0 and 1.
        student_temperature: Softens the student in this term.
    """

    name: ClassVar[str] = "tfkd_reg"
    kind: ClassVar[str] = "self"
    paper: ClassVar[str] = "Yuan 2020, arXiv 1909.11723"
    needs: ClassVar[Needs] = Needs(teacher=False)

    ce_weight: float = 0.9
    weight: float = 0.1
    temperature: float = 20.0
    multiplier: float = 100.0
    confidence: float = 0.99
    student_temperature: float = 1.0

    def check(self, shapes: PairShapes) -> str | None:
        """The rest of the probability needs a second class to go to."""
        if not 0 <= self.confidence <= 1:
            return f"confidence is {self.confidence:g}; expected between 0 and 1"
        if shapes.student.num_classes < 2:
            return f"{shapes.student.num_classes} classes; expected at least 2"
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Divergence from the softened virtual teacher, mean over batch and classes."""
        logits = signals.student.logits
        virtual = virtual_teacher(signals.labels, logits, self.confidence)
        log_u = F.log_softmax(virtual / self.temperature, dim=1)
        log_p = F.log_softmax(logits / self.student_temperature, dim=1)
        kl = F.kl_div(log_p, log_u, reduction="none", log_target=True).sum(dim=1)
        scale = self.weight * self.multiplier / logits.shape[1]
        return {"tfkd_reg": scale * signals.mean(kl)}


def virtual_teacher(labels: Tensor, like: Tensor, confidence: float) -> Tensor:
    """``(B, K)`` of the type of ``like``: ``confidence`` at the true class, the rest shared."""
    num_classes = like.shape[1]
    is_target = F.one_hot(labels, num_classes).to(like.dtype)
    share = (1.0 - confidence) / (num_classes - 1)
    return share + (confidence - share) * is_target
