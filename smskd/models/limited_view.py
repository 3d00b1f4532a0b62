"""Limited views: a network that sees only a part of what is in its images, ``NAME@VIEW``.

For privileged teachers: the student sees a grey, a coarse or a cropped image, in training and in
use, while its teacher sees all of it (Lopez-Paz, Bottou, Schoelkopf, Vapnik, "Unifying distillation
and privileged information", arXiv 1511.03643). Each view is a fixed, differentiable function of the
image that draws no random numbers and keeps its shape, so any network can stand behind it:

- ``grey``: every channel becomes the mean of the channels;
- ``low_res``: the mean of each 2x2 pixels, in place of all four;
- ``centre``: everything but the central half, in height and in width, is set to 0, which in
  normalised images is their mean colour.

Shapes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import unknown_name
from smskd.models.entry import ModelEntry
from smskd.taps import Taps


def grey(images: Tensor) -> Tensor:
    """Every channel is the mean of the channels."""
    # A sum: a mean would become an operator that ONNX has from opset 18 only.
    mean = images.sum(dim=1, keepdim=True) / images.shape[1]
    return mean.expand_as(images)


def low_res(images: Tensor) -> Tensor:
    """Every 2x2 pixels are their mean; at an odd border, what there is of them."""
    height, width = images.shape[2:]
    coarse = F.avg_pool2d(images, 2, ceil_mode=True)
    rows, columns = coarse.shape[2:]
    # Expanded by hand: interpolate() becomes an operator that changed between ONNX opsets.
    blocks = coarse.reshape(-1, coarse.shape[1], rows, 1, columns, 1).expand(-1, -1, -1, 2, -1, 2)
    return blocks.reshape(-1, coarse.shape[1], 2 * rows, 2 * columns)[:, :, :height, :width]


def centre(images: Tensor) -> Tensor:
    """Pixels outside the central half of the height and of the width are 0."""
    height, width = images.shape[2:]
    seen = _central(height, images.device)[:, None] & _central(width, images.device)
    return torch.where(seen, images, torch.zeros((), dtype=images.dtype, device=images.device))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {"grey": grey, "low_res": low_res, "centre": centre}
"""By the name behind the @."""


class LimitedView(nn.Module):
    """A network behind a view.

    Args:
        net: Any network that maps images ``(B, C, H, W)`` to logits ``(B, K)``.
        view: A key of :data:`VIEWS`.
    """

    def __init__(self, net: nn.Module, view: str) -> None:
        super().__init__()
        self.net = net
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        logits: Tensor = self.net(VIEWS[self.view](images))
        return logits

    def extra_repr(self) -> str:
        """The view, in the printed form."""
        return f"view={self.view}"


def limited_entry(entry: ModelEntry, view: str) -> ModelEntry:
    """The zoo's entry of a network behind a view.

    Raises:
        UnknownNameError: there is no such view.
    """
    if view not in VIEWS:
        raise unknown_name("limited view", view, VIEWS)

    def build(**sizes: int | None) -> nn.Module:
        return LimitedView(entry.build(**sizes), view)

    return replace(entry, build=build, taps=lambda: behind("net", entry.found_taps()))


def behind(name: str, taps: Taps) -> Taps:
    """The taps of a network that became the submodule ``name`` of another."""

    def moved(tap: str | None) -> str | None:
        return None if tap is None else f"{name}.{tap}"

    return Taps(
        maps=tuple(f"{name}.{tap}" for tap in taps.maps),
        preact=tuple(f"{name}.{tap}" for tap in taps.preact),
        pooled=moved(taps.pooled),
        classifier=moved(taps.classifier),
        spatial=moved(taps.spatial),
    )


def _central(size: int, device: torch.device) -> Tensor:
    """Which of ``size`` positions are in the central half."""
    place = torch.arange(size, device=device)
    margin = size // 4
    return (place >= margin) & (place < size - margin)
