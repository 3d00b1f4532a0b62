"""Sinkhorn divergence: how far two clouds of points are apart, by entropic optimal transport.

Papers: Feydy, Sejourne, Vialard, Amari, Trouve, Peyre, "Interpolating between Optimal Transport and
MMD using Sinkhorn Divergences", arXiv 1810.08278; log-domain updates and annealing as in Schmitzer,
"Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", arXiv 1610.06519.

``S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` with uniform weights, the cost
``|x_i - y_j|^2 / 2`` and the entropic regularisation ``blur^2``. Definition and updates are those
of geomloss' ``SamplesLoss("sinkhorn", p=2, blur=...)``. Only, the number of iterations is fixed, so
that no step waits for the device; the blur starts at the clouds' diameter and halves each time.

Shapes: N points of D dimensions in each cloud, behind any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ITERATIONS = 16
"""At a blur of 0.1, and for rows of 16 to 128 cosines, this is within 0.5 % of the limit, the
gradient within about 10 %; geomloss, which stops after about 10, is as far from both."""


def sinkhorn_divergence(x: Tensor, y: Tensor, blur: float = 0.1) -> Tensor:
    """Divergence of two clouds, each ``(..., N, D)``: ``(...)``, 0 if they are equal.

    The potentials count as constant in the gradient: at the optimum theirs vanishes, so what is
    left, the cost under the optimal plan, is the whole gradient, and nothing is backpropagated
    through the iterations.
    """
    with torch.no_grad():
        potentials = _potentials(_costs(x, y), blur)
    eps = x.new_full((1,), blur**2)
    # One more update, with gradient. Of each pair only the first cloud moves, the other is held.
    x_to_y, y_to_x, x_to_x, y_to_y = _updated(eps, _costs(x, y), potentials)
    gaps: Tensor = (x_to_y - x_to_x) + (y_to_x - y_to_y)
    return gaps.mean(dim=-1)


def _costs(x: Tensor, y: Tensor) -> Tensor:
    """Costs x to y, y to x, x to x and y to y, ``(4, ..., N, N)``."""
    pairs = ((x, y), (y, x), (x, x), (y, y))
    return torch.stack([_cost(moved, held.detach()) for moved, held in pairs])


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared distances; from differences, so that equal points are at exactly 0."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(dim=-1) / 2


def _potentials(costs: Tensor, blur: float) -> Tensor:
    """Dual potentials ``(4, ..., N)`` on the first cloud of each pair, after annealing.

    Symmetric updates: all potentials at once, each averaged with its last value.
    """
    diameter = 2 * costs.amax(dim=(0, -2, -1))[..., None]  # squared: a cost is half of one
    held = _updated(diameter.clamp(min=blur**2), costs, costs.new_zeros(costs.shape[:-1]))
    for step in range(ITERATIONS):
        eps = (diameter * 0.25**step).clamp(min=blur**2)
        held = (held + _updated(eps, costs, held)) / 2
    return held


def _updated(eps: Tensor, costs: Tensor, potentials: Tensor) -> Tensor:
    """``-eps * log mean_j exp((h_j - cost_ij) / eps)``, h the potential on the other cloud."""
    x_to_y, y_to_x, x_to_x, y_to_y = potentials.unbind()
    others = torch.stack((y_to_x, x_to_y, x_to_x, y_to_y))
    exponents = (others.unsqueeze(-2) - costs) / eps[..., None]
    return -eps * (exponents.logsumexp(dim=-1) - math.log(costs.shape[-1]))
