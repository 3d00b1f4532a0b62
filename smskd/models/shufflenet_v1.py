"""ShuffleNet with 3 groups for small images: the ``ShuffleV1`` of distillation papers.

Paper: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
Mobile Devices", arXiv 1707.01083, table 1. Deviations, all as in the CRD and DKD code, whose
state-dict keys and seeded initial weights it has (``tests/golden/peer_params.csv``): the stem is
one 1x1 convolution without stride or pool; a ReLU after the channel-wise convolution; torch's
default initialisation.

The CRD code trains it at a learning rate of 0.01, not 0.05.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

GROUPS = 3
STEM_CHANNELS = 24
CHANNELS = (240, 480, 960)
BLOCKS = (4, 8, 4)
NARROWING = 4
"""A block's inner convolutions have this many times fewer channels than its last one."""


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel-wise 3x3 and grouped 1x1 convolutions, channels shuffled in between.

    With stride 2 the pooled input is put beside the result, otherwise it is added. No operation
    works in place; ``relu3``'s input is the block's pre-activation.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.joins = stride == 2
        made = channels - in_channels if self.joins else channels
        inner = made // NARROWING
        # Few channels behind the stem: grouping them would starve the groups.
        self.groups = 1 if in_channels == STEM_CHANNELS else GROUPS
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, made, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = nn.AvgPool2d(3, stride, padding=1) if self.joins else nn.Identity()
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        made = self.relu1(self.bn1(self.conv1(x)))
        if self.groups > 1:
            made = F.channel_shuffle(made, self.groups)
        made = self.relu2(self.bn2(self.conv2(made)))
        made = self.bn3(self.conv3(made))
        kept = self.shortcut(x)
        out: Tensor = self.relu3(torch.cat([made, kept], 1) if self.joins else made + kept)
        return out


class ShuffleNetV1(nn.Module):
    """A stem, three stages of shuffle units, global average pooling and a linear classifier.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU()
        self.layer1 = _stage(STEM_CHANNELS, CHANNELS[0], BLOCKS[0])
        self.layer2 = _stage(CHANNELS[0], CHANNELS[1], BLOCKS[1])
        self.layer3 = _stage(CHANNELS[1], CHANNELS[2], BLOCKS[2])
        self.linear = nn.Linear(CHANNELS[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


SHUFFLENET_V1_TAPS = Taps(
    maps=("relu", "layer1", "layer2", "layer3"),
    preact=(
        "relu:input",
        *(f"layer{i}.{n - 1}.relu3:input" for i, n in enumerate(BLOCKS, start=1)),
    ),
    pooled="linear:input",
    classifier="linear",
    spatial="layer3",
)
"""Taps: f0 is the stem after its ReLU, f1 to f3 are the stages."""


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = ShuffleUnit(in_channels, channels, 2)
    return nn.Sequential(first, *(ShuffleUnit(channels, channels, 1) for _ in range(blocks - 1)))
