"""Pearson's correlation of rows, for losses that compare two vectors up to scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 1e-12
"""A row varies if the squares of its deviations are more than this share of those of its values:
above float32's rounding of the mean, far below any row that says something."""


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the rows of two ``(B, K)``: ``(B,)``, 0 where one of the two is constant."""
    return (_unit(one) * _unit(other)).sum(dim=1)


def _unit(rows: Tensor) -> Tensor:
    """Centred rows of unit norm; constant rows become 0 and have no gradient."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    squared = centred.square().sum(dim=1, keepdim=True)
    varies = squared > FLAT * rows.square().sum(dim=1, keepdim=True)
    # sqrt has an infinite slope at 0: constant rows take a detour over 1.
    length = squared.where(varies, torch.ones_like(squared)).sqrt()
    return centred * varies / length
