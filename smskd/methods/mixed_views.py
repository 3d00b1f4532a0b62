"""Second views of a batch, mixed from its own images: mixup, CutMix, cutout, CutMixPick.

Papers: mixup arXiv 1710.09412; CutMix arXiv 1905.04899; cutout arXiv 1708.04552; picking the mixed
images that the teacher is least sure of, Wang, Lohit, Jones, Fu, "What Makes a Good Data
Augmentation in Knowledge Distillation", arXiv 2012.02909.

One share, one partner for each image and one box are drawn a batch, from torch's generators of the
images' device, without waiting for it. Shapes: B images ``(B, C, H, W)``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Beta

from smskd.methods.cmkd import relative_entropy

Mixing = Literal["none", "mixup", "cutmix", "cutout", "cutmix_pick"]
"""Ways to mix; "cutmix_pick" mixes like "cutmix", and :func:`least_sure` picks."""

MIXUP_ALPHA, CUTMIX_ALPHA = 0.2, 1.0
CUTOUT_SHARE = 4
"""The square is a quarter of the image's side: 8 of 32 pixels, 16 of 64."""


def mixed(images: Tensor, how: Mixing) -> Tensor:
    """Another view of each image, ``(B, C, H, W)``; the images themselves stay as they are."""
    if how == "mixup":
        share = _beta(MIXUP_ALPHA, images)
        return share * images + (1 - share) * images[_partners(images)]
    if how in ("cutmix", "cutmix_pick"):
        side = (1 - _beta(CUTMIX_ALPHA, images)).sqrt()
        partners = images[_partners(images)]
        return torch.where(_box(images, side), partners, images)
    if how == "cutout":
        square = torch.full_like(images[0, 0, 0, 0], 1 / CUTOUT_SHARE)
        return images.masked_fill(_box(images, square), 0.0)
    return images


def least_sure(logits: Tensor) -> Tensor:
    """Positions of the half of ``(B, K)`` with the highest entropy, the middle one included."""
    order = relative_entropy(logits).argsort(descending=True, stable=True)
    return order[: (len(logits) + 1) // 2]


def _beta(alpha: float, images: Tensor) -> Tensor:
    concentration = torch.full((), alpha, device=images.device)
    # Validation would wait for the device.
    return Beta(concentration, concentration, validate_args=False).sample().to(images.dtype)


def _partners(images: Tensor) -> Tensor:
    return torch.randperm(len(images), device=images.device)


def _box(images: Tensor, side: Tensor) -> Tensor:
    """A box at a random centre, cut off at the border: True inside, ``(H, W)``.

    Args:
        images: Say size and device.
        side: The box's sides over the image's, a scalar.
    """
    height, width = images.shape[2:]
    return _span(height, side).unsqueeze(1) & _span(width, side).unsqueeze(0)


def _span(size: int, side: Tensor) -> Tensor:
    centre = torch.randint(size, (), device=side.device)
    half = (size * side).floor().div(2, rounding_mode="floor")
    position = torch.arange(size, device=side.device)
    return (position >= centre - half) & (position < centre + half)
