"""ReviewKD: each teacher map is learned by the student's map of its depth and all deeper ones.

Paper: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", arXiv 2104.09044.
Loss: ``ce_weight * CE + ramp * weight * sum_l HCL(R_l, F_t^l)`` over the maps l after the stem's,
and the pooled feature as a 1x1 map of its own. From the deepest to the shallowest, a fusion module
(the paper's ABF) squeezes student map l to M channels (1x1 convolution, batch norm), adds the
deeper module's result, resized, with two gates a position (sigmoid of a 1x1 convolution of both),
resizes the sum to the teacher's size, passes it on, and expands it to R_l with the teacher's
channels (3x3 convolution, batch norm). HCL is the mean squared difference of the maps and of both
average-pooled to 4x4, 2x2 and 1x1 where that is smaller, with weights 1, 1/2, 1/4, 1/8 over their
sum. M is the width of the student's pooled feature, at most ``max_inner_channels``.
``ramp = min(epoch / warmup_epochs, 1)``, with epochs counted from 1. As in the authors' code, the
student's maps are those after the activation, the teacher's those before.

Deviations from the authors' code: their sizes and widths are typed by hand for each pair of
networks; here they are found, so all pairs work. Networks with different numbers of maps are paired
from the deepest on. Resizing is by nearest neighbour like theirs. They count epochs of the ramp
from 0; mdistiller from 1. mdistiller reads its setting MAX_MID_CHANNEL and then takes 512
(``compat: mdistiller``), where the authors' MobileNet on ImageNet has 256. In a batch of one the
batch norms of 1x1 maps use their running statistics.
Defaults: the authors' scripts (CE 1, 20 warm-up epochs, weight 5 for wrn40-2-wrn16-2,
wrn40-2-wrn40-1, wrn40-2-ShuffleV1, resnet32x4-8x4 and resnet32x4-ShuffleV1). They use 8 for
resnet32x4-ShuffleV2, 0.6 for resnet56-20 and 1 for resnet110-32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import no_pooled
from smskd.methods.srrl import conv_norm
from smskd.taps import MAPS, POOLED, PREACT, Outputs

LEVELS = (4, 2, 1)
"""Heights and widths to which maps are pooled before they are compared."""


@dataclass(frozen=True)
class ReviewKD(Method):
    """Hyper-parameters of ReviewKD.

    Attributes:
        weight: Weight of the sum over the maps.
        warmup_epochs: Epochs over which it grows linearly to full weight; 0 for none.
        max_inner_channels: Most channels of what the fusion modules pass on.
        compat: "mdistiller" takes 512 for the most channels, whatever is set.
    """

    name: ClassVar[str] = "reviewkd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen 2021, arXiv 2104.09044"
    needs: ClassVar[Needs] = Needs(True, frozenset({MAPS, POOLED}), frozenset({PREACT, POOLED}))
    silent: ClassVar[frozenset[str]] = frozenset({"compat"})

    weight: float = 5.0
    warmup_epochs: int = 20
    max_inner_channels: int = 512
    compat: Literal["none", "mdistiller"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial maps after the stem's, and a pooled feature."""
        if self.max_inner_channels < 1:
            return f"max_inner_channels is {self.max_inner_channels}; expected at least 1"
        sides = (
            ("student", shapes.student.maps, shapes.student.pooled),
            ("teacher", shapes.teacher.preact, shapes.teacher.pooled),
        )
        for who, maps, pooled in sides:
            if len(maps) < 2:
                return (
                    f"the {who} has {len(maps)} feature maps; expected at least 2, as the first, "
                    "the stem's, is not used"
                )
            if any(len(shape) != 3 for shape in maps):
                return f"expected (C, H, W) maps, got {maps} from the {who}"
            if reason := no_pooled(who, pooled):
                return reason
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The fusion modules."""
        student, teacher = shapes.student, shapes.teacher
        count = min(len(student.maps), len(teacher.preact)) - 1
        widths = [*(shape[0] for shape in student.maps[-count:]), student.pooled]
        targets = [*teacher.preact[-count:], (teacher.pooled, 1, 1)]
        limit = 512 if self.compat == "mdistiller" else self.max_inner_channels
        return _Review(widths, targets, min(student.pooled, limit))

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Hierarchical gaps of the reviewed maps, summed over the depths."""
        student, teacher = signals.student, signals.teacher
        count = min(len(student.maps), len(teacher.preact)) - 1
        reviewed = modules([*student.maps[-count:], _pooled_map(student)])
        targets = [*teacher.preact[-count:], _pooled_map(teacher)]
        gaps = [hierarchical_gap(r, t) for r, t in zip(reviewed, targets, strict=True)]
        scale = self._ramp(signals.epoch) * self.weight
        return {"review": scale * signals.mean(torch.stack(gaps).sum(dim=0))}

    def _ramp(self, epoch: int) -> float:
        return min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs > 0 else 1.0


class _Review(nn.Module):
    """The fusion modules; widths and targets from the shallowest map to the pooled feature."""

    def __init__(
        self, widths: Sequence[int], targets: Sequence[tuple[int, ...]], inner: int
    ) -> None:
        super().__init__()
        self.sizes = [(height, width) for _, height, width in targets]
        last = len(widths) - 1
        self.fusions = nn.ModuleList(
            _Fusion(width, inner, target[0], fuse=i < last)
            for i, (width, target) in enumerate(zip(widths, targets, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The reviewed maps, in the order of the student's."""
        deeper = None
        reviewed = []
        for fusion, feature_map, size in reversed(
            list(zip(self.fusions, maps, self.sizes, strict=True))
        ):
            result, deeper = fusion(feature_map, deeper, size)
            reviewed.append(result)
        return reviewed[::-1]


class _Fusion(nn.Module):
    def __init__(self, c_in: int, inner: int, c_out: int, fuse: bool) -> None:
        super().__init__()
        self.squeeze = conv_norm(c_in, inner)
        self.expand = conv_norm(inner, c_out, 3)
        for part in (self.squeeze, self.expand):
            nn.init.kaiming_uniform_(part.get_parameter("conv.weight"), a=1)
        self.gate = nn.Conv2d(2 * inner, 2, 1) if fuse else None

    def forward(
        self, feature_map: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The map in the teacher's channels and size, and what is passed on."""
        x = self.squeeze(feature_map)
        if self.gate is not None and deeper is not None:
            deeper = _nearest(deeper, x.shape[2:])
            gates = torch.sigmoid(self.gate(torch.cat([x, deeper], dim=1)))
            x = x * gates[:, :1] + deeper * gates[:, 1:]
        x = _nearest(x, size)
        return self.expand(x), x


def hierarchical_gap(map_s: Tensor, map_t: Tensor) -> Tensor:
    """HCL of each sample: two ``(B, C, H, W)`` to ``(B,)``."""
    height, width = map_s.shape[2:]
    levels = [level for level in LEVELS if level < max(height, width)]
    sizes = [(height, width), *((min(height, level), min(width, level)) for level in levels)]
    weights = [0.5**i for i in range(len(sizes))]
    gaps = [
        weight * (pool_to(map_s, *size) - pool_to(map_t, *size)).square().mean(dim=(1, 2, 3))
        for weight, size in zip(weights, sizes, strict=True)
    ]
    return torch.stack(gaps).sum(dim=0) / sum(weights)


def _nearest(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    if feature_map.shape[2:] == tuple(size):
        return feature_map
    return F.interpolate(feature_map, size, mode="nearest")


def _pooled_map(outputs: Outputs) -> Tensor:
    assert outputs.pooled is not None  # asked for in needs
    return outputs.pooled[:, :, None, None]
