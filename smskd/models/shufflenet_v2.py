"""ShuffleNetV2 of width 1 for small images: the ``ShuffleV2`` of distillation papers.

Paper: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", arXiv 1807.11164, table 5. Deviations, all as in the CRD and DKD code, whose state-dict
keys and seeded initial weights it has (``tests/golden/peer_params.csv``): the stem is one 1x1
convolution without stride or pool; torch's default initialisation.

The CRD code trains it at a learning rate of 0.01, not 0.05.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

STEM_CHANNELS = 24
CHANNELS = (116, 232, 464)
LAST_CHANNELS = 1024
UNITS = (3, 7, 3)
"""Number of units after the halving one in each stage."""

BRANCHES = 2


class HalvingUnit(nn.Module):
    """Two branches of stride 2 over the whole input, their channels put together and shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // BRANCHES
        self.conv1 = _channel_wise(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = _channel_wise(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / 2, W / 2)``."""
        short = self.bn1(self.conv1(x))
        short = self.relu2(self.bn2(self.conv2(short)))
        long = self.relu3(self.bn3(self.conv3(x)))
        long = self.bn4(self.conv4(long))
        long = self.relu5(self.bn5(self.conv5(long)))
        return F.channel_shuffle(torch.cat([short, long], 1), BRANCHES)


class SplitUnit(nn.Module):
    """Convolves one half of the channels, keeps the other, then shuffles the two.

    The last unit of a stage offers its pre-activation, both halves in one tensor, as the input of
    ``preact``. Nothing depends on what that module returns, so exported graphs leave it out; one
    ReLU after the concatenation would give the same numbers, but could not be fused with the
    convolution before it.
    """

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        half = channels // BRANCHES
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = _channel_wise(half, stride=1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.preact = nn.Identity() if last else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        kept, made = x.chunk(BRANCHES, dim=1)
        made = self.relu1(self.bn1(self.conv1(made)))
        made = self.bn2(self.conv2(made))
        made = self.bn3(self.conv3(made))
        if self.preact is not None:
            self.preact(torch.cat([kept, made], 1))
        return F.channel_shuffle(torch.cat([kept, self.relu3(made)], 1), BRANCHES)


class ShuffleNetV2(nn.Module):
    """A stem, three stages of units, a 1x1 convolution, global average pooling, a classifier.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(STEM_CHANNELS, CHANNELS[0], UNITS[0])
        self.layer2 = _stage(CHANNELS[0], CHANNELS[1], UNITS[1])
        self.layer3 = _stage(CHANNELS[1], CHANNELS[2], UNITS[2])
        self.conv2 = nn.Conv2d(CHANNELS[2], LAST_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


SHUFFLENET_V2_TAPS = Taps(
    maps=("relu1", "layer1", "layer2", "layer3"),
    preact=(
        "relu1:input",
        *(f"layer{i}.{n}.preact:input" for i, n in enumerate(UNITS, start=1)),
    ),
    pooled="linear:input",
    classifier="linear",
    spatial="relu2",
)
"""Taps: f0 is the stem after its ReLU, f1 to f3 are the stages.

The pre-activations of f1 to f3 have their channels in the order before the shuffle, as in the CRD
code.
"""


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    rest = (SplitUnit(channels, last=i == units - 1) for i in range(units))
    return nn.Sequential(HalvingUnit(in_channels, channels), *rest)


def _channel_wise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
