"""A strong view of a batch: each image under two random distortions, with a square cut out.

The distortions are those of RandAugment (2, 10) as the MLLD code has it: 2 of 14 operations, each
of random strength, then a cutout; the 10 is not used. Here they work on tensors of any device
instead of single PIL images; each image draws its own from the global generator of its device.

Deviations from that code: it distorts another crop and flip of the picture, this the student's own
view. Methods see normalised images and no mean and deviation, so the smallest and largest value of
each channel in the batch stand for black and white, and 0, the mean colour, fills the cutout. Grey
is the mean of the channels, shears keep the middle instead of a corner, and values between the
levels of 8 bits stay.

Shapes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

Change = Callable[[Tensor, Tensor], Tensor]
"""Images ``(B, C, H, W)`` in [0, 1] and strengths ``(B, 1, 1, 1)`` in [0, 1) to images."""

TURN, SHEAR, SHIFT = pi / 6, 0.3, 0.3
"""Limits of the movements: 30 degrees, and parts of the image's side."""


@torch.no_grad()
def strong_view(images: Tensor, distortions: int = 2) -> Tensor:
    """Distort each image by random operations.

    Args:
        images: ``(B, C, H, W)``, normalised.
        distortions: Number of operations an image, besides the cutout.

    Returns:
        ``(B, C, H, W)``, new memory.
    """
    black, white = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    extent = (white - black).clamp(min=torch.finfo(images.dtype).tiny)
    changed = (images - black) / extent
    for _ in range(distortions):
        changed = _distort(changed)
    return _cut_out(changed * extent + black)


def _distort(images: Tensor) -> Tensor:
    """One random operation of random strength an image."""
    which = torch.randint(len(CHANGES) + MOVEMENTS, (len(images), 1, 1, 1), device=images.device)
    strength = _uniform(images)
    changed = images
    for number, change in enumerate(CHANGES):
        changed = torch.where(which == number, change(images, strength), changed)
    return move(changed, which.flatten() - len(CHANGES), strength.flatten())


def _uniform(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _cut_out(images: Tensor) -> Tensor:
    """Set a square of up to half the width, anywhere in the image, to 0."""
    height, width = images.shape[2:]
    side = 0.5 * width * _uniform(images)
    inside = torch.ones((), dtype=torch.bool, device=images.device)
    for dim, size in ((2, height), (3, width)):
        first = (size * _uniform(images) - side / 2).clamp(min=0).floor()
        shape = [1, 1, 1, 1]
        shape[dim] = size
        place = torch.arange(size, device=images.device).view(shape)
        inside = inside & (place >= first) & (place <= first + side)
    return images.masked_fill(inside, 0.0)


MOVEMENTS = 5
"""Turn, shear along either side, shift along either side."""


def move(images: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    """Turn, shear or shift each image; what comes in from outside is black.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        which: Movement from 0 to 4, others for none ``(B,)``.
        strength: From 0 to 1, 0.5 for no effect ``(B,)``.

    Returns:
        ``(B, C, H, W)``, each pixel that of the nearest place it comes from.
    """
    height, width = images.shape[2:]
    amount = 2.0 * strength - 1.0
    nothing = torch.zeros_like(amount)

    def only(number: int, value: Tensor) -> Tensor:
        return torch.where(which == number, value, nothing)

    angle = only(0, TURN * amount)
    cos, sin = angle.cos(), angle.sin()
    # Places count from -1 to 1 along either side, whatever its length.
    right = torch.stack(
        [cos, (only(1, SHEAR * amount) - sin) * (height / width), only(3, 2 * SHIFT * amount)], 1
    )
    down = torch.stack(
        [(only(2, SHEAR * amount) + sin) * (width / height), cos, only(4, 2 * SHIFT * amount)], 1
    )
    grid = F.affine_grid(torch.stack([right, down], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def keep(images: Tensor, strength: Tensor) -> Tensor:
    """The images as they are."""
    return images


def stretch(images: Tensor, strength: Tensor) -> Tensor:
    """Spread each channel of an image over the whole range."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    extent = high - low
    return torch.where(extent > 0, (images - low) / extent.where(extent > 0, 1.0), images)


def equalise(images: Tensor, strength: Tensor) -> Tensor:
    """Give each channel of an image evenly spread values: the part of pixels that are not above."""
    flat = images.flatten(2).contiguous()
    ordered = flat.sort(dim=2).values
    count = torch.searchsorted(ordered, flat, right=True)
    lowest = count.amin(2, keepdim=True)
    spread = (count - lowest) / (flat.shape[2] - lowest).clamp(min=1)
    return torch.where(lowest < flat.shape[2], spread, flat).view_as(images).to(images.dtype)


def darken(images: Tensor, strength: Tensor) -> Tensor:
    """Mix with black."""
    return _mixed(images, torch.zeros_like(images), strength)


def bleach(images: Tensor, strength: Tensor) -> Tensor:
    """Mix with the grey image."""
    return _mixed(images, images.mean(1, keepdim=True), strength)


def flatten_contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Mix with the image's mean grey."""
    return _mixed(images, images.mean((1, 2, 3), keepdim=True), strength)


def blur(images: Tensor, strength: Tensor) -> Tensor:
    """Mix with the smoothed image: weight 5 on a pixel, 1 on each of its 8 neighbours."""
    neighbours = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return _mixed(images, (9.0 * neighbours + 4.0 * images) / 13.0, strength)


def posterise(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the upper 4 to 7 of 8 bits."""
    step = 2.0 ** (8.0 - (4.0 + 4.0 * strength).floor())
    return (images * 255.0 / step).floor() * step / 255.0


def solarise(images: Tensor, strength: Tensor) -> Tensor:
    """Invert what is as bright as the strength."""
    return torch.where(images >= strength, 1.0 - images, images)


def _mixed(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Between 5 and 95 % of the images, the rest of the other."""
    return other + (0.05 + 0.9 * strength) * (images - other)


CHANGES: tuple[Change, ...] = (
    keep, stretch, equalise, darken, bleach, flatten_contrast, blur, posterise, solarise,
)  # fmt: skip
