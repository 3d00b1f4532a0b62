"""NST: match how the channels of a map are spread over the image, by maximum mean discrepancy.

Paper: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
arXiv 1707.01219.
Loss: ``ce_weight * CE + weight * sum_l mean_b(k(s,s) + k(t,t) - 2 k(s,t))``, where s and t are the
channels of one sample's l-th maps ``(C, H * W)``, each of unit L2 norm, and ``k(a,b)`` is the mean
of the polynomial kernel ``(a_i . b_j)^2`` over all pairs of channels. The maps are 1 to n, without
the stem's map 0.

The sum of the kernel over all pairs is computed from the matrix of channels or from that of
positions, whichever is smaller; RepDistiller and mdistiller build ``(B, C_t, C_s, H * W)``.

Deviations from the paper, all as in RepDistiller and mdistiller: of its three kernels the
polynomial of degree 2 without a constant, the weight without its factor 1/2, and several maps,
where the paper takes one. If the networks have different numbers of maps, the first ones are
paired. The larger map is average-pooled to the smaller (they pool to a square of the smaller
height; here height and width are treated alike).
Defaults: RepDistiller (``--distill nst``: CE 1, weight 50), same in mdistiller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class NST(Method):
    """Hyper-parameters of NST.

    Attributes:
        weight: Weight of the discrepancy.
    """

    name: ClassVar[str] = "nst"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Huang 2017, arXiv 1707.01219"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 50.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial maps after the stem's."""
        return why_not_maps(shapes, "maps", 2)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared maximum mean discrepancy, summed over the pairs of maps."""
        pairs = zip(signals.student.maps[1:], signals.teacher.maps[1:], strict=False)
        layers = [signals.mean(discrepancy(map_s, map_t)) for map_s, map_t in pairs]
        return {"nst": self.weight * torch.stack(layers).sum()}


def discrepancy(map_s: Tensor, map_t: Tensor) -> Tensor:
    """Squared discrepancy of the channels of ``(B, C, H, W)`` maps, per sample ``(B,)``."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in to_same_size(map_s, map_t))
    c_s, c_t = s.shape[1], t.shape[1]
    alike = squared_products(s, s) / c_s**2 + squared_products(t, t) / c_t**2
    return alike - 2.0 * squared_products(s, t) / (c_s * c_t)


def squared_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over i and j of ``(a_i . b_j)^2``: ``(B, M, P)`` and ``(B, N, P)`` to ``(B,)``."""
    if a.shape[2] ** 2 < a.shape[1] * b.shape[1]:
        # |A B^T|^2 is the inner product of A^T A and B^T B, which are (P, P).
        return ((a.mT @ a) * (b.mT @ b)).sum(dim=(1, 2))
    return (a @ b.mT).square().sum(dim=(1, 2))


def to_same_size(map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool whichever of two maps ``(B, C, H, W)`` is larger, in each direction."""
    height, width = (min(map_s.shape[d], map_t.shape[d]) for d in (2, 3))
    return pool_to(map_s, height, width), pool_to(map_t, height, width)


def why_not_maps(shapes: PairShapes, role: Literal["maps", "preact"], least: int) -> str | None:
    """Why the networks do not both have this many spatial maps of a role, or None."""
    for who, network in (("student", shapes.student), ("teacher", shapes.teacher)):
        maps = network.maps if role == "maps" else network.preact
        if len(maps) < least:
            return f"the {who} has {len(maps)} taps for {role}; expected at least {least}"
        if any(len(shape) != 3 for shape in maps):
            return f"expected (C, H, W) for {role}, got {maps} from the {who}"
    return None
