"""DIST: correlate with the teacher, over the classes of a sample and over the samples of a class.

Paper: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher",
arXiv 2205.10536.
Loss: ``ce_weight * CE + weight * tau^2 * (beta * L_inter + gamma * L_intra)``. With p the softmax
``(B, K)`` at temperature tau and rho Pearson's correlation,
``L_inter = mean_i (1 - rho(p_s[i, :], p_t[i, :]))`` over the batch and
``L_intra = mean_c (1 - rho(p_s[:, c], p_t[:, c]))`` over the classes.

Deviations from the paper: none. Rows that are constant in one network have rho 0 and no gradient,
and a batch of one has L_intra 0. The authors' code has 1e-8 beside the product of the norms in rho:
no difference at tau 4, but at tau 1 it damps classes that both networks find very improbable; and
where the student is constant its gradient is of the order 1e8.
Defaults: the authors' CIFAR-100 configuration (CE 1, weight 2, beta 1, gamma 1, tau 4); for
ImageNet they have tau 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, Signals, Terms
from smskd.methods.correlation import pearson


@dataclass(frozen=True)
class DIST(Method):
    """Hyper-parameters of DIST.

    Attributes:
        weight: Weight of both relations together.
        beta: Weight of the relation between the classes of a sample, within them.
        gamma: Weight of the relation between the samples of a class, within them.
        temperature: tau, softens both distributions.
    """

    name: ClassVar[str] = "dist"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Huang 2022, arXiv 2205.10536"
    needs: ClassVar[Needs] = Needs()

    weight: float = 2.0
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Mean distances of correlation, of the rows and of the columns."""
        log_s = F.log_softmax(signals.student.logits / self.temperature, dim=1)
        log_t = F.log_softmax(signals.teacher.logits / self.temperature, dim=1)
        scale = self.weight * self.temperature**2
        return {
            "inter": scale * self.beta * signals.mean(correlation_distance(log_s, log_t)),
            "intra": scale * self.gamma * correlation_distance(log_s.T, log_t.T).mean(),
        }


def correlation_distance(log_s: Tensor, log_t: Tensor) -> Tensor:
    """One minus the correlation of what each pair of rows is the logarithm of.

    Args:
        log_s: ``(N, M)``.
        log_t: ``(N, M)``.

    Returns:
        ``(N,)``, 0 if M is 1.
    """
    return (1.0 - pearson(_scaled(log_s), _scaled(log_t))) * (log_s.shape[1] > 1)


def _scaled(logs: Tensor) -> Tensor:
    """Rows with largest value 1: their scale is of no account, and small ones would underflow."""
    return (logs - logs.detach().amax(dim=1, keepdim=True)).exp()
