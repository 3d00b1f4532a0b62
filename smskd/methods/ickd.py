"""ICKD: channels that are alike to the teacher shall be alike to the student.

Paper: Liu, Huang, Lin, Xie, Wang, Chang, Liang, "Exploring Inter-Channel Correlation for
Diversity-preserved Knowledge Distillation", arXiv 2202.03680 (ICKD-C, for classification).
Loss: ``ce_weight * CE + weight * mean_b(||G_s - G_t||_F^2 / C_t)``, where ``G = rownorm(F F^T)`` is
``(B, C_t, C_t)`` with rows of unit L2 norm, and F is the last map as ``(B, C_t, H * W)``. The
student's has C_t channels after a 1x1 convolution without bias and a batch norm, both trained with
the student and dropped after the stage. Channels are correlated over all positions of an image, so
the maps may have any size.

Deviations from the paper: its correlation matrices are not normalised and their squared distance is
divided by C^2; row norms and the division by C are those of the authors' CIFAR-100 code, whose
published numbers need them. Rows of zeros, channels that are dead, stay zero.
Defaults: the authors' code (``--distill ickd``: CE 1, KD 0, weight 2.5, last map). With KD it is
the joint stage [ickd, kd].
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class ICKD(Method):
    """Hyper-parameters of ICKD.

    Attributes:
        weight: Weight of the correlation term.
    """

    name: ClassVar[str] = "ickd"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Liu 2021, arXiv 2202.03680"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 2.5

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a spatial map."""
        for who, maps in (("student", shapes.student.maps), ("teacher", shapes.teacher.maps)):
            if not maps:
                return f"the {who} has no feature map; expected at least 1"
            if len(maps[-1]) != 3:
                return f"expected a last map (C, H, W), got {maps[-1]} from the {who}"
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The adapter of the student's last map: C_s to C_t channels."""
        channels_s, channels_t = shapes.student.maps[-1][0], shapes.teacher.maps[-1][0]
        conv = nn.Conv2d(channels_s, channels_t, kernel_size=1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels_t)))

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared distance of the correlation matrices, per row."""
        adapted_s = modules(signals.student.maps[-1])
        gap = channel_similarity(adapted_s) - channel_similarity(signals.teacher.maps[-1])
        return {"ickd": self.weight * signals.mean(gap.square().sum(dim=2).mean(dim=1))}


def channel_similarity(feature_map: Tensor) -> Tensor:
    """Row-normalised Gram matrix of the channels: ``(B, C, H, W)`` to ``(B, C, C)``."""
    flat = feature_map.flatten(2)
    return F.normalize(flat @ flat.transpose(1, 2), dim=2)
