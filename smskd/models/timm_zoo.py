"""Every network of timm, as ``timm:NAME``, with fresh weights; timm is an extra.

Paper: see timm's page of the network. Deviation: activations do not work in place. Networks that
are made for one size of image are built for the size of the data set's. No weights are downloaded.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from smskd.errors import ConfigError
from smskd.models.entry import ModelEntry
from smskd.models.foreign import readable, taps_by_running, unknown_network
from smskd.taps import Taps
from smskd.torchvision_bridge import import_torchvision

PAPER = "timm"
EXTRA = "hetero"


@cache
def entry(network: str) -> ModelEntry:
    """The zoo's entry of a network.

    Raises:
        UnknownNameError: timm has no network of this name.
        ConfigError: timm is not installed.
    """
    timm = import_timm(f"timm:{network}")
    # Asked before anything is built: timm also reads names that mean a download.
    if not timm.is_model(network):
        raise unknown_network("timm", network, timm.list_models())
    how = partial(build, network), partial(taps, network)
    return ModelEntry(*how, PAPER, sized=True, extra=EXTRA)


def build(
    network: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **more: Any
) -> nn.Module:
    """Build a network, untrained.

    Args:
        network: A name of ``timm.list_models()``.
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Side of the images; only networks that are made for one size look at it.
        more: Further settings of the network.

    Raises:
        ConfigError: timm is missing, or it cannot be built for images of this size.
    """
    name = f"timm:{network}"
    timm = import_timm(name)
    if image_size is not None and timm.get_pretrained_cfg(network).fixed_input_size:
        more["img_size"] = image_size
    make = partial(timm.create_model, network, pretrained=False, num_classes=num_classes)
    return readable(name, partial(make, in_chans=in_channels, **more))


@cache
def taps(network: str) -> Taps:
    """Where the features of a network are, found by running it once."""
    return taps_by_running(f"timm:{network}", partial(build, network))


def import_timm(wanted: str) -> ModuleType:
    """The timm package; ``wanted`` is what it is needed for.

    Raises:
        ConfigError: it, or torchvision, is not installed.
    """
    import_torchvision()  # timm imports it, and would fail on its operators
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError(
            f"{wanted} needs timm, which is not installed", f"pip install 'smskd-bench[{EXTRA}]'"
        ) from None
