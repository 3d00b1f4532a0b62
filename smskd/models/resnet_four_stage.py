"""ResNets of four stages for small images: ``ResNet18`` and ``ResNet50`` of distillation papers.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, table
1. For 32x32 images the stem is one 3x3 convolution of stride 1, without the max pool, and the
stride of a bottleneck is in its 3x3 convolution. He initialisation (fan out). State-dict keys and
seeded initial weights equal those of the networks in the CRD and DKD code
(``tests/golden/peer_params.csv``); ``ResNet18`` is in the latter only.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.taps import Taps

STEM_CHANNELS = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them.

    No operation works in place and the last ReLU is a module of its own, so every module's output
    can be tapped, and ``relu2``'s input is the block's pre-activation.
    """

    EXPANSION: ClassVar[int] = 1
    LAST_RELU: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut around them; ``relu3`` is the last ReLU.

    As in the other block, no operation works in place.
    """

    EXPANSION: ClassVar[int] = 4
    LAST_RELU: ClassVar[str] = "relu3"

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = self.EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, 4 * width, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        out: Tensor = self.relu3(residual + self.shortcut(x))
        return out


class Form(NamedTuple):
    """What tells these networks apart.

    Attributes:
        block: Class of the blocks. Its output has ``EXPANSION`` times the channels of its 3x3
            convolution.
        blocks: Number of blocks in each of the four stages.
    """

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, int, int, int]


RESNET18 = Form(BasicBlock, (2, 2, 2, 2))
RESNET50 = Form(Bottleneck, (3, 4, 6, 3))


class FourStageResNet(nn.Module):
    """A stem, four stages of blocks, global average pooling and a linear classifier.

    Args:
        form: Kind and number of the blocks.
        num_classes: K.
        in_channels: Channels of the images.
    """

    def __init__(self, form: Form, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        width, wider = STEM_CHANNELS, form.block.EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(form, 0, width, width, stride=1)
        self.layer2 = _stage(form, 1, wider * width, 2 * width, stride=2)
        self.layer3 = _stage(form, 2, 2 * wider * width, 4 * width, stride=2)
        self.layer4 = _stage(form, 3, 4 * wider * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * wider * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # A pool of static size: a mean would become an operator that ONNX has from opset 18 only.
        x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def four_stage_taps(form: Form) -> Taps:
    """Taps of a ResNet of four stages: f0 is the stem after its ReLU, f1 to f4 are the stages."""
    stages = [f"layer{i}" for i in range(1, len(form.blocks) + 1)]
    last = [f"{stage}.{n - 1}" for stage, n in zip(stages, form.blocks, strict=True)]
    return Taps(
        maps=("relu", *stages),
        preact=("relu:input", *(f"{block}.{form.block.LAST_RELU}:input" for block in last)),
        pooled="linear:input",
        classifier="linear",
        spatial=stages[-1],
    )


def _stage(form: Form, index: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
    channels, count = form.block.EXPANSION * width, form.blocks[index]
    first = form.block(in_channels, width, stride)
    return nn.Sequential(first, *(form.block(channels, width, 1) for _ in range(count - 1)))


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )
