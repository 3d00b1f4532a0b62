"""MobileNetV2 for small images: half width, the ``MobileNetV2`` of distillation papers.

Paper: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", arXiv 1801.04381, table 2. Deviations, all as in the CRD and DKD code, whose
state-dict keys and seeded initial weights it has (``tests/golden/peer_params.csv``): stage 2 has
stride 1, so that 32x32 images end as 2x2; ReLU instead of ReLU6; a first 1x1 convolution in every
block, also where it does not expand; no dropout; widths are cut to whole numbers, not rounded to
multiples of 8.

The stem halves the image at once, which leaves 6.5 million multiply-accumulates. The CRD code
trains it at a learning rate of 0.01, not 0.05.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

STEM_CHANNELS = 32
LAST_CHANNELS = 1280


class Stage(NamedTuple):
    """One row of the paper's table.

    Attributes:
        expands: Whether its blocks widen inside.
        channels: Output channels at width 1.
        blocks: Number of blocks.
        stride: Of the first block; the others have 1.
    """

    expands: bool
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(False, 16, 1, 1),
    Stage(True, 24, 2, 1),
    Stage(True, 32, 3, 2),
    Stage(True, 64, 4, 2),
    Stage(True, 96, 3, 1),
    Stage(True, 160, 3, 2),
    Stage(True, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; no activation at the end.

    The input is added where shape allows. No operation works in place.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.adds_input = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        out: Tensor = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    """A stem of stride 2, seven stages of inverted residuals, a 1x1 convolution, pool, classifier.

    Args:
        expansion: How many times wider the blocks are inside.
        width: Factor on the channels of the stem and the stages.
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(
        self, expansion: int, width: float, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        channels = int(STEM_CHANNELS * width)
        self.conv1 = _conv_norm_relu(in_channels, channels, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        for stage in STAGES:
            out_channels = int(stage.channels * width)
            inner = expansion if stage.expands else 1
            self.blocks.append(_stage(channels, out_channels, stage, inner))
            channels = out_channels
        self.conv2 = _conv_norm_relu(channels, LAST_CHANNELS, kernel=1, stride=1)
        # In a sequence of its own because published checkpoints have it so.
        self.classifier = nn.Sequential(nn.Linear(LAST_CHANNELS, num_classes))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.conv1(images)
        for stage in self.blocks:
            x = stage(x)
        x = self.conv2(x)
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


_TAPPED = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

MOBILENET_V2_TAPS = Taps(
    maps=("conv1", *_TAPPED),
    # The stages end without an activation, so their outputs are pre-activations already.
    preact=("conv1.2:input", *_TAPPED),
    pooled="classifier.0:input",
    classifier="classifier.0",
    spatial="conv2",
)
"""Taps of every width: f0 is the stem after its ReLU, f1 to f4 the stages before each halving."""


def _stage(in_channels: int, channels: int, stage: Stage, expansion: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, channels, stage.stride, expansion)
    rest = (InvertedResidual(channels, channels, 1, expansion) for _ in range(stage.blocks - 1))
    return nn.Sequential(first, *rest)


def _conv_norm_relu(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
