"""Several networks of one architecture as one network: the seeds of a cell trained together.

A folded network takes the images of S networks side by side in the channels ``(B, S*C, H, W)`` and
gives ``(B, S*K)`` logits. Convolutions become grouped, batch norms wider, linear layers blockwise,
so every network computes what it would compute alone, its batch statistics included. Only rounding
differs. Every parameter and statistic keeps its name and holds the S networks' one after another
along its first dimension.

Shapes: S networks, B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from smskd.errors import IncompatibleError
from smskd.taps import MAPS, POOLED, PREACT, Network, Outputs, TappedModel

COUNTER = "num_batches_tracked"
"""The one statistic that is a scalar: the folded network has the first network's."""


Norm = nn.BatchNorm2d | nn.BatchNorm1d
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)


class BlockLinear(nn.Module):
    """S linear layers side by side: ``(B, S*I)`` to ``(B, S*O)``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.count = len(layers)
        self.weight = nn.Parameter(_stacked([layer.weight for layer in layers]))
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else nn.Parameter(_stacked(biases))

    def forward(self, features: Tensor) -> Tensor:
        """Multiply each block with its own matrix."""
        blocks = features.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)
        if self.bias is None:
            out = torch.bmm(blocks, weight)
        else:
            out = torch.baddbmm(self.bias.view(self.count, 1, -1), blocks, weight)
        return out.transpose(0, 1).flatten(1)


def fold(models: Sequence[nn.Module]) -> nn.Module:
    """Build the folded network of ``models``, whose weights are copied.

    Raises:
        IncompatibleError: they hold a layer that cannot be folded, or mix channels otherwise than
            in layers.
    """
    folded = copy.deepcopy(models[0])
    parts = [dict(model.named_modules()) for model in models]
    for name, module in list(folded.named_modules()):
        if not _has_own_state(module):
            continue
        replacement = _fold_layer([part[name] for part in parts])
        parent, _, last = name.rpartition(".")
        setattr(folded.get_submodule(parent), last, replacement)
    folded.train(models[0].training)
    return folded


def why_not(networks: Sequence[Network], images: Tensor) -> str | None:
    """Why networks cannot be folded, or None; found by running both on ``images`` ``(B, C, H, W)``.

    The networks are left as they are.
    """
    models = [copy.deepcopy(network.model).train() for network in networks]
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in models[0].modules()):
        return "dropout draws other random numbers in a folded network"
    try:
        folded = fold(models)
    except IncompatibleError as error:
        return error.message
    taps = networks[0].taps
    roles = frozenset(
        role
        for role, there in ((MAPS, taps.maps), (PREACT, taps.preact), (POOLED, taps.pooled))
        if there
    )
    # Rolled in height too: of one image alone, all networks would be given the same.
    batches = [images.roll((i, i), (0, 2)) for i in range(len(models))]
    try:
        with torch.no_grad(), TappedModel(folded, taps, roles) as tapped:
            together = split(tapped(torch.cat(batches, dim=1)), len(models))
    except RuntimeError as error:
        return f"the folded network does not run: {str(error).splitlines()[0]}"
    for model, batch, ours in zip(models, batches, together, strict=True):
        with torch.no_grad(), TappedModel(model, taps, roles) as tapped:
            if not _close(ours, tapped(batch)):
                return "it mixes channels otherwise than in its layers"
    return None


def split(outputs: Outputs, count: int) -> list[Outputs]:
    """The outputs of each network from those of the folded one."""

    def part(i: int, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(1, (count, -1))
        return parts[:, i]

    return [outputs.map(partial(part, i)) for i in range(count)]


@torch.no_grad()
def unfold(folded: nn.Module, models: Sequence[nn.Module]) -> None:
    """Copy the folded network's parameters and statistics back into ``models``."""
    states = [model.state_dict() for model in models]
    for name, value in folded.state_dict().items():
        # A counter began as the first network's; the others count on from their own.
        steps = value - states[0][name] if name.endswith(COUNTER) else None
        for i, state in enumerate(states):
            if steps is None:
                state[name].copy_(part_of(value, i, len(models)))
            else:
                state[name].add_(steps)


def part_of(value: Tensor, i: int, count: int) -> Tensor:
    """Network ``i``'s part of a folded parameter, statistic or momentum."""
    if not value.dim():
        return value
    size = len(value) // count
    return value[i * size : (i + 1) * size]


def _fold_layer(layers: Sequence[nn.Module]) -> nn.Module:
    first = layers[0]
    if type(first) is nn.Conv2d:
        return _fold_conv(first, layers)
    if isinstance(first, NORMS) and type(first) in NORMS and first.momentum is not None:
        return _fold_norm(first, layers)
    if type(first) is nn.Linear:
        return BlockLinear([layer for layer in layers if isinstance(layer, nn.Linear)])
    raise IncompatibleError(f"a {type(first).__name__} cannot be folded over seeds")


def _fold_conv(first: nn.Conv2d, layers: Sequence[nn.Module]) -> nn.Conv2d:
    count = len(layers)
    conv = copy.deepcopy(first)
    conv.in_channels, conv.out_channels = first.in_channels * count, first.out_channels * count
    conv.groups = first.groups * count
    _take_state(conv, layers)
    return conv


def _fold_norm(first: Norm, layers: Sequence[nn.Module]) -> Norm:
    norm = copy.deepcopy(first)
    norm.num_features *= len(layers)
    _take_state(norm, layers)
    return norm


def _take_state(layer: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Replace the parameters and buffers of ``layer`` by those of all ``layers``."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        values = [getattr(one, name) for one in layers]
        setattr(layer, name, nn.Parameter(_stacked(values), parameter.requires_grad))
    for name, _ in list(layer.named_buffers(recurse=False)):
        values = [getattr(one, name) for one in layers]
        layer.register_buffer(name, values[0].clone() if name == COUNTER else _stacked(values))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    stacked = torch.cat([value.detach() for value in values])
    if stacked.dim() == 4:
        stacked = stacked.contiguous(memory_format=torch.channels_last)
    return stacked


def _has_own_state(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None or (
        next(module.buffers(recurse=False), None) is not None
    )


def _close(one: Outputs, other: Outputs) -> bool:
    pairs = [(one.logits, other.logits), *zip(one.maps, other.maps, strict=True)]
    pairs += zip(one.preact, other.preact, strict=True)
    if one.pooled is not None and other.pooled is not None:
        pairs.append((one.pooled, other.pooled))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
