"""ResNets for small images: three stages of two-convolution blocks, named ``resnet<depth>``.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
section 4.2. As distillation papers use it: 1x1 convolution shortcuts, He initialisation (fan out).
State-dict keys and seeded initial weights equal those of the networks in the CRD and DKD code, so
checkpoints and starting points carry over (``tests/golden/peer_params.csv``).

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

BLOCK_CONVS = 2
NUM_STAGES = 3

Widths = tuple[int, int, int, int]
"""Channels of the stem and of the three stages."""


SAFE_CHANNELS = 8
"""With fewer input channels, torch 2.13 writes outside its memory in the weight gradient of a
strided 1x1 convolution, channels last, on processors that have AVX2 but not AVX512."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them.

    No operation works in place and the last ReLU is a module of its own, so every module's output
    can be tapped, and ``relu2``'s input is the block's pre-activation.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        out: Tensor = self.relu2(residual + self.downsample(x))
        return out


class ResNet(nn.Module):
    """A stem, three stages of basic blocks, global average pooling and a linear classifier.

    Args:
        depth: Number of weighted layers, 6n + 2 with n blocks a stage.
        widths: Channels of the stem and of the three stages.
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, widths: Widths, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        n = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], n, stride=1)
        self.layer2 = _stage(widths[1], widths[2], n, stride=2)
        self.layer3 = _stage(widths[2], widths[3], n, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


def resnet_taps(depth: int) -> Taps:
    """Taps of a ResNet: f0 is the stem after its ReLU, f1 to f3 are the stages."""
    last = blocks_per_stage(depth) - 1
    stages = [f"layer{i}" for i in range(1, NUM_STAGES + 1)]
    return Taps(
        maps=("relu", *stages),
        preact=("relu:input", *(f"{stage}.{last}.relu2:input" for stage in stages)),
        pooled="fc:input",
        classifier="fc",
        spatial=stages[-1],
    )


def blocks_per_stage(depth: int) -> int:
    """Number n of blocks in each stage of a ResNet of depth 6n + 2."""
    blocks, rest = divmod(depth - 2, NUM_STAGES * BLOCK_CONVS)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}")
    return blocks


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    norm = nn.BatchNorm2d(channels)
    if in_channels >= SAFE_CHANNELS:
        return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm)
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    layers = {"every": EveryNth(stride), "0": conv, "1": norm}  # the keys of the usual form
    return nn.Sequential(OrderedDict(layers))


class EveryNth(nn.Module):
    """Every ``stride``-th row and column: what a strided 1x1 convolution looks at."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        return x[:, :, :: self.stride, :: self.stride]
