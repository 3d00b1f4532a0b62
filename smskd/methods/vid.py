"""VID: raise a lower bound of the information that the student's maps hold about the teacher's.

Paper: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge
Transfer", arXiv 1904.05835.
Loss: ``ce_weight * CE + weight * sum_l mean(((mu(F_s) - F_t)^2 / v + log v) / 2)``, mean over
batch, channels and positions: the negative log-likelihood, less a constant, of the teacher's l-th
map under a Gaussian around mu(F_s). mu is three 1x1 convolutions with ReLUs between them; the
variance ``v = softplus(alpha) + 1e-5`` is one learned number a channel of the teacher. The maps are
1 to n, without the stem's map 0.

Deviations from the paper: none in the loss; which maps, how deep mu is and the weight are choices
of RepDistiller and mdistiller. If the networks have different numbers of maps, the first ones are
paired. The larger map is average-pooled to the smaller. mdistiller never hands alpha to the
optimiser, so that its variance stays as it starts: ``compat="mdistiller"`` does the same.
Defaults: RepDistiller (``--distill vid``: CE 1, weight 1, initial variance 5), same in mdistiller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.nst import to_same_size, why_not_maps

LEAST_VARIANCE = 1e-5


class Gaussian(nn.Module):
    """What a student's map says about the teacher's: a mean at each place, a variance a channel.

    Args:
        channels_s: C_s.
        channels_t: C_t.
        variance: Where it starts, above ``LEAST_VARIANCE``.
    """

    def __init__(self, channels_s: int, channels_t: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels_s, channels_t, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_t, channels_t, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_t, channels_t, 1, bias=False),
        )
        alpha = math.log(math.expm1(variance - LEAST_VARIANCE))
        self.alpha = nn.Parameter(torch.full((channels_t,), alpha))

    def forward(self, map_s: Tensor, map_t: Tensor) -> Tensor:
        """Negative log-likelihood of ``map_t`` ``(B, C_t, H, W)``, per sample ``(B,)``."""
        map_s, map_t = to_same_size(map_s, map_t)
        variance = (F.softplus(self.alpha) + LEAST_VARIANCE).view(-1, 1, 1)
        gap = (self.mean(map_s) - map_t).square() / variance
        loss: Tensor = 0.5 * (gap + variance.log()).mean(dim=(1, 2, 3))
        return loss


@dataclass(frozen=True)
class VID(Method):
    """Hyper-parameters of VID.

    Attributes:
        weight: Weight of the negative log-likelihood.
        initial_variance: Variance that every channel starts with.
        compat: "mdistiller" keeps the variance at its initial value, as that code does.
    """

    name: ClassVar[str] = "vid"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Ahn 2019, arXiv 1904.05835"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 1.0
    initial_variance: float = 5.0
    compat: Literal["none", "mdistiller"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial maps after the stem's."""
        if self.initial_variance <= LEAST_VARIANCE:
            least = f"{LEAST_VARIANCE:g}"
            return f"initial_variance is {self.initial_variance:g}; expected more than {least}"
        return why_not_maps(shapes, "maps", 2)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A Gaussian for each pair of maps."""
        pairs = zip(shapes.student.maps[1:], shapes.teacher.maps[1:], strict=False)
        layers = [Gaussian(s[0], t[0], self.initial_variance) for s, t in pairs]
        for layer in layers:
            layer.alpha.requires_grad_(self.compat == "none")
        return nn.ModuleList(layers)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Negative log-likelihood of the teacher's maps, summed over the pairs."""
        triples = zip(
            modules.children(), signals.student.maps[1:], signals.teacher.maps[1:], strict=False
        )
        layers = [signals.mean(gaussian(map_s, map_t)) for gaussian, map_s, map_t in triples]
        return {"vid": self.weight * torch.stack(layers).sum()}
