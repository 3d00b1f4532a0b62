"""VGG networks for small images, with batch norm: ``vgg8`` to ``vgg19``.

Paper: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv 1409.1556, table 1. As in the CRD and DKD code, whose state-dict keys and seeded initial
weights it has (``tests/golden/peer_params.csv``): BatchNorm after every convolution, three max
pools only, so that the last two blocks see the same size (they add a fourth for 64x64 images, this
does not), and one linear layer behind a global average pool.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five blocks."""

Convs = tuple[int, int, int, int, int]
"""Number of convolutions in each block."""

VGG8: Convs = (1, 1, 1, 1, 1)
VGG11: Convs = (1, 1, 2, 2, 2)
VGG13: Convs = (2, 2, 2, 2, 2)
VGG16: Convs = (2, 2, 3, 3, 3)
VGG19: Convs = (2, 2, 4, 4, 4)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, three max pools, global average pooling, a classifier.

    No operation works in place. A block ends with a BatchNorm; the ReLU after it is a module of its
    own, so that both sides of it can be tapped.

    Args:
        convs: Number of convolutions in each block.
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, convs: Convs, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        before = (in_channels, *WIDTHS)
        self.block0 = _block(before[0], WIDTHS[0], convs[0])
        self.block1 = _block(before[1], WIDTHS[1], convs[1])
        self.block2 = _block(before[2], WIDTHS[2], convs[2])
        self.block3 = _block(before[3], WIDTHS[3], convs[3])
        self.block4 = _block(before[4], WIDTHS[4], convs[4])
        self.relus = nn.ModuleList(nn.ReLU() for _ in WIDTHS)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.pool(self.relus[0](self.block0(images)))
        x = self.pool(self.relus[1](self.block1(x)))
        x = self.pool(self.relus[2](self.block2(x)))
        x = self.relus[3](self.block3(x))
        x = self.relus[4](self.block4(x))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


VGG_TAPS = Taps(
    maps=tuple(f"relus.{i}" for i in range(len(WIDTHS))),
    preact=tuple(f"relus.{i}:input" for i in range(len(WIDTHS))),
    pooled="classifier:input",
    classifier="classifier",
    spatial=f"relus.{len(WIDTHS) - 1}",
)
"""Taps of every VGG: f0 to f4 are the blocks after their last ReLU, before the pool."""


def _block(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convs):
        if i:
            layers.append(nn.ReLU())
        conv = nn.Conv2d(channels if i else in_channels, channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(channels)]
    return nn.Sequential(*layers)
