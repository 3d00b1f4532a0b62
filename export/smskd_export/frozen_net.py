"""A copy of a student that is ready to be traced: frozen, its batch norms inside its convolutions.

Batch norms are folded here, in float64, and not left to the exporter, which folds in the type of
the graph: in a half model that doubles the error of the logits.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_CLOSE = 1e-3
"""Folding may change the logits by this share of the largest one; the rounding of float32."""


class Normalised(nn.Module):
    """A classifier that takes images in 0..1 and normalises them itself, in float32.

    Args:
        model: The classifier.
        mean: Per channel, of images in 0..1.
        std: As mean.
        half: Whether the classifier computes in float16; it takes and gives float32 all the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], half: bool = False
    ) -> None:
        super().__init__()
        self.model = model.half() if half else model
        self.half_inside = half
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in 0..1 to logits ``(B, K)``."""
        normalised = (images - self.mean) / self.std
        logits: Tensor
        if self.half_inside:
            logits = self.model(normalised.half()).float()
        else:
            logits = self.model(normalised)
        return logits


def frozen_copy(model: nn.Module) -> nn.Module:
    """Deep copy of a model on the CPU, in float32 and evaluation mode."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def fold_norms(model: nn.Module, images: Tensor) -> None:
    """Move every batch norm that directly follows a convolution into it, in place.

    The batch norms stay as modules that change nothing. A model that afterwards says something else
    of ``images`` (because it uses what lies between the two) is put back as it was.

    Args:
        model: A frozen copy.
        images: What it takes, ``(B, C, H, W)``.
    """
    pairs = list(_pairs(model, images))
    state, biases = copy.deepcopy(model.state_dict()), {c: c.bias for c, _ in pairs}
    eps = {norm: norm.eps for _, norm in pairs}
    before = _run(model, images)
    for conv, norm in pairs:
        _fold(conv, norm)
    limit = _CLOSE * float(before.abs().max())
    if float((_run(model, images) - before).abs().max()) <= limit:
        return
    for conv, norm in pairs:
        conv.bias, norm.eps = biases[conv], eps[norm]
    model.load_state_dict(state)


def _run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def _pairs(model: nn.Module, images: Tensor) -> Iterator[tuple[Conv, Norm]]:
    """Convolutions and the batch norms that take exactly what they give, each run once."""
    calls: Counter[nn.Module] = Counter()
    made_by: dict[int, tuple[Conv, Tensor]] = {}
    found: list[tuple[Conv, Norm]] = []

    def after(module: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, Conv):
            made_by[id(given)] = module, given  # the tensor is kept, so its id stays its own
        elif isinstance(module, Norm) and taken and id(taken[0]) in made_by:
            found.append((made_by[id(taken[0])][0], module))

    hooks = [m.register_forward_hook(after) for m in model.modules() if _may_fold(m)]
    try:
        _run(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(conv for conv, _ in found)
    return (p for p in found if calls[p[0]] == calls[p[1]] == uses[p[0]] == 1)


def _may_fold(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module):
        return False
    known = isinstance(module, Norm) and module.running_mean is not None
    return known or isinstance(module, Conv)


def _fold(conv: Conv, norm: Norm) -> None:
    """``norm(conv(x))`` as a convolution alone: ``gain * w`` and ``gain * (b - mean) + shift``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.double()
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(mean)
    if norm.affine:
        gain, shift = gain * norm.weight.double(), norm.bias.double()
    bias = -mean if conv.bias is None else conv.bias.double() - mean
    weight = conv.weight.double() * gain.view(-1, *[1] * (conv.weight.ndim - 1))
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter((gain * bias + shift).float(), requires_grad=False)
    norm.running_mean.fill_(0.0)
    norm.running_var.fill_(1.0)
    norm.eps = 0.0
    if norm.affine:
        norm.weight.fill_(1.0)
        norm.bias.fill_(0.0)
