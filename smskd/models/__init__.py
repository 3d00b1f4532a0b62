"""The model zoo: every network by name, as a plain ``nn.Module`` with its taps.

A model maps images ``(B, C, H, W)`` to logits ``(B, K)`` and nothing else; features are read by
:mod:`smskd.taps`. To add one, write its class and add a line to :data:`MODELS`.

Three kinds of names are not in the table: ``torchvision:NAME`` and ``timm:NAME`` are networks of
those packages, and ``NAME@VIEW`` is any of them behind a limited view (``docs/models.md``).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from smskd.errors import ConfigError, unknown_name
from smskd.models.entry import ModelEntry
from smskd.models.hetero import HETERO
from smskd.models.limited_view import VIEWS, limited_entry
from smskd.models.mobilenet_v2 import MOBILENET_V2_TAPS, MobileNetV2
from smskd.models.resnet_cifar import ResNet, Widths, resnet_taps
from smskd.models.resnet_four_stage import (
    RESNET18,
    RESNET50,
    Form,
    FourStageResNet,
    four_stage_taps,
)
from smskd.models.shufflenet_v1 import SHUFFLENET_V1_TAPS, ShuffleNetV1
from smskd.models.shufflenet_v2 import SHUFFLENET_V2_TAPS, ShuffleNetV2
from smskd.models.vgg import VGG, VGG8, VGG11, VGG13, VGG16, VGG19, VGG_TAPS, Convs
from smskd.models.wrn import WRN_TAPS, WideResNet
from smskd.seeding import seeded
from smskd.taps import Taps

__all__ = [
    "MODELS",
    "VIEWS",
    "ModelEntry",
    "build_model",
    "model_entry",
    "outline",
    "taps_of",
]

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


def _resnet(depth: int, widths: Widths) -> ModelEntry:
    return ModelEntry(partial(ResNet, depth, widths), resnet_taps(depth), RESNET_PAPER)


def _wrn(depth: int, widening: int) -> ModelEntry:
    return ModelEntry(partial(WideResNet, depth, widening), WRN_TAPS, WRN_PAPER)


def _vgg(convs: Convs) -> ModelEntry:
    return ModelEntry(partial(VGG, convs), VGG_TAPS, VGG_PAPER)


def _four_stage(form: Form) -> ModelEntry:
    return ModelEntry(partial(FourStageResNet, form), four_stage_taps(form), RESNET_PAPER)


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
    "vgg8": _vgg(VGG8),
    "vgg11": _vgg(VGG11),
    "vgg13": _vgg(VGG13),
    "vgg16": _vgg(VGG16),
    "vgg19": _vgg(VGG19),
    # Spelled as in the tables and checkpoints of distillation papers.
    "ResNet18": _four_stage(RESNET18),
    "ResNet50": _four_stage(RESNET50),
    "MobileNetV2": ModelEntry(partial(MobileNetV2, 6, 0.5), MOBILENET_V2_TAPS, MOBILENET_V2_PAPER),
    "ShuffleV1": ModelEntry(ShuffleNetV1, SHUFFLENET_V1_TAPS, SHUFFLENET_V1_PAPER),
    "ShuffleV2": ModelEntry(ShuffleNetV2, SHUFFLENET_V2_TAPS, SHUFFLENET_V2_PAPER),
    **HETERO,
}


def model_entry(name: str) -> ModelEntry:
    """Look a model up.

    Args:
        name: A key of :data:`MODELS`, ``torchvision:NAME`` or ``timm:NAME``; and any of them with a
            view of :data:`VIEWS` behind an @.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: the package that has it is not installed.
    """
    seen, at, view = name.rpartition("@")
    if at:
        return limited_entry(model_entry(seen), view)
    if name in MODELS:
        return MODELS[name]
    package, _, network = name.partition(":")
    if package == "torchvision":
        from smskd.models import torchvision_zoo

        return torchvision_zoo.entry(network)
    if package == "timm":
        from smskd.models import timm_zoo

        return timm_zoo.entry(network)
    raise unknown_name("model", name, MODELS)


def build_model(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None
) -> nn.Module:
    """Build an untrained network, its weights drawn from torch's global generator.

    Args:
        name: As in :func:`model_entry`.
        num_classes: K, the number of logits.
        in_channels: Channels of the images; any height and width from 8 will do, though a network
            that ends at 1x1 then cannot train on a batch of one, which has nothing to normalise by.
        image_size: Side of the images, for networks that are made for one size; None leaves it to
            them.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: a count is not positive, or the network cannot be built for such images.
    """
    entry = model_entry(name)
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"model {name!r}: {what} must be 1 or more, got {value}")
    size = {"image_size": image_size} if entry.sized else {}
    return entry.build(num_classes=num_classes, in_channels=in_channels, **size)


def outline(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None
) -> nn.Module:
    """The network on the meta device: names and sizes, no weights; arguments as for building it.

    A network that cannot be built there has weights, which moves no generator.
    """
    sizes = (num_classes, in_channels, image_size)
    if model_entry(name).sized:
        with seeded(0):
            return build_model(name, *sizes)
    with torch.device("meta"):
        return build_model(name, *sizes)


def taps_of(name: str) -> Taps:
    """Where a model's features are found; a network of another package is run once to find out.

    Raises:
        UnknownNameError: no model has this name.
        ConfigError: the package that has it is not installed.
    """
    return model_entry(name).found_taps()
