"""What a network costs, and the sizes of its features.

MACs (multiply-accumulates) are those of convolutions and linear layers, for one image, as in the
tables of distillation papers; normalisation, activations, pooling and attention products add none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from smskd.models import outline, taps_of
from smskd.taps import MAPS, POOLED, PREACT, SPATIAL, Shapes, probe

ImageShape = tuple[int, int, int]
"""``(C, H, W)``."""

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ModelCost:
    """Size of one network.

    Attributes:
        parameters: Number of scalars in its parameters, trained or not.
        macs: Multiply-accumulates of one image.
    """

    parameters: int
    macs: int


def model_cost(model: nn.Module, image_shape: ImageShape) -> ModelCost:
    """Count parameters and MACs; the model itself is neither run nor changed.

    Args:
        model: Any module that maps ``(1, C, H, W)`` to logits, on any device.
        image_shape: ``(C, H, W)``.
    """
    counts: list[int] = []
    # One real image through a copy. On the meta device it would cost nothing, but torch then first
    # loads its compiler, which takes a second.
    double = copy.deepcopy(model).eval()
    for module in double.modules():
        if isinstance(module, (*_CONVS, *_TRANSPOSED, nn.Linear)):
            module.register_forward_hook(_counter(counts))
    with torch.no_grad():
        double(torch.zeros(1, *image_shape, device=_device(model)))
    return ModelCost(sum(p.numel() for p in model.parameters()), sum(counts))


@cache
def shapes_on_meta(name: str, num_classes: int, image_shape: ImageShape) -> Shapes:
    """Sizes of all the taps of a model of the zoo; no random numbers are drawn.

    Args:
        name: As in :func:`smskd.models.model_entry`.
        num_classes: K.
        image_shape: ``(C, H, W)``.

    Raises:
        UnknownNameError: no model has this name.
    """
    taps = taps_of(name)
    offered = {MAPS: taps.maps, PREACT: taps.preact, POOLED: taps.pooled, SPATIAL: taps.spatial}
    model = outline(name, num_classes, *image_shape[:2])
    image = torch.zeros(1, *image_shape, device=_device(model))
    return probe(model, taps, [role for role, tap in offered.items() if tap], image)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _counter(counts: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)
        elif isinstance(module, _TRANSPOSED):
            per_input = math.prod(module.kernel_size) * module.out_channels // module.groups
            counts.append(inputs[0].numel() * per_input)
        elif isinstance(module, _CONVS):
            per_output = math.prod(module.kernel_size) * module.in_channels // module.groups
            counts.append(output.numel() * per_output)

    return count
