"""Ranks of the classes of a sample, hard ones and differentiable ones.

The largest score has rank 1. Both kinds compare all pairs of classes: O(B * K^2) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_ranks(scores: Tensor, temperature: float) -> Tensor:
    """``r_c = 1 + sum_{j != c} sigmoid((z_j - z_c) / temperature)``.

    Args:
        scores: z, ``(B, K)``.
        temperature: The lower, the closer to hard ranks, and the fewer pairs have a gradient.

    Returns:
        ``(B, K)``, between 1 and K; each row sums to ``K * (K + 1) / 2``.
    """
    # Each class also meets itself, which counts sigmoid(0) = 0.5.
    return 0.5 + torch.sigmoid(_gaps(scores) / temperature).sum(dim=2)


def hard_ranks(scores: Tensor) -> Tensor:
    """Ranks ``(B, K)`` of ``(B, K)``, without gradient; equal scores share their mean rank."""
    gaps = _gaps(scores.detach())
    return 0.5 + torch.heaviside(gaps, gaps.new_full((), 0.5)).sum(dim=2)


def _gaps(scores: Tensor) -> Tensor:
    """``z_j - z_c`` at ``[b, c, j]``: ``(B, K)`` to ``(B, K, K)``."""
    return scores.unsqueeze(1) - scores.unsqueeze(2)
