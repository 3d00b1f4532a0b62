"""Classifiers on a feature map, as OFA-KD puts them on every stage of a student.

:class:`ConvBranch` suits maps of convolutional networks, :class:`AttentionBranch` the tokens of
transformers and MLPs. Shapes: B batch, K classes, C channels, H and W height and width, D width.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from smskd.methods.srrl import AnyBatchNorm2d

GRID = 7
"""Size that patch merging comes to: halving again would leave fewer patches a side."""

HEADS = 4


class ConvBranch(nn.Module):
    """Halves a map with separable convolutions, averages it and classifies.

    Args:
        channels: C of the map.
        halvings: Number of blocks, each with twice the channels of the one before; 0 is a 1x1
            convolution.
        width: Channels after the last block.
        classes: K.
    """

    def __init__(self, channels: int, halvings: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [channels * 2**i for i in range(halvings)] + [width]
        blocks: list[nn.Module] = [SeparableConv(*pair) for pair in pairwise(widths)]
        self.blocks = nn.Sequential(*(blocks or [nn.Conv2d(channels, width, 1)]))
        self.classifier = nn.Linear(width, classes)
        draw_weights(self)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Logits ``(B, K)`` of a map ``(B, C, H, W)``."""
        logits: Tensor = self.classifier(self.blocks(feature_map).mean(dim=(2, 3)))
        return logits


class SeparableConv(nn.Sequential):
    """Two depthwise separable 3x3 convolutions, the first of which halves the map.

    Args:
        channels: Of the map that comes in.
        out: Channels that come out.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(*_separable(channels, channels, 2), *_separable(channels, out, 1))


def _separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, out, 1, bias=False)
    return [depthwise, pointwise, AnyBatchNorm2d(out), nn.ReLU()]


class AttentionBranch(nn.Module):
    """Merges patches down to a small grid, lets them attend to each other and classifies.

    Args:
        shape: ``(C, H, W)`` of the map, whose positions are the patches.
        width: D, a multiple of the number of heads.
        depth: Number of transformer blocks.
        classes: K.
    """

    def __init__(self, shape: tuple[int, ...], width: int, depth: int, classes: int) -> None:
        super().__init__()
        merges = _merges(shape[1], shape[2])
        widths = [shape[0]] + [width] * merges
        merging: list[nn.Module] = [PatchMerging(c, width) for c in widths[:merges]]
        if widths[-1] != width:
            merging = [nn.Linear(shape[0], width)]
        self.merging = nn.Sequential(*merging)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(depth)))
        self.classifier = nn.Linear(width, classes)
        draw_weights(self)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Logits ``(B, K)`` of a map ``(B, C, H, W)``."""
        tokens = self.merging(feature_map.permute(0, 2, 3, 1)).flatten(1, 2)
        logits: Tensor = self.classifier(self.blocks(tokens).mean(dim=1))
        return logits


def _merges(height: int, width: int) -> int:
    """How often a map can be halved exactly without coming below the grid."""
    count = 0
    while min(height, width) >= 2 * GRID and height % 2 == width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count


class PatchMerging(nn.Module):
    """Joins 2x2 patches into one: ``(B, H, W, C)`` to ``(B, H / 2, W / 2, D)``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, width, bias=False)
        self.act = nn.GELU()

    def forward(self, patches: Tensor) -> Tensor:
        """The merged patches."""
        batch, height, width, channels = patches.shape
        split = patches.reshape(batch, height // 2, 2, width // 2, 2, channels)
        joined = split.permute(0, 1, 3, 2, 4, 5).flatten(3)
        merged: Tensor = self.act(self.reduction(self.norm(joined)))
        return merged


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each behind a layer norm and with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, N, D)``."""
        tokens = tokens + self.projection(self._attend(self.norm1(tokens)))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        # Written out: the fused attention of CUDA has a backward pass that is not deterministic.
        batch, number, width = tokens.shape
        heads = self.qkv(tokens).reshape(batch, number, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(2, 3) / (width // HEADS) ** 0.5
        attended: Tensor = (scores.softmax(dim=3) @ value).transpose(1, 2).flatten(2)
        return attended


def draw_weights(branch: nn.Module) -> None:
    """He-normal convolutions, and linear layers of deviation 0.02 without bias."""
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
