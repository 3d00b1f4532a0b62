"""Small networks with batch norm and every kind of tap, to try methods on.

Shapes: B batch, C channels, H and W height and width, K classes, D width of the pooled feature.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from smskd.taps import Taps


@dataclass(frozen=True)
class Layout:
    """Sizes of a :class:`ToyNet`.

    Attributes:
        widths: Channels of each block, the stem first.
        strides: How many times smaller each block makes the map, at most 2.
        head: Channels of a last 1x1 block after the last map, as in a MobileNet; 0 leaves it out.
        classes: K.
        last_only: Whether only the last map is tapped.
        traceable: Whether a frozen network can be traced and its batch norms folded.
        tokens: Whether the maps are tapped as ``(B, H * W, C)``, which no method has to understand.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    head: int = 0
    classes: int = 5
    last_only: bool = False
    traceable: bool = True
    tokens: bool = False

    @property
    def taps(self) -> Taps:
        """Where the features of a network of this layout are."""
        blocks = range(len(self.widths))[-1 if self.last_only else 0 :]
        maps = "as_tokens" if self.tokens else "blocks"
        return Taps(
            maps=tuple(f"{maps}.{i}" for i in blocks),
            preact=tuple(f"blocks.{i}.act:input" for i in blocks),
            pooled="fc:input",
            classifier="fc",
            spatial="head",
        )


class ToyNet(nn.Module):
    """Blocks of convolution, batch norm and ReLU, global pooling and a linear classifier."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        c_ins = (3, *layout.widths[:-1])
        sizes = zip(c_ins, layout.widths, layout.strides, strict=True)
        self.blocks = nn.ModuleList(_block(c_in, c, 3, stride) for c_in, c, stride in sizes)
        self.as_tokens = nn.ModuleList(_Tokens() for _ in layout.widths if layout.tokens)
        self.traceable = layout.traceable
        width = layout.head or layout.widths[-1]
        self.head = _block(layout.widths[-1], width, 1, 1) if layout.head else nn.Identity()
        self.fc = nn.Linear(width, layout.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to logits ``(B, K)``."""
        if not (self.traceable or images.shape[1] == 3):  # looking at the data ends a trace
            raise ValueError(f"images of shape {tuple(images.shape)}")
        x = images
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.as_tokens):
                self.as_tokens[i](x)
        x = self.head(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Tokens(nn.Module):
    def forward(self, feature_map: Tensor) -> Tensor:
        return feature_map.flatten(2).transpose(1, 2)


def _block(c_in: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels), act=nn.ReLU()))
