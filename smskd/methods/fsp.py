"""FSP: start the student with the teacher's flow, the products of one map with the next.

Paper: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning", CVPR 2017 (not on arXiv; one of the methods compared in CRD's
paper, arXiv 1910.10699).
Loss, up to epoch ``round(init_share * epochs)`` of the stage: ``weight * sum_l mean((G_s^l -
G_t^l)^2)``, mean over batch and entries, with the flow ``G^l = F_l F_{l+1}^T / (H * W)`` of shape
``(C_l, C_{l+1})``, F as ``(C, H * W)``. Afterwards: ``ce_weight * CE`` alone. All maps take part,
the stem's too; the larger of two adjacent maps is average-pooled to the other.

The difference of the flows is one product of matrices, whose squared norm is computed from the
channels or from the positions, whichever are fewer.

Deviations from the paper: the mean over entries instead of the sum and average instead of maximum
pooling, as in RepDistiller; the phase is a share of the stage, under its learning rate, where they
put it in front. Both need equal widths, and RepDistiller refuses 7 of the 13 usual pairs: here a
student's map of another width than the teacher's goes through a 1x1 convolution that is trained
with it in the phase. If the networks have different numbers of maps, the first ones are paired.
Defaults: RepDistiller (``--distill fsp``: CE 1, 30 of 240 epochs; its weight 50 has no effect, the
phase's loss is taken as it is: weight 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from smskd.methods.ab import in_init_phase, why_not_share
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.nst import squared_products, to_same_size, why_not_maps


@dataclass(frozen=True)
class FSP(Method):
    """Hyper-parameters of FSP.

    Attributes:
        weight: Weight of the flows' distance.
        init_share: Share of the stage's epochs that is spent on the flows.
    """

    name: ClassVar[str] = "fsp"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Yim 2017, CVPR 2017"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 1.0
    init_share: float = 0.125

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have two spatial maps."""
        return why_not_share(self.init_share) or why_not_maps(shapes, "maps", 2)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A 1x1 convolution for each of the student's maps; nothing where widths are equal."""
        return width_adapters(shapes.student.maps, shapes.teacher.maps)

    def task(self, signals: Signals) -> Terms:
        """The loss on the labels, after the phase."""
        return {} if in_init_phase(signals, self.init_share) else super().task(signals)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Mean squared distance of the flows, summed over adjacent maps, during the phase."""
        if not in_init_phase(signals, self.init_share):
            return {}
        adapters = modules.children()
        maps_s = [adapt(x) for adapt, x in zip(adapters, signals.student.maps, strict=False)]
        maps_t = signals.teacher.maps[: len(maps_s)]
        layers = [
            flow_gap(flow_s, flow_t)
            for flow_s, flow_t in zip(adjacent(maps_s), adjacent(maps_t), strict=True)
        ]
        return {"flow": self.weight * signals.mean(torch.stack(layers).sum(dim=0))}


Flow = tuple[Tensor, Tensor]
"""Two adjacent maps, ``(B, C, P)`` and ``(B, C', P)``, whose product is the flow; the first is
divided by P."""


def adjacent(maps: Sequence[Tensor]) -> list[Flow]:
    """Each map with the next, pooled to one size and flattened."""
    flows = []
    for pair in pairwise(maps):
        below, above = (x.flatten(2) for x in to_same_size(*pair))
        flows.append((below / below.shape[2], above))
    return flows


def flow_gap(flow_s: Flow, flow_t: Flow) -> Tensor:
    """Mean squared difference of two flows ``(C, C')``, per sample ``(B,)``."""
    below = torch.cat([flow_s[0], flow_t[0]], dim=2)
    above = torch.cat([flow_s[1], -flow_t[1]], dim=2)
    return squared_products(below, above) / (below.shape[1] * above.shape[1])


def width_adapters(
    maps_s: tuple[tuple[int, ...], ...], maps_t: tuple[tuple[int, ...], ...]
) -> nn.Module:
    """1x1 convolutions that give the student's maps the teacher's widths, where they differ."""
    widths = [(s[0], t[0]) for s, t in zip(maps_s, maps_t, strict=False)]
    return nn.ModuleList(
        nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1, bias=False) for c_s, c_t in widths
    )
