"""MGD: from the student's map with some channels removed, generate the teacher's whole map.

Paper: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation", arXiv 2205.01529.
Loss: ``ce_weight * CE + weight * sum((G(M * A(F_s)) - F_t)^2) / B``. F_s ``(B, D_s, H, W)`` and F_t
``(B, D_t, H, W)`` are the maps before pooling; A is a 1x1 convolution to D_t channels (nothing if
the widths are equal), M ``(B, D_t, 1, 1)`` is 0 with probability ``mask_share`` and else 1, drawn
anew in each step; G is a 3x3 convolution, ReLU and a 3x3 convolution. The sum runs over all but the
weights, so its size grows with the teacher's map.

Deviations from the paper and the authors' code: channels are masked, as their code for
classification does, where the abstract and their code for segmentation mask positions. They need
maps of equal size; here a larger student's map is average-pooled and a smaller one repeated
(nearest neighbour) after A, so that G always makes the whole teacher's map. Their mask is drawn on
the CPU; here on the map's device.
Defaults: the authors' CIFAR-100 settings in their later code (cls_KD, ResNet34 to ResNet18: alpha
0.0012, lambda 0.15); 0.00007 on ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.simkd import why_no_maps
from smskd.taps import SPATIAL


@dataclass(frozen=True)
class MGD(Method):
    """Hyper-parameters of MGD.

    Attributes:
        weight: Weight of the generation term, a sum over the teacher's map.
        mask_share: Probability that a channel of a sample is masked.
    """

    name: ClassVar[str] = "mgd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Yang 2022, arXiv 2205.01529"
    needs: ClassVar[Needs] = Needs.features(SPATIAL)
    draws_random: ClassVar[bool] = True

    weight: float = 0.0012
    mask_share: float = 0.15

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a map before pooling."""
        if not 0 <= self.mask_share < 1:
            return f"mask_share is {self.mask_share:g}; expected 0 <= mask_share < 1"
        return why_no_maps(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """The alignment A and the generation block G."""
        return _Generation(shapes.student.spatial[0], shapes.teacher.spatial[0])

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared gap of the generated and the teacher's map, summed over each sample."""
        map_s, map_t = signals.student.spatial, signals.teacher.spatial
        assert map_s is not None  # asked for in needs
        assert map_t is not None
        kept = torch.rand(*map_t.shape[:2], 1, 1, device=map_t.device) >= self.mask_share
        gap = modules(map_s, kept, map_t.shape[2:]) - map_t
        return {"mgd": self.weight * signals.mean(gap.square().sum(dim=(1, 2, 3)))}


class _Generation(nn.Module):
    def __init__(self, c_s: int, c_t: int) -> None:
        super().__init__()
        self.align = nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1)
        self.generate = nn.Sequential(
            nn.Conv2d(c_t, c_t, 3, padding=1), nn.ReLU(), nn.Conv2d(c_t, c_t, 3, padding=1)
        )

    def forward(self, map_s: Tensor, kept: Tensor, size: tuple[int, int]) -> Tensor:
        """The teacher's map ``(B, D_t, *size)`` as it can be told from the channels ``kept``."""
        aligned = resize(self.align(map_s), size)
        generated: Tensor = self.generate(aligned * kept)
        return generated


def resize(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool ``(B, C, H, W)`` where it is larger than ``size``, repeat where smaller."""
    height, width = (min(own, new) for own, new in zip(feature_map.shape[2:], size, strict=True))
    pooled = pool_to(feature_map, height, width)
    if (height, width) == tuple(size):
        return pooled
    return F.interpolate(pooled, size, mode="nearest")
