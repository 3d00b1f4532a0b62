"""Every classification network of torchvision, as ``torchvision:NAME``, with fresh weights.

Paper: see torchvision's page of the network. Deviations: activations do not work in place; where
images have other than three channels, the first convolution is replaced by one that takes them, its
weights drawn with the same standard deviation; GoogLeNet and Inception have no auxiliary heads.
With three channels, a seed gives the weights that torchvision gives. No weights are downloaded.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn

from smskd.models.entry import ModelEntry
from smskd.models.foreign import readable, taps_by_running, unknown_network
from smskd.taps import Taps
from smskd.torchvision_bridge import import_torchvision

PAPER = "torchvision"

_PLAIN = {"aux_logits": False, "init_weights": True}
"""Settings of the networks that would return more than logits; and what they warn about."""

_SETTINGS = {"googlenet": _PLAIN, "inception_v3": _PLAIN}


@cache
def entry(network: str) -> ModelEntry:
    """The zoo's entry of a network.

    Raises:
        UnknownNameError: torchvision has no classification network of this name.
        ConfigError: torchvision is not installed.
    """
    models = import_torchvision().models
    names = models.list_models(module=models)
    if network not in names:
        raise unknown_network("torchvision", network, names)
    return ModelEntry(partial(build, network), partial(taps, network), PAPER, sized=True)


def build(
    network: str, num_classes: int, in_channels: int = 3, image_size: int | None = None
) -> nn.Module:
    """Build a network, untrained.

    Args:
        network: A name of ``torchvision.models``.
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Side of the images; only networks that are made for one size look at it.

    Raises:
        ConfigError: it cannot be built for images of this size.
    """
    models = import_torchvision().models
    settings = {"num_classes": num_classes, **_SETTINGS.get(network, {})}
    settings |= _size_setting(network, image_size)
    name = f"torchvision:{network}"
    model = readable(name, partial(models.get_model, network, weights=None, **settings))
    if in_channels != 3:
        _take_channels(model, in_channels)
    return model


@cache
def taps(network: str) -> Taps:
    """Where the features of a network are, found by running it once."""
    return taps_by_running(f"torchvision:{network}", partial(build, network))


def _size_setting(network: str, image_size: int | None) -> dict[str, Any]:
    if image_size is None:
        return {}
    if network.startswith("vit_"):
        return {"image_size": image_size}
    return {"input_size": (image_size, image_size)} if network.startswith("maxvit") else {}


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replace the convolution that sees the image."""
    path, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, old.stride, old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )  # fmt: skip
    with torch.no_grad():
        nn.init.normal_(new.weight, 0.0, float(old.weight.std()))
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
