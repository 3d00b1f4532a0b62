"""Networks of other kinds than convolutions, sized for small images; timm builds them.

For pairs of different architecture. All see an image as 8x8 patches (Swin: 16x16), whatever its
size, so at 32x32 a patch is 4x4 pixels (Swin: 2x2).

- ``vit_tiny``: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; 12 blocks,
  192 wide, 3 heads, a class token.
- ``deit_tiny``: Touvron et al., "Training data-efficient image transformers & distillation through
  attention", arXiv 2012.12877; the same with a distillation token, whose head's logits are averaged
  with the class token's. So no single linear layer gives the logits, and it has no classifier tap;
  its pooled feature is the class token's.
- ``swin_tiny``: Liu et al., "Swin Transformer", arXiv 2103.14030; Swin-T's 2, 2, 6 and 2 blocks at
  half its width, windows of 4x4.
- ``mixer_tiny``: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", arXiv
  2105.01601; 8 blocks, 256 wide.

They have no published counterpart at these sizes, so numbers are comparable within this project
only. The weights are drawn as timm draws them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from smskd.models.entry import ModelEntry
from smskd.models.foreign import readable
from smskd.taps import Taps

SMALL = 32
"""Side of the images if nothing else is said."""

GRID, SWIN_GRID = 8, 16
"""Patches along a side of the image."""


def build(
    kind: str, settings: dict[str, Any], grid: int,
    num_classes: int, in_channels: int = 3, image_size: int | None = None,
) -> nn.Module:  # fmt: skip
    """Build a network with patches of the size that gives ``grid`` of them along a side.

    Args:
        kind: Class of ``timm.models``.
        settings: Of the class.
        grid: Patches along a side, as nearly as whole pixels allow.
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Side of the images; None is :data:`SMALL`.

    Raises:
        ConfigError: timm is missing.
    """
    from smskd.models import timm_zoo

    side = image_size or SMALL
    sizes = {"img_size": side, "patch_size": max(1, round(side / grid))}
    network = getattr(timm_zoo.import_timm(f"a {kind}").models, kind)
    make = partial(network, num_classes=num_classes, in_chans=in_channels, **sizes, **settings)
    return readable(kind, make)


def _entry(
    kind: str, taps: Taps, paper: str, size: tuple[int, int], *, grid: int = GRID, **settings: Any
) -> ModelEntry:
    built = partial(build, kind, settings, grid)
    return ModelEntry(built, taps, paper, sized=True, extra="hetero", size=size)


def _blocks(*places: int) -> tuple[str, ...]:
    return tuple(f"blocks.{place}:tokens" for place in places)


_VIT = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_VIT_MAPS = _blocks(2, 5, 8, 11)
_VIT_TAPS = Taps(maps=_VIT_MAPS, pooled="head:input", classifier="head")
_DEIT_TAPS = Taps(maps=_VIT_MAPS, pooled="head:input")
_SWIN_TAPS = Taps(
    maps=("layers.0:nhwc", "layers.1:nhwc", "layers.2:nhwc", "norm:nhwc"),
    pooled="head.fc:input",
    classifier="head.fc",
    spatial="norm:nhwc",
)
_MIXER_TAPS = Taps(
    maps=_blocks(1, 3, 5, 7), pooled="head:input", classifier="head", spatial="norm:tokens"
)

HETERO: dict[str, ModelEntry] = {
    "vit_tiny": _entry(
        "VisionTransformer", _VIT_TAPS, "arXiv 2010.11929", (5_380_132, 345_656_064), **_VIT
    ),
    "deit_tiny": _entry(
        "VisionTransformerDistilled", _DEIT_TAPS, "arXiv 2012.12877", (5_399_816, 350_983_680),
        **_VIT,
    ),
    "swin_tiny": _entry(
        "SwinTransformer", _SWIN_TAPS, "arXiv 2103.14030", (6_932_926, 88_659_456),
        grid=SWIN_GRID, embed_dim=48, window_size=4,
    ),
    "mixer_tiny": _entry(
        "MlpMixer", _MIXER_TAPS, "arXiv 2105.01601", (4_384_100, 302_801_920),
        embed_dim=256, num_blocks=8,
    ),
}  # fmt: skip
"""By name; each needs the extra."""
