"""What the zoo knows of a network: how to build it, where its features are, where it is from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from smskd.taps import Taps


@dataclass(frozen=True)
class ModelEntry:
    """One line of the zoo.

    Attributes:
        build: Called with ``num_classes`` and ``in_channels``; returns the untrained network.
        taps: Where its features are found, or a function that finds out.
        paper: Where the architecture comes from.
        version: Raised when a change of the code changes results; part of a stage run's key.
        sized: Whether ``build`` also takes ``image_size``, the side of the square images or None.
        extra: Extra of the package that it needs; empty if it needs none.
        size: Parameters and MACs with 100 classes at 3x32x32, told here for what needs an extra.
    """

    build: Callable[..., nn.Module]
    taps: Taps | Callable[[], Taps]
    paper: str
    version: int = 1
    sized: bool = False
    extra: str = ""
    size: tuple[int, int] | None = None

    def found_taps(self) -> Taps:
        """Where the features are found; of a network of another package this runs it once."""
        return self.taps if isinstance(self.taps, Taps) else self.taps()
