"""KD: match the teacher's softened class probabilities.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
Loss: ``ce_weight * CE + weight * tau^2 * KL(softmax(z_t / tau) || softmax(z_s / tau))``, mean over
the batch. The factor tau^2 keeps the gradient's size when tau changes (section 2 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, Signals, Terms


@dataclass(frozen=True)
class KD(Method):
    """Hyper-parameters of KD; the defaults are those of the CRD recipe (CE 0.1, KD 0.9, tau 4).

    Attributes:
        weight: Weight of the distillation term.
        temperature: tau, softens both distributions.
    """

    name: ClassVar[str] = "kd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Hinton 2015, arXiv 1503.02531"
    needs: ClassVar[Needs] = Needs()

    ce_weight: float = 0.1
    weight: float = 0.9
    temperature: float = 4.0

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Softened KL from the first teacher."""
        kl = softened_kl(signals.student.logits, signals.teacher.logits, self.temperature)
        return {"kd": self.weight * signals.mean(kl)}


def softened_kl(logits_s: Tensor, logits_t: Tensor, temperature: float) -> Tensor:
    """``tau^2 * KL(p_t || p_s)`` of each sample.

    Args:
        logits_s: Student ``(B, K)``.
        logits_t: Target ``(B, K)``.
        temperature: tau.

    Returns:
        ``(B,)``, never averaged here: callers weight samples.
    """
    log_p_s = F.log_softmax(logits_s / temperature, dim=1)
    log_p_t = F.log_softmax(logits_t / temperature, dim=1)
    kl = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(dim=1)
    return kl * temperature**2
