"""Wide ResNets for small images: pre-activation blocks, named ``wrn_<depth>_<widening>``.

Paper: Zagoruyko, Komodakis, "Wide Residual Networks", arXiv 1605.07146. Without dropout, as
distillation papers use it. State-dict keys and seeded initial weights equal those of the networks
in the CRD and DKD code (``tests/golden/peer_params.csv``).

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

BLOCK_CONVS = 2
NUM_STAGES = 3
STEM_CHANNELS = 16


class PreActBlock(nn.Module):
    """BatchNorm and ReLU come before each of two 3x3 convolutions.

    Where the width changes, the 1x1 shortcut starts after the first ReLU; elsewhere it is the
    block's raw input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # This spelling is what published checkpoints hold.
        self.convShortcut = (
            None
            if in_channels == channels
            else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    """A row of blocks; the first one changes width and resolution."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(in_channels, channels, stride)
        rest = (PreActBlock(channels, channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """A stem, three stages of pre-activation blocks, global average pooling, a linear classifier.

    Args:
        depth: 6n + 4 with n blocks a stage.
        widening: The stages have 16, 32 and 64 times this many channels.
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, widening: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        n = _blocks_per_stage(depth)
        width = STEM_CHANNELS * widening
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.block1 = Stage(STEM_CHANNELS, width, n, stride=1)
        self.block2 = Stage(width, 2 * width, n, stride=2)
        self.block3 = Stage(2 * width, 4 * width, n, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4 * width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        x = self.relu(self.bn1(x))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


WRN_TAPS = Taps(
    maps=("conv1", "block1", "block2", "block3"),
    # The BatchNorm after each map, read where the network runs it: a second call for the feature's
    # sake would update its running statistics twice a step.
    preact=("block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"),
    pooled="fc:input",
    classifier="fc",
    spatial="relu",
)
"""Taps of every Wide ResNet: f0 is the stem's convolution, f1 to f3 are raw stage outputs."""


def _blocks_per_stage(depth: int) -> int:
    blocks, rest = divmod(depth - 4, NUM_STAGES * BLOCK_CONVS)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
    return blocks
