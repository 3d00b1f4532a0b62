"""The model zoo: every network by name, as a plain ``nn.Module`` with its taps.

A model maps images ``(B, C, H, W)`` to logits ``(B, K)`` and nothing else; features are read by
:mod:`smskd.taps`. To add one, write its class and add a line to :data:`MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from smskd.errors import ConfigError, unknown_name
from smskd.models.mobilenet_v2 import MOBILENET_V2_TAPS, MobileNetV2
from smskd.models.resnet_bottleneck import RESNET50, BottleneckResNet, bottleneck_taps
from smskd.models.resnet_cifar import ResNet, Widths, resnet_taps
from smskd.models.shufflenet_v1 import SHUFFLENET_V1_TAPS, ShuffleNetV1
from smskd.models.shufflenet_v2 import SHUFFLENET_V2_TAPS, ShuffleNetV2
from smskd.models.vgg import VGG, VGG8, VGG13, VGG_TAPS
from smskd.models.wrn import WRN_TAPS, WideResNet
from smskd.taps import Taps

RESNET_PAPER = "arXiv 1512.03385"
WRN_PAPER = "arXiv 1605.07146"
VGG_PAPER = "arXiv 1409.1556"
MOBILENET_V2_PAPER = "arXiv 1801.04381"
SHUFFLENET_V1_PAPER = "arXiv 1707.01083"
SHUFFLENET_V2_PAPER = "arXiv 1807.11164"

_BASE: Widths = (16, 16, 32, 64)
_HALF: Widths = (8, 8, 16, 32)
_QUARTER: Widths = (4, 4, 8, 16)
_X4: Widths = (32, 64, 128, 256)


@dataclass(frozen=True)
class ModelEntry:
    """One line of the zoo.

    Attributes:
        build: Called with ``num_classes`` and ``in_channels``; returns the untrained network.
        taps: Where its features are found.
        paper: Where the architecture comes from.
        version: Raised when a change of the code changes results; part of a stage run's key.
    """

    build: Callable[..., nn.Module]
    taps: Taps
    paper: str
    version: int = 1


def _resnet(depth: int, widths: Widths) -> ModelEntry:
    return ModelEntry(partial(ResNet, depth, widths), resnet_taps(depth), RESNET_PAPER)


def _wrn(depth: int, widening: int) -> ModelEntry:
    return ModelEntry(partial(WideResNet, depth, widening), WRN_TAPS, WRN_PAPER)


MODELS: dict[str, ModelEntry] = {
    "resnet8": _resnet(8, _BASE),
    "resnet14": _resnet(14, _BASE),
    "resnet20": _resnet(20, _BASE),
    "resnet32": _resnet(32, _BASE),
    "resnet44": _resnet(44, _BASE),
    "resnet56": _resnet(56, _BASE),
    "resnet110": _resnet(110, _BASE),
    "resnet8x4": _resnet(8, _X4),
    "resnet32x4": _resnet(32, _X4),
    "resnet8_quarter": _resnet(8, _QUARTER),
    "resnet8_half": _resnet(8, _HALF),
    "resnet14_half": _resnet(14, _HALF),
    "wrn_16_1": _wrn(16, 1),
    "wrn_16_2": _wrn(16, 2),
    "wrn_40_1": _wrn(40, 1),
    "wrn_40_2": _wrn(40, 2),
    "vgg8": ModelEntry(partial(VGG, VGG8), VGG_TAPS, VGG_PAPER),
    "vgg13": ModelEntry(partial(VGG, VGG13), VGG_TAPS, VGG_PAPER),
    # Spelled as in the tables and checkpoints of distillation papers.
    "ResNet50": ModelEntry(
        partial(BottleneckResNet, RESNET50), bottleneck_taps(RESNET50), RESNET_PAPER
    ),
    "MobileNetV2": ModelEntry(partial(MobileNetV2, 6, 0.5), MOBILENET_V2_TAPS, MOBILENET_V2_PAPER),
    "ShuffleV1": ModelEntry(ShuffleNetV1, SHUFFLENET_V1_TAPS, SHUFFLENET_V1_PAPER),
    "ShuffleV2": ModelEntry(ShuffleNetV2, SHUFFLENET_V2_TAPS, SHUFFLENET_V2_PAPER),
}


def model_entry(name: str) -> ModelEntry:
    """Look a model up.

    Raises:
        UnknownNameError: no model has this name.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return MODELS[name]


def build_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build an untrained network, its weights drawn from torch's global generator.

    Args:
        name: A key of :data:`MODELS`.
        num_classes: K, the number of logits.
        in_channels: Channels of the images; any height and width from 8 will do, though a network
            that ends at 1x1 then cannot train on a batch of one, which has nothing to normalise by.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: a count is not positive.
    """
    entry = model_entry(name)
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"model {name!r}: {what} must be 1 or more, got {value}")
    return entry.build(num_classes=num_classes, in_channels=in_channels)


def taps_of(name: str) -> Taps:
    """Where a model's features are found.

    Raises:
        UnknownNameError: no model has this name.
    """
    return model_entry(name).taps
