"""CMKD: match the teacher's class values and class ranks by correlation, weighted by difficulty.

Paper: Niu, Wang, Cai, Hou, "Efficient and Robust Knowledge Distillation from A Stronger Teacher
Based on Correlation Matching", arXiv 2410.06561.
Loss: ``ce_weight * CE + mean_i[pearson_weight * (1 - d_i) * (1 - rho(p_s, p_t))
+ spearman_weight * d_i * (1 - rho(r_s, r_t))]``, where rho is Pearson's correlation over the K
classes of a sample, p the softmax at tau of the standardised logits (mean 0, deviation 1), r their
soft ranks (:mod:`smskd.methods.soft_rank`), which makes the second one Spearman's, and d in [0, 1]
the sample's difficulty: the entropy of the softmax at temperature 1 over log K, without gradient.
All are ``(B, K)`` but d, ``(B,)``. Easy samples thus follow the values, hard ones the ranks.

Deviations: the paper's abstract and reviews give the ingredients (Pearson and Spearman losses,
standardised logits, weights that follow difficulty); neither its exact weights nor code could be
read. The formula for d, the soft ranks (for teacher and student alike, so that the loss is 0 at the
teacher) and the weights are ours. A correlation does not shrink with the temperature as a
divergence does, so there is no tau^2. A constant vector correlates with nothing (rho = 0).
Defaults: DIST's on CIFAR-100 (arXiv 2205.10536), the nearest published loss: weights 2 and tau 4.
Soft ranks at 0.1, a tenth of the standardised logits' deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.correlation import pearson
from smskd.methods.logit_standardisation import standardise
from smskd.methods.soft_rank import soft_ranks


@dataclass(frozen=True)
class CMKD(Method):
    """Hyper-parameters of CMKD.

    Attributes:
        pearson_weight: alpha, weight of the correlation of values.
        spearman_weight: beta, weight of the correlation of ranks.
        temperature: tau, softens both distributions.
        rank_temperature: Softness of the ranks, in deviations of a sample's logits.
        difficulty: Whose entropy says how hard a sample is; "none" counts each as half hard.
    """

    name: ClassVar[str] = "cmkd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Niu 2024, arXiv 2410.06561"
    needs: ClassVar[Needs] = Needs()

    pearson_weight: float = 2.0
    spearman_weight: float = 2.0
    temperature: float = 4.0
    rank_temperature: float = 0.1
    difficulty: Literal["teacher_entropy", "student_entropy", "none"] = "teacher_entropy"

    def check(self, shapes: PairShapes) -> str | None:
        """Two values always correlate fully, one way or the other."""
        if shapes.student.num_classes < 3:
            return (
                f"{shapes.student.num_classes} classes; expected at least 3, as the correlation of "
                "two values is always 1 or -1"
            )
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Correlation gaps of values and of ranks."""
        hard = self._hardness(signals)
        z_s, z_t = standardise(signals.student.logits), standardise(signals.teacher.logits)
        values = 1 - pearson(self._softened(z_s), self._softened(z_t))
        ranks = 1 - pearson(
            soft_ranks(z_s, self.rank_temperature), soft_ranks(z_t, self.rank_temperature)
        )
        return {
            "pearson": self.pearson_weight * signals.mean((1 - hard) * values),
            "spearman": self.spearman_weight * signals.mean(hard * ranks),
        }

    def _softened(self, logits: Tensor) -> Tensor:
        return F.softmax(logits / self.temperature, dim=1)

    def _hardness(self, signals: Signals) -> Tensor:
        """Difficulty d of each sample, ``(B,)``."""
        if self.difficulty == "none":
            return torch.full_like(signals.student.logits[:, 0], 0.5)
        by = signals.teacher if self.difficulty == "teacher_entropy" else signals.student
        return relative_entropy(by.logits.detach())


def relative_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of ``(B, K)`` as a share of the largest possible, log K: ``(B,)``."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1) / math.log(logits.shape[1])
