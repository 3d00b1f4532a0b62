"""AT: match where in the image the feature maps are active.

Paper: Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer", arXiv 1612.03928.
Loss: ``ce_weight * CE + weight * sum_l mean((q(F_s^l) - q(F_t^l))^2)``, mean over batch and
positions, with ``q(F) = normalise(mean_c |F_c|^p)``, the flattened attention map of unit L2 norm.

Deviations from the paper, all as in RepDistiller and mdistiller: the squared difference instead of
its norm, the mean over channels instead of the sum (the same after normalisation), and the maps 1
to n, without the stem's map 0. If the networks have different numbers of maps, the first ones are
paired and the deeper network's surplus is left out. The larger map is average-pooled to the smaller
(they pool to a square of the smaller height; here height and width are treated alike). They take
F^p, the paper |F|^p: the same for the default p.
Defaults: RepDistiller (``--distill attention``: CE 1, weight 1000, p 2), same in mdistiller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class AT(Method):
    """Hyper-parameters of AT.

    Attributes:
        weight: Weight of the attention term.
        p: Power of the absolute activation, at least 1; higher looks at the strongest ones only.
    """

    name: ClassVar[str] = "at"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Zagoruyko 2017, arXiv 1612.03928"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 1000.0
    p: float = 2.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial maps after the stem's."""
        if self.p < 1:
            return f"p is {self.p:g}; expected at least 1 (the gradient at 0 is infinite below)"
        for who, maps in (("student", shapes.student.maps), ("teacher", shapes.teacher.maps)):
            if len(maps) < 2:
                return (
                    f"the {who} has {len(maps)} feature maps; expected at least 2, as the first, "
                    "the stem's, is not used"
                )
            if any(len(shape) != 3 for shape in maps):
                return f"expected (C, H, W) maps, got {maps} from the {who}"
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared difference of the attention maps, summed over the pairs of maps."""
        pairs = zip(signals.student.maps[1:], signals.teacher.maps[1:], strict=False)
        layers = [_attention_gap(map_s, map_t, self.p) for map_s, map_t in pairs]
        return {"at": self.weight * torch.stack(layers).sum()}


def _attention_gap(map_s: Tensor, map_t: Tensor, p: float) -> Tensor:
    height, width = (min(map_s.shape[d], map_t.shape[d]) for d in (2, 3))
    gap = attention(pool_to(map_s, height, width), p) - attention(pool_to(map_t, height, width), p)
    return gap.square().mean()


def attention(feature_map: Tensor, p: float) -> Tensor:
    """Attention map of unit L2 norm: ``(B, C, H, W)`` to ``(B, H * W)``."""
    return F.normalize(feature_map.abs().pow(p).mean(dim=1).flatten(1))


def pool_to(feature_map: Tensor, height: int, width: int) -> Tensor:
    """Average-pool ``(B, C, H, W)`` to ``(B, C, height, width)``.

    What torch's adaptive pooling computes, whose backward pass on CUDA is not deterministic.
    """
    full_height, full_width = feature_map.shape[2:]
    if (full_height, full_width) == (height, width):
        return feature_map
    if full_height % height or full_width % width:
        rows = _averaging(full_height, height, feature_map)
        columns = _averaging(full_width, width, feature_map)
        return rows @ feature_map @ columns.T
    return F.avg_pool2d(feature_map, (full_height // height, full_width // width))


def _averaging(size: int, pooled: int, like: Tensor) -> Tensor:
    """Matrix ``(pooled, size)`` whose rows average over equally spaced, overlapping windows."""
    # Window i covers the positions floor(i * size / pooled) to ceil((i + 1) * size / pooled) - 1.
    start = torch.arange(pooled, device=like.device).unsqueeze(1) * size
    position = torch.arange(size, device=like.device) * pooled
    inside = (position > start - pooled) & (position < start + size)
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)
