"""RDD: weigh each sample's cross-entropy by how difficult it is to teacher and student.

Paper: Liang, Sun, Du, Chen, Huang, "Relative Difficulty Distillation for Semantic Segmentation",
arXiv 2407.03719.
Loss: ``ce_weight * L + weight * tau^2 * KL(p_t || p_s)``, mean over the batch, where L is

- ``phase: teacher`` (TFE): ``mean(w * CE)`` with ``w = exp(-KL(p_aux || p_t))``. Samples on which
  the teacher agrees with itself come first; p_aux is its answer to the mirrored image.
- ``phase: student`` (TSE): the mean of CE over the samples that are difficult to exactly one of
  student and teacher; difficult is ``p[y] <= threshold``. 0 if there is none.
- ``phase: blend``: ``lambda * TFE + (1 - lambda) * TSE``; lambda falls linearly from 1 in the first
  epoch to 0 in the last.

Together it is a curriculum of two stages, [rdd with phase teacher, rdd with phase student]; the
paper's single run with a switch at a tenth to a fifth of it, or "blend", comes close in one stage.

Deviations from the paper, which segments images: samples take the place of pixels. p_aux comes
from the teacher's auxiliary head there; classifiers have none, so a second view stands in for it.
Left out is what only segmentation has: the student's auxiliary head (0.4 of its loss), weights of
classes, and the rule that at least 100000 pixels are difficult. With no sample in TSE their mean is
NaN. Their blend keeps lambda at 1 for a fifth of the run and then falls each iteration.
Defaults: the authors' code (threshold 0.7, KL weight 1, tau 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.taps import NETWORK


@dataclass(frozen=True)
class RDD(Method):
    """Hyper-parameters of RDD.

    Attributes:
        phase: What weighs the samples: the teacher, both networks, or first one, then the other.
        weight: Weight of the KL.
        temperature: tau of the KL.
        threshold: A sample whose true class has at most this probability is difficult; phases
            "student" and "blend".
    """

    name: ClassVar[str] = "rdd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Liang 2024, arXiv 2407.03719"
    needs: ClassVar[Needs] = Needs(teacher_roles=frozenset({NETWORK}))

    phase: Literal["teacher", "student", "blend"] = "teacher"
    weight: float = 1.0
    temperature: float = 1.0
    threshold: float = 0.7

    def check(self, shapes: PairShapes) -> str | None:
        """The images must be images, as they are mirrored."""
        if shapes.image and len(shapes.image) != 3:
            return f"expected images (C, H, W), got {shapes.image}"
        return None

    def task(self, signals: Signals) -> Terms:
        """The cross-entropy, weighed by difficulty."""
        if self.ce_weight == 0.0:
            return {}
        ce = F.cross_entropy(signals.student.logits, signals.labels, reduction="none")
        share = self._teacher_share(signals)
        loss = ce.new_zeros(())
        if share > 0.0:
            loss = loss + share * (self_agreement(signals) * ce).mean()
        if share < 1.0:
            loss = loss + (1.0 - share) * self._mean_of_differing(ce, signals)
        return {"ce": self.ce_weight * loss}

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """KL from the first teacher."""
        kl = softened_kl(signals.student.logits, signals.teacher.logits, self.temperature)
        return {"kd": self.weight * signals.mean(kl)}

    def _teacher_share(self, signals: Signals) -> float:
        """The share of TFE, lambda, in this epoch."""
        if self.phase == "blend":
            return 1.0 - (signals.epoch - 1) / max(signals.epochs - 1, 1)
        return 1.0 if self.phase == "teacher" else 0.0

    def _mean_of_differing(self, ce: Tensor, signals: Signals) -> Tensor:
        """Mean of ``(B,)`` over the samples that are difficult to one network only."""
        both = (signals.student.logits.detach(), signals.teacher.logits)
        hard_s, hard_t = (true_probability(z, signals.labels) <= self.threshold for z in both)
        differs = hard_s ^ hard_t
        return (ce * differs).sum() / differs.sum().clamp(min=1)


def self_agreement(signals: Signals) -> Tensor:
    """``exp(-KL(p_aux || p_t))`` of the teacher's answers to both views of an image, ``(B,)``."""
    assert signals.networks is not None  # asked for in needs
    mirrored = signals.networks.teachers[0](signals.networks.images.flip(3))
    return (-softened_kl(signals.teacher.logits, mirrored.logits, 1.0)).exp()


def true_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true class, ``(B,)``."""
    return F.softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
