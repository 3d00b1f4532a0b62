"""WTTM: TTM in which samples count more on which the teacher's distribution is smoother.

Paper: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
arXiv 2402.11148.
Loss: ``ce_weight * CE + weight * U * KL(q || p_s)``, mean over the batch; q and p as in
:mod:`smskd.methods.ttm`, and ``U = sum_c p_t,c^gamma`` ``(B,)`` the sample's weight, between 1 (all
probability on one class) and K^(1 - gamma) (uniform) for gamma below 1.

Deviations from the authors' code: none in the mathematics; powers are taken in log space.
Defaults: the authors' README, whose example for vgg13-vgg8 adds WTTM to CRD (gamma 0.2, weight 4;
CE 1). For WTTM alone they tune both for each pair of networks (appendix A.4 of the paper, which was
not at hand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.ttm import power_kl, refuse_power


@dataclass(frozen=True)
class WTTM(Method):
    """Hyper-parameters of WTTM.

    Attributes:
        weight: Weight of the divergence.
        gamma: Power to which the teacher's probabilities are raised, above 0.
    """

    name: ClassVar[str] = "wttm"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zheng 2024, arXiv 2402.11148"
    needs: ClassVar[Needs] = Needs()

    weight: float = 4.0
    gamma: float = 0.2

    def check(self, shapes: PairShapes) -> str | None:
        """A power that is not positive forgets or turns round the teacher."""
        return refuse_power(self.gamma)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Weighted divergence from the transformed teacher."""
        kl = power_kl(signals.student.logits, signals.teacher.logits, self.gamma)
        return {"wttm": self.weight * signals.mean(smoothness(signals, self.gamma) * kl)}


def smoothness(signals: Signals, gamma: float) -> Tensor:
    """``sum_c p_t,c^gamma`` of each sample ``(B,)``."""
    log_p_t = F.log_softmax(signals.teacher.logits, dim=1)
    return (gamma * log_p_t).logsumexp(dim=1).exp()
