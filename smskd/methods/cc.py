"""CC: keep how the samples of a batch correlate, on embeddings of the pooled features.

Paper: Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, "Correlation Congruence for Knowledge
Distillation", arXiv 1904.01802.
Loss: ``ce_weight * CE + weight * L``. Both pooled features are embedded, e_s = W_s h_s + b_s and
e_t = W_t h_t + b_t, each ``(B, dim)``; both embeddings are trained with the student and dropped
after the stage.

- ``form: repdistiller``: ``L = mean_{i != j} <|e_s - e_t|_i, |e_s - e_t|_j>``, over the B (B - 1)
  ordered pairs of samples.
- ``form: paper``: ``L = mean_ij((k(e_s)_ij - k(e_t)_ij)^2)``, over all B^2 pairs, where k is the
  Gaussian kernel of embeddings of unit length, expanded in a Taylor series to ``order``:
  ``k(x, y) = exp(-2 gamma) * sum_{p = 0..order} (2 gamma <x, y>)^p / p!``.

Deviations of the form "repdistiller" from RepDistiller: its sum runs over the samples that happen
to be neighbours in the batch, so the loss depends on their order. As batches are shuffled, what it
minimises is the mean over all orders, which is the mean over all pairs, and that is taken here.
``compat: repdistiller`` pairs the neighbours. A batch of 1 has no pairs and loss 0; theirs is NaN.
Deviations of both forms from the paper: KD, which the paper adds, is a method of its own (name both
in a joint stage). Of its kernels there is only the Gaussian one.
Defaults: RepDistiller (``--distill correlation``: CE 1, weight 0.02, embeddings of 128). gamma 0.4
and order 2 are the paper's as other codes give them (torchdistill, KD-Zoo). The weight is not fit
for the form "paper": torchdistill's sample has 0.003 with a norm that is not squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, factorial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import lacks_pooled, pooled_pair


@dataclass(frozen=True)
class CC(Method):
    """Hyper-parameters of CC.

    Attributes:
        weight: Weight of the correlation term.
        dim: Width of the embeddings.
        form: Which loss: that of RepDistiller's tables, or the paper's.
        gamma: Inverse width of the kernel; form "paper" only.
        order: Where its Taylor series ends; form "paper" only.
        compat: "repdistiller" pairs neighbours in the batch only; of its form only.
    """

    name: ClassVar[str] = "cc"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Peng 2019, arXiv 1904.01802"
    needs: ClassVar[Needs] = Needs.features("pooled")

    weight: float = 0.02
    dim: int = 128
    form: Literal["repdistiller", "paper"] = "repdistiller"
    gamma: float = 0.4
    order: int = 2
    compat: Literal["none", "repdistiller"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a pooled feature."""
        if self.dim < 1 or self.order < 1:
            return f"dim is {self.dim} and order {self.order}; expected at least 1"
        if self.form == "paper" and self.compat != "none":
            return f"compat {self.compat!r} is of the other form; expected 'none' with form 'paper'"
        return lacks_pooled(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """The two embeddings."""
        return Embeddings(shapes.student.pooled, shapes.teacher.pooled, self.dim)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Correlation of the embeddings' gaps, or gap of their correlations."""
        embedded_s, embedded_t = modules(*pooled_pair(signals))
        if self.form == "paper":
            kernel_s, kernel_t = (self._kernel(e) for e in (embedded_s, embedded_t))
            return {"cc": self.weight * (kernel_s - kernel_t).square().mean()}
        gap = (embedded_s - embedded_t).abs()
        pairs = neighbour_products if self.compat == "repdistiller" else pair_products
        return {"cc": self.weight * pairs(gap)}

    def _kernel(self, embedded: Tensor) -> Tensor:
        return taylor_kernel(embedded, self.gamma, self.order)


class Embeddings(nn.Module):
    """One linear layer for each network, to ``(B, dim)``.

    Args:
        width_s: Width of the student's pooled feature.
        width_t: Width of the teacher's.
        dim: Width of the embeddings.
    """

    def __init__(self, width_s: int, width_t: int, dim: int) -> None:
        super().__init__()
        self.embed_s = nn.Linear(width_s, dim)
        self.embed_t = nn.Linear(width_t, dim)

    def forward(self, feature_s: Tensor, feature_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings ``(B, dim)``."""
        return self.embed_s(feature_s), self.embed_t(feature_t)


def pair_products(gap: Tensor) -> Tensor:
    """Mean of the scalar products of all pairs of different rows of ``(B, dim)``; 0 if B is 1."""
    pairs = len(gap) * (len(gap) - 1) / 2
    return (gap @ gap.T).triu(diagonal=1).sum() / max(pairs, 1.0)


def neighbour_products(gap: Tensor) -> Tensor:
    """Mean of the scalar products of consecutive rows of ``(B, dim)``; 0 if B is 1."""
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


def taylor_kernel(embedded: Tensor, gamma: float, order: int) -> Tensor:
    """Gaussian kernel of unit embeddings as a Taylor series: ``(B, dim)`` to ``(B, B)``."""
    unit = F.normalize(embedded)
    cosine = unit @ unit.T
    terms = [(2 * gamma * cosine) ** p / factorial(p) for p in range(order + 1)]
    return exp(-2 * gamma) * torch.stack(terms).sum(dim=0)
