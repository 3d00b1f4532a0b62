"""OFD: regress the teacher's pre-activations where they matter, through a ReLU with a margin.

Paper: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation",
arXiv 1904.01866.
Loss: ``ce_weight * CE + weight * sum_l 2^(l - L) * mean_b(sum_chw d)``, where ``t = max(F_t, m)``
is the teacher's l-th of L pre-activations after the margin ReLU, ``s = r(F_s)`` is the student's
behind a 1x1 convolution and a batch norm, ``d = (s - t)^2`` where ``t > 0`` or ``s > t``, else 0.
``m_c = E[x | x < 0]`` is the mean of the negative values of channel c, as the teacher's batch norm
in front of the ReLU has them: for a normal x with its bias as mean and its scale as deviation. The
pre-activations are 1 to n, without the stem's.

Deviations from the paper: none in the loss. As in the authors' code, m_c is minus three deviations
where less than a thousandth of the values is negative, and of a residual sum the last batch norm of
the branch is taken, the shortcut left out of account. Where the teacher has none in front of a tap
(or for a part of the channels only, as ShuffleV2), m_c is the mean of the negative values of each
batch; mdistiller refuses such teachers. If the networks have different numbers of maps, the first
ones are paired, where mdistiller pairs the last ones (with the margins of the first). A larger
teacher is average-pooled to the student before the margin, as in mdistiller; a larger student is
pooled after its connector. In mdistiller the teacher is in training mode, so that its batch norms
follow the batches: here teachers are frozen, and that cannot be reproduced.
Defaults: the authors' CIFAR-100 code (CE 1, weight 1/1000), same in mdistiller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smskd.methods.ab import connector
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.feeding_norms import feeding_norms
from smskd.methods.nst import to_same_size, why_not_maps

RARELY = 0.001
"""Share of negative values below which their mean is not relied on."""


class Regression(nn.Module):
    """Partial distance between one pair of pre-activations.

    Args:
        channels_s: C_s.
        channels_t: C_t.
        margin: ``(C_t,)``, or None to take it from each batch.
    """

    margin: Tensor | None

    def __init__(self, channels_s: int, channels_t: int, margin: Tensor | None) -> None:
        super().__init__()
        self.connector = connector(channels_s, channels_t)
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, map_s: Tensor, map_t: Tensor) -> Tensor:
        """Distance of ``(B, C_s, H, W)`` to the teacher's, per sample ``(B,)``."""
        map_s, map_t = to_same_size(self.connector(map_s), map_t)
        margin = batch_margin(map_t) if self.margin is None else self.margin
        return partial_distance(map_s, torch.maximum(map_t, margin.view(-1, 1, 1)))


@dataclass(frozen=True)
class OFD(Method):
    """Hyper-parameters of OFD.

    Attributes:
        weight: Weight of the partial distance.
    """

    name: ClassVar[str] = "ofd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Heo 2019, arXiv 1904.01866"
    needs: ClassVar[Needs] = Needs.features("preact")

    weight: float = 0.001

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial pre-activations after the stem's."""
        return why_not_maps(shapes, "preact", 2)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A connector for each pair of maps, with the margins of the teacher's batch norms."""
        norms: list[_BatchNorm | None] = [None] * len(shapes.teacher.preact)
        if shapes.teacher_networks and shapes.image:
            norms = feeding_norms(shapes.teacher_networks[0], shapes.image)
        margins = [None if norm is None else norm_margin(norm) for norm in norms]
        triples = zip(
            shapes.student.preact[1:], shapes.teacher.preact[1:], margins[1:], strict=False
        )
        return nn.ModuleList(Regression(s[0], t[0], margin) for s, t, margin in triples)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Partial distances, the last map's whole, each earlier one's half of the next."""
        triples = zip(
            modules.children(), signals.student.preact[1:], signals.teacher.preact[1:], strict=False
        )
        layers = [regression(map_s, map_t) for regression, map_s, map_t in triples]
        weighted = [loss / 2.0**above for above, loss in enumerate(reversed(layers))]
        return {"ofd": self.weight * signals.mean(torch.stack(weighted).sum(dim=0))}


def partial_distance(map_s: Tensor, target: Tensor) -> Tensor:
    """Squared distance, but for a student below a target that is not positive; ``(B,)``."""
    counts = (target > 0) | (map_s > target)
    return ((map_s - target).square() * counts).sum(dim=(1, 2, 3))


@torch.no_grad()
def norm_margin(norm: _BatchNorm) -> Tensor:
    """Mean of the negative values that a batch norm puts out, if they are normal: ``(C,)``."""
    one = torch.ones(norm.num_features, dtype=torch.float64)
    mean = 0.0 * one if norm.bias is None else norm.bias.detach().cpu().double()
    deviation = one if norm.weight is None else norm.weight.detach().cpu().double().abs()
    # A channel without deviation is constant: its mean if that is negative, else nothing.
    ratio = mean / deviation.clamp(min=1e-12)
    share = torch.special.ndtr(-ratio)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2.0 * math.pi)
    expected = mean - deviation * density / share.clamp(min=RARELY)
    return torch.where(share > RARELY, expected, -3.0 * deviation).float()


def batch_margin(feature_map: Tensor) -> Tensor:
    """Mean of each channel's negative values, 0 without any: ``(B, C, H, W)`` to ``(C,)``."""
    below = feature_map < 0
    count = below.sum(dim=(0, 2, 3)).clamp(min=1)
    return feature_map.clamp(max=0).sum(dim=(0, 2, 3)) / count
