"""DKD: split KD into the target class and the rest, and weight the two freely.

Paper: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", arXiv 2203.08679.
Loss: ``ce_weight * CE + ramp * tau^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))``, mean
over the batch. With p the softmax at temperature tau and y the true class, ``b = (p_y, 1 - p_y)``
and ``q = p_c / (1 - p_y)`` for c other than y. ``beta = 1 - p_t,y`` for each sample would give KD.
``ramp = min(epoch / warmup_epochs, 1)`` scales both terms, with epochs counted from 1.

Deviations from the authors' code (mdistiller): none in the mathematics. All of it is done on
log-probabilities: theirs takes log(softmax), which is -inf for a confident student, and removes the
target by subtracting 1000 from its logit, which fails for larger logits.
Defaults: mdistiller (CE 1, alpha 1, beta 8, tau 4, 20 warm-up epochs). The authors set beta per
pair of networks: 2 for resnet56-20 and resnet110-32; 6 for vgg13-vgg8, vgg13-MobileNetV2,
wrn40-2-wrn16-2 and wrn40-2-wrn40-1; else 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class DKD(Method):
    """Hyper-parameters of DKD.

    Attributes:
        alpha: Weight of the target-class term (TCKD).
        beta: Weight of the term on the other classes (NCKD).
        temperature: tau, softens both distributions.
        warmup_epochs: Epochs over which both terms grow linearly to full weight; 0 for none.
    """

    name: ClassVar[str] = "dkd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zhao 2022, arXiv 2203.08679"
    needs: ClassVar[Needs] = Needs()

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup_epochs: int = 20

    def check(self, shapes: PairShapes) -> str | None:
        """Fewer than three classes leave nothing to decouple."""
        num_classes = shapes.student.num_classes
        if num_classes < 3:
            return (
                f"{num_classes} classes; expected at least 3, as with fewer there is no "
                "distribution over the other classes and beta has no effect (use kd)"
            )
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The target-class and the non-target-class term."""
        is_target = F.one_hot(signals.labels, signals.student.logits.shape[1]).bool()
        binary_s, others_s = decouple(signals.student.logits / self.temperature, is_target)
        binary_t, others_t = decouple(signals.teacher.logits / self.temperature, is_target)
        scale = self._ramp(signals.epoch) * self.temperature**2
        return {
            "tckd": scale * self.alpha * signals.mean(_kl(binary_s, binary_t)),
            "nckd": scale * self.beta * signals.mean(_kl(others_s, others_t)),
        }

    def _ramp(self, epoch: int) -> float:
        return min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs > 0 else 1.0


def decouple(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Split a softmax into target against rest, and the rest among itself.

    Args:
        logits: ``(B, K)``.
        is_target: True at the true class of each sample ``(B, K)``.

    Returns:
        ``log b`` ``(B, 2)``, and ``log q`` ``(B, K)`` with 0 in the target's place, which cancels
        in a KL divergence of two of them.
    """
    log_p = F.log_softmax(logits, dim=1)
    log_rest = log_p.masked_fill(is_target, -torch.inf)
    log_p_target = log_p.masked_fill(~is_target, 0.0).sum(dim=1)
    binary = torch.stack([log_p_target, log_rest.logsumexp(dim=1)], dim=1)
    return binary, F.log_softmax(log_rest, dim=1).masked_fill(is_target, 0.0)


def _kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)
