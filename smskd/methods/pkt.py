"""PKT: samples that are probable neighbours to the teacher shall be so to the student.

Paper: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
arXiv 1803.10837.
Loss: ``ce_weight * CE + weight * mean_ij(P_t * log((P_t + eps) / (P_s + eps)))``, mean over all B^2
pairs. P is ``(B, B)`` with rows of sum 1: ``(cos + 1) / 2`` of the pooled features of samples i and
j, the pair of a sample with itself included. Only B x B matrices are compared, so the features may
have any width.

Deviations from the paper: its sum over the pairs is a mean, as in the authors' code and in
RepDistiller. Of the paper's kernels it has the cosine, the one without a width to choose. They add
1e-7 to the norm of a feature; here the norm is at least 1e-7, the same for all but tiny features.
Defaults: RepDistiller (``--distill pkt``: CE 1, weight 30000, eps 1e-7), same in mdistiller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import lacks_pooled, pooled_pair

EPSILON = 1e-7
"""Keeps logarithm and norm away from 0."""


@dataclass(frozen=True)
class PKT(Method):
    """Hyper-parameters of PKT.

    Attributes:
        weight: Weight of the divergence.
    """

    name: ClassVar[str] = "pkt"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Passalis 2018, arXiv 1803.10837"
    needs: ClassVar[Needs] = Needs.features("pooled")

    weight: float = 30000.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a pooled feature."""
        return lacks_pooled(shapes)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Divergence of the two neighbour distributions, the mean over each sample's row."""
        feature_s, feature_t = pooled_pair(signals)
        p_s, p_t = neighbours(feature_s), neighbours(feature_t)
        divergence = p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()
        return {"pkt": self.weight * signals.mean(divergence.mean(dim=1))}


def neighbours(feature: Tensor) -> Tensor:
    """Cosine similarities as probabilities, rows of sum 1: ``(B, D)`` to ``(B, B)``."""
    unit = F.normalize(feature, eps=EPSILON)
    similarity = (unit @ unit.T + 1.0) / 2.0
    return similarity / similarity.sum(dim=1, keepdim=True)
