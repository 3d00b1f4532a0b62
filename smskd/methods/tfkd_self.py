"""Tf-KD (self): KD whose teacher is the same network, trained before on the labels alone.

Paper: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
Regularization", arXiv 1909.11723.
Loss: ``ce_weight * CE + weight * multiplier * tau^2 * mean(p_t * (log p_t - log p_s))``, mean over
batch and classes ``(B, K)``, p the softmax at temperature tau. It is KD with the weight
``weight * multiplier / K``.

Name the student's own pretrained copy as the teacher of the stage; any other teacher of as many
classes works as well, and is then plain KD.
Deviations from the authors' code: none. It divides by the number of classes too, which its
multiplier makes up for (torch's ``KLDivLoss`` of the default reduction); the paper has no
multiplier. ``ce_weight`` is its 1 - alpha, ``weight`` its alpha.
Defaults: theirs for ResNet18 on CIFAR-100 (alpha 0.95, tau 6, multiplier 50). Others there, as
(alpha, tau, multiplier): MobileNetV2 and ShuffleNetV2 (0.95, 20, 1), GoogLeNet (0.4, 20, 50),
DenseNet121 (0.9, 20, 50), ResNeXt29 (0.9, 20, 100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl


@dataclass(frozen=True)
class TfKDSelf(Method):
    """Hyper-parameters of Tf-KD with the student's own copy as teacher.

    Attributes:
        weight: Weight of the distillation term (alpha).
        temperature: tau, softens both distributions.
        multiplier: Factor that makes up for the mean over the classes.
    """

    name: ClassVar[str] = "tfkd_self"
    kind: ClassVar[str] = "self"
    paper: ClassVar[str] = "Yuan 2020, arXiv 1909.11723"
    needs: ClassVar[Needs] = Needs()

    ce_weight: float = 0.05
    weight: float = 0.95
    temperature: float = 6.0
    multiplier: float = 50.0

    def check(self, shapes: PairShapes) -> str | None:
        """A copy of the student has the student's classes."""
        student, teacher = shapes.student.num_classes, shapes.teacher.num_classes
        if student != teacher:
            return (
                f"the student has {student} classes and the teacher {teacher} (expected the same "
                "number, as the teacher shall be a copy of the student)"
            )
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Softened KL from the earlier copy, mean over batch and classes."""
        kl = softened_kl(signals.student.logits, signals.teacher.logits, self.temperature)
        per_class = self.multiplier / signals.student.logits.shape[1]
        return {"tfkd_self": self.weight * per_class * signals.mean(kl)}
