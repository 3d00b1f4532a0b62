"""TTM: match a power of the teacher's distribution, without softening the student's.

Paper: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
arXiv 2402.11148.
Loss: ``ce_weight * CE + weight * KL(q || p_s)``, mean over the batch, with
``q = p_t^gamma / sum_c p_t,c^gamma`` and p the softmax ``(B, K)`` at temperature 1. q is the
teacher's softmax at temperature 1 / gamma; gamma 1 is KD at temperature 1.

Deviations from the authors' code: none in the mathematics. q comes from the scaled logits, where
theirs raises probabilities to a power, which loses those that underflow.
Defaults: the authors' README for vgg13-vgg8 (CE 1, gamma 0.1, weight 45). They tune both for each
pair of networks (appendix A.4 of the paper, which was not at hand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl


@dataclass(frozen=True)
class TTM(Method):
    """Hyper-parameters of TTM.

    Attributes:
        weight: Weight of the divergence.
        gamma: Power to which the teacher's probabilities are raised, above 0.
    """

    name: ClassVar[str] = "ttm"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zheng 2024, arXiv 2402.11148"
    needs: ClassVar[Needs] = Needs()

    weight: float = 45.0
    gamma: float = 0.1

    def check(self, shapes: PairShapes) -> str | None:
        """A power that is not positive forgets or turns round the teacher."""
        return refuse_power(self.gamma)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Divergence from the transformed teacher."""
        kl = power_kl(signals.student.logits, signals.teacher.logits, self.gamma)
        return {"ttm": self.weight * signals.mean(kl)}


def power_kl(logits_s: Tensor, logits_t: Tensor, gamma: float) -> Tensor:
    """``KL(q || p_s)`` of each sample, q the normalised power of the teacher's distribution.

    Args:
        logits_s: Student ``(B, K)``.
        logits_t: Teacher ``(B, K)``.
        gamma: The power.

    Returns:
        ``(B,)``.
    """
    return softened_kl(logits_s, gamma * logits_t, temperature=1.0)


def refuse_power(gamma: float) -> str | None:
    """Why a power cannot be used, or None."""
    return None if gamma > 0 else f"gamma is {gamma:g}; expected above 0"
