"""Information flow: copy how similar the teacher's layers find the samples, early ones at first.

Paper: Passalis, Tzelepi, Tefas, "Heterogeneous Knowledge Distillation using Information Flow
Modeling", arXiv 2005.00727.
Loss: ``ce_weight * CE + weight * J(h) + map_weight * decay^(epoch - 1) * sum_l J(F^l)``, epoch
counted from 1 within the stage. J compares two affinities of each layer, the cosine's
``(1 + cos) / 2`` and Student's t ``1 / (1 + d)``, d the Euclidean distance, with rows of sum 1:
``J = sum over both of mean_ij (P_ij - Q_ij) * (log P_ij - log Q_ij)``, Jeffreys' divergence of the
teacher's P and the student's Q, ``(B, B)``. h is the pooled feature, F^l the maps, flattened.

The paper's plan for a teacher built unlike the student is an auxiliary teacher of the student's
layout, but wider: an assistant that is first distilled from the big teacher at the penultimate
layer alone (a stage run with that network as the student and ``layers: last``), and then, as the
teacher of this method with ``layers: all``, shows the student the flow layer by layer.

Deviations from the authors' code (pkth): it has no label loss, as it judges features by retrieval;
for classification there is one here. It averages over samples and over neighbours alike; here
the samples may be weighted. Its networks have three convolutions and a hidden layer, whose outputs
it compares; here all maps, the stem's included, and the pooled feature. If the networks have
different numbers of maps, the last ones are paired. Features of 0 have cosine 0 and no gradient,
where theirs is NaN; affinities are at least 1e-7, where opposite features gave log 0; and
distances come from centred features, which rounds less.
Defaults: that code (exp2_proposed.py: 1, 100 and 0.7, the first epoch at 100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pkdot import cosines
from smskd.methods.pooled import lacks_pooled, pooled_pair

LEAST = 1e-7
"""Lowest affinity by the cosine, so that its logarithm exists."""
EPSILON = 1e-6
"""Added to squared distances, so that their root has a slope at 0; as in the authors' code."""


@dataclass(frozen=True)
class InfoFlow(Method):
    """Hyper-parameters of information flow.

    Attributes:
        weight: Weight of the pooled feature.
        map_weight: Weight of each map in the first epoch.
        decay: Factor on it after each epoch, 0 to 1.
        layers: "all", or the pooled feature only ("last"), to train an auxiliary teacher.
    """

    name: ClassVar[str] = "info_flow"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Passalis 2020, arXiv 2005.00727"
    needs: ClassVar[Needs] = Needs.features("maps", "pooled")

    weight: float = 1.0
    map_weight: float = 100.0
    decay: float = 0.7
    layers: Literal["all", "last"] = "all"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have the layers that are compared."""
        if not 0 <= self.decay <= 1:
            return f"decay is {self.decay:g}; expected 0 to 1"
        for who, network in (("student", shapes.student), ("teacher", shapes.teacher)):
            if self.layers == "all" and not network.maps:
                return f"the {who} has no feature map; expected at least 1, or layers: last"
        return lacks_pooled(shapes)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Divergence of the affinities of the pooled features, and of the maps."""
        student, teacher = signals.student, signals.teacher
        pooled = flow_gap(*pooled_pair(signals))
        terms = {"pooled": self.weight * signals.mean(pooled)}
        if self.layers == "all":
            pairs = list(zip(reversed(student.maps), reversed(teacher.maps), strict=False))
            gaps = [flow_gap(s.flatten(1), t.flatten(1)) for s, t in pairs]
            now = self.map_weight * self.decay ** (signals.epoch - 1)
            terms["maps"] = now * signals.mean(torch.stack(gaps).sum(dim=0))
        return terms


def flow_gap(feature_s: Tensor, feature_t: Tensor) -> Tensor:
    """Jeffreys' divergence, mean over neighbours, of each sample's affinities in one layer.

    Args:
        feature_s: Student ``(B, D_s)``.
        feature_t: Teacher ``(B, D_t)``.

    Returns:
        ``(B,)``, summed over the two kinds of affinity.
    """
    kinds = zip(_log_affinities(feature_s), _log_affinities(feature_t), strict=True)
    gaps = [(log_q.exp() - log_p.exp()) * (log_q - log_p) for log_q, log_p in kinds]
    return torch.stack(gaps).sum(dim=0).mean(dim=1)


def _log_affinities(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the row-stochastic affinities by cosine and by Student's t, ``(B, B)`` each."""
    by_cosine = ((1 + cosines(feature)) / 2).clamp(min=LEAST).log()
    by_distance = -distances(feature).log1p()
    return F.log_softmax(by_cosine, dim=1), F.log_softmax(by_distance, dim=1)


def distances(feature: Tensor) -> Tensor:
    """``sqrt(|x_i - x_j|^2 + EPSILON)`` within a batch: ``(B, D)`` to ``(B, B)``.

    By the Gram matrix, as the differences of whole maps would not fit into memory.
    """
    centred = feature - feature.mean(dim=0)
    gram = centred @ centred.T
    norms = gram.diagonal()
    squared = norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * gram
    others = 1 - torch.eye(len(feature), dtype=feature.dtype, device=feature.device)
    return (squared.clamp(min=0) * others + EPSILON).sqrt()
