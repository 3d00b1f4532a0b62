"""Order and augmentation of an epoch as pure functions of (seed, epoch).

Pad-and-crop with flip has finitely many outcomes, the *views* of an image: 81 x 2 = 162 for the
CIFAR recipe. An epoch draws one view a sample and one order of the samples from a counter-based
generator. So the stream is the same on every device, for every method of a seed, and after a
resume. Only the generator's raw bits are used: those NumPy promises never to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smskd.seeding import derive

Index = TypeVar("Index", NDArray[np.int64], Tensor)
"""Integers ``(B,)``, on either side."""


@dataclass(frozen=True)
class Augmentation:
    """Zero padding by ``pad``, a random crop back to size, and a random flip."""

    pad: int = 0
    flip: bool = False

    @property
    def num_views(self) -> int:
        """How many different images one image can become."""
        return (2 * self.pad + 1) ** 2 * (2 if self.flip else 1)

    def split(self, view: Index) -> tuple[Index, Index, Index]:
        """View indices ``(B,)`` as (row offset, column offset, flipped 0/1), each ``(B,)``."""
        flips = 2 if self.flip else 1
        side = 2 * self.pad + 1
        shift, flipped = view // flips, view % flips
        return shift // side, shift % side, flipped


def draw_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """A permutation of the training set ``(N,)`` for one epoch."""
    return np.argsort(_raw(seed, "order", epoch, num_samples), kind="stable")


def draw_views(seed: int, epoch: int, num_samples: int, num_views: int) -> NDArray[np.int64]:
    """The view of every training sample ``(N,)`` in one epoch, uniform in [0, num_views)."""
    return (_raw(seed, "views", epoch, num_samples) % np.uint64(num_views)).astype(np.int64)


def _raw(seed: int, purpose: str, epoch: int, count: int) -> NDArray[np.uint64]:
    key = np.array([derive(seed, purpose), epoch], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)
