"""KDSVD: give adjacent maps' leading singular vectors the relation that the teacher's have.

Paper: Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
arXiv 1807.06819.
Loss: ``ce_weight * CE + weight * sum_l mean_b(sum (R_s^l - R_t^l)^2)``. ``R^l`` is ``(C_l, C_{l-1},
k)`` with entries ``exp(-(v_l[c,i] - v_{l-1}[c',i])^2 / 8)``, v the k leading right singular vectors
of the l-th map as a matrix ``(H * W, C)``, times the teacher's singular values as a unit vector. Of
the student's k + 3 leading vectors, the one closest to each of the teacher's is taken, with its
sign. The maps are 1 to n, without the stem's map 0.

Gradients go through the eigenvectors of the smaller Gram matrix. Where two eigenvalues are closer
than a thousandth of the largest, the pull between their vectors, which has no limit in theory,
falls back to 0; vectors of eigenvalues below a millionth of the largest are set to 0, and with them
dead maps. RepDistiller's and mdistiller's gradients are NaN or unbounded there; and they set
differences that are not finite to 0, which here are reported as divergence.

Deviations from the authors' code, all as in RepDistiller and mdistiller: the term's gradient is not
clipped to the length of the label loss's, three spare vectors instead of one, and the mean over the
batch instead of half the sum. Not as in theirs: the sign of a teacher's vector, which their library
leaves to chance and the loss depends on, makes its sum positive; where the widths differ, which
RepDistiller cannot do (7 of the 13 usual pairs), the student's map goes through a 1x1 convolution
first. If a map has less than k rows or columns, the vectors that exist are used; if the networks
have different numbers of maps, the first ones are paired. mdistiller decomposes another matrix,
``(C * H, W)``, under the same name: ``compat="mdistiller"`` does so; then not the widths but the
sizes must be equal, and the larger map is average-pooled (mdistiller cannot do 6 of the pairs).
Defaults: RepDistiller's k 1; mdistiller (CE 1, weight 1), since RepDistiller gives no weight.

An eigendecomposition on a GPU makes it wait for the CPU, and is slow for wide maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.fsp import width_adapters
from smskd.methods.nst import to_same_size, why_not_maps

SPARE = 3
"""How many more vectors of the student than of the teacher are looked at."""

CLOSE = 1e-3
"""Gap of two eigenvalues, in units of the largest, below which their vectors are not told apart."""

NONE = 1e-6
"""Size of an eigenvalue, in units of the largest, below which it is rounding."""


@dataclass(frozen=True)
class KDSVD(Method):
    """Hyper-parameters of KDSVD.

    Attributes:
        weight: Weight of the relations' distance.
        k: How many of the teacher's singular vectors are used, at least 1.
        compat: "mdistiller" decomposes ``(C * H, W)`` instead of ``(H * W, C)``, as that code does.
    """

    name: ClassVar[str] = "kdsvd"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Lee 2018, arXiv 1807.06819"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 1.0
    k: int = 1
    compat: Literal["none", "mdistiller"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have two adjacent spatial maps after the stem's."""
        if self.k < 1:
            return f"k is {self.k}; expected at least 1"
        return why_not_maps(shapes, "maps", 3)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A 1x1 convolution for each of the student's maps that needs the teacher's width."""
        if self.compat == "mdistiller":
            return nn.Module()
        return width_adapters(shapes.student.maps[1:], shapes.teacher.maps[1:])

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared distance of the relations, summed over adjacent maps."""
        vectors_s, vectors_t = [], []
        for matrix_s, matrix_t in self._matrices(signals, modules):
            with torch.no_grad():
                v_t, values = right_singular(matrix_t, self.k)
                v_t = v_t * torch.where(v_t.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
                scale = F.normalize(values).unsqueeze(1)
            v_s, _ = right_singular(matrix_s, self.k + SPARE)
            vectors_s.append(aligned(v_s, v_t) * scale)
            vectors_t.append(v_t * scale)
        gaps = [
            (r_s - r_t).square().sum(dim=(1, 2, 3))
            for r_s, r_t in zip(relations(vectors_s), relations(vectors_t), strict=True)
        ]
        return {"kdsvd": self.weight * signals.mean(torch.stack(gaps).sum(dim=0))}

    def _matrices(self, signals: Signals, modules: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Each pair of maps as matrices ``(B, P, D)`` of equal D."""
        pairs = zip(signals.student.maps[1:], signals.teacher.maps[1:], strict=False)
        if self.compat == "mdistiller":
            pooled = [to_same_size(*pair) for pair in pairs]
            return [(map_s.flatten(1, 2), map_t.flatten(1, 2)) for map_s, map_t in pooled]
        return [
            (adapt(map_s).flatten(2).mT, map_t.flatten(2).mT)
            for adapt, (map_s, map_t) in zip(modules.children(), pairs, strict=True)
        ]


def right_singular(matrix: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors and values of ``(B, P, D)``.

    Returns:
        ``(B, D, n)``, vectors of zeros for values that are 0, and ``(B, n)``, each sample's
        up to a factor; of a matrix with less than n rows or columns, as many as there are.
    """
    largest = matrix.detach().abs().amax(dim=(1, 2), keepdim=True)
    matrix = matrix / largest.clamp(min=1e-20)  # squares neither overflow nor vanish
    if matrix.shape[1] >= matrix.shape[2]:
        values, vectors = leading_eigenvectors(matrix.mT @ matrix, n)
    else:
        values, left = leading_eigenvectors(matrix @ matrix.mT, n)
        vectors = matrix.mT @ left
    exists = (values > NONE * values[:, :1]).unsqueeze(1)
    squared = vectors.square().sum(dim=1, keepdim=True)
    length = squared.where(exists, torch.ones_like(squared)).sqrt()
    return vectors / length * exists, values.clamp(min=0.0).sqrt()


def leading_eigenvectors(gram: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues ``(B, n)``, without gradient, and vectors ``(B, D, n)``, with.

    The first-order change of the vectors is added to them: its value is 0, its gradient theirs.
    """
    # What is not finite makes the decomposition fail; left out here, it still reaches the change.
    fixed = torch.nan_to_num(gram.detach(), nan=0.0, posinf=0.0, neginf=0.0)
    values, vectors = torch.linalg.eigh(fixed)
    leading, top = values[:, -n:].flip(1), vectors[:, :, -n:].flip(2)
    gap = leading.unsqueeze(1) - values.unsqueeze(2)
    floor = CLOSE * leading[:, :1, None].clamp(min=1.0)
    rate = gap / torch.maximum(gap.abs(), floor).square()
    change = vectors.mT @ (gram - gram.detach()) @ top
    return leading, top + vectors @ (rate * change)


def aligned(v_s: Tensor, v_t: Tensor) -> Tensor:
    """For each of ``v_t`` ``(B, D, k)`` the closest of ``v_s`` ``(B, D, n)``, turned its way."""
    cosine = v_s.detach().mT @ v_t
    closest = F.one_hot(cosine.abs().argmax(dim=1), v_s.shape[2]).mT
    return v_s @ (closest * cosine.sign())


def relations(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Kernel of all entries of adjacent maps' vectors ``(B, D, k)``: ``(B, D', D, k)`` each."""
    kernels = []
    for below, above in pairwise(vectors):
        k = min(below.shape[2], above.shape[2])
        difference = above[:, :, None, :k] - below[:, None, :, :k]
        kernels.append(torch.exp(-difference.square() / 8.0))
    return kernels
