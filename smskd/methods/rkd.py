"""RKD: keep the distances and angles between the samples of a batch.

Paper: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", arXiv 1904.05068.
Loss: ``ce_weight * CE + weight * (distance_weight * L_D + angle_weight * L_A)``.
``L_D = mean_ij huber(d_ij / mu)`` compares the distances of the pooled features, each network's
divided by mu, the mean of its positive ones; ``L_A = mean_ijk huber(cos)`` compares the cosines of
the angles that samples j and k form at i. huber is smooth L1 with beta 1. The means run over all
B^2 and B^3 index tuples, those with equal indices (0 in both networks) included.

Deviations from RepDistiller and mdistiller, whose loss this is: distances come from differences,
not from the Gram matrix, so there is no cancellation; equal samples have distance exactly 0 and no
gradient, where they have 1e-6 and count as positive; and if no distance is positive (batch of 1,
or equal samples only) the term is 0 where theirs is NaN.
Defaults: RepDistiller (``--distill rkd``: CE 1, outer weight 1, distance 25, angle 50), same in
mdistiller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import lacks_pooled, pooled_pair


@dataclass(frozen=True)
class RKD(Method):
    """Hyper-parameters of RKD.

    Attributes:
        weight: Weight of both relational terms together.
        distance_weight: Weight of the distances within them.
        angle_weight: Weight of the angles within them.
    """

    name: ClassVar[str] = "rkd"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Park 2019, arXiv 1904.05068"
    needs: ClassVar[Needs] = Needs.features("pooled")

    weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a pooled feature."""
        return lacks_pooled(shapes)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Huber losses on relative distances and on angles."""
        feature_s, feature_t = pooled_pair(signals)
        distances_s, angles_s = relations(feature_s)
        distances_t, angles_t = relations(feature_t)
        distance = F.smooth_l1_loss(distances_s, distances_t)
        angle = F.smooth_l1_loss(angles_s, angles_t)
        return {
            "distance": self.weight * self.distance_weight * distance,
            "angle": self.weight * self.angle_weight * angle,
        }


def relations(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Relative distances and angles within a batch.

    Args:
        feature: ``(B, D)``.

    Returns:
        Distances over their positive mean ``(B, B)``, and ``(B, B, B)`` with the cosine of the
        angle at i between j and k at ``[i, j, k]``, 0 where i equals j or k.
    """
    difference = feature.unsqueeze(0) - feature.unsqueeze(1)
    squared = difference.square().sum(dim=2)
    apart = squared > 0
    # sqrt has an infinite slope at 0: equal samples take a detour over 1.
    length = squared.where(apart, torch.ones_like(squared)).sqrt()
    direction = difference / length.unsqueeze(2)
    distance = length * apart
    # With no positive distance at all this mean is 0 / 1 + 1, and zeros are divided by it.
    mean = distance.sum() / apart.sum().clamp(min=1) + apart.any().logical_not()
    return distance / mean, direction @ direction.transpose(1, 2)
