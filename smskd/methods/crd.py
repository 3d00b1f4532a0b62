"""CRD: contrast a sample's feature with the other network's features of that and of other samples.

Paper: Tian, Krishnan, Isola, "Contrastive Representation Distillation", arXiv 1910.10699.
Loss: ``ce_weight * CE + weight * (L(v_s, M_t) + L(v_t, M_s))``, noise-contrastive estimation both
ways. v_s and v_t ``(B, dim)`` are linear embeddings of the pooled features, of unit length; both
are trained with the student and dropped after the stage. M_s and M_t ``(N, dim)`` are memory banks,
one row for each training sample. For sample i, with K negatives j drawn for it,
``L_i = -log(P_i / (P_i + K / N + eps)) - sum_j log((K / N) / (P_j + K / N + eps))``, where
``P_j = exp(<v_i, m_j> / temperature) / Z``; L is the mean over the batch. Z is estimated once for
each direction, N times the mean of exp over the first batch. After each loss the rows of the
batch's samples become ``normalise(momentum * m + (1 - momentum) * v)``.

Negatives are samples of other classes ("exact" in RepDistiller). If the classes are not known
beforehand (a loader), they are any other samples. They are drawn in the order of the batch, so the
loss depends on that order for a given state of the generator, though not in distribution.

Deviations from RepDistiller, whose loss this is: K negatives are drawn with replacement, theirs
without while there are enough; the expected loss is the same. K is at most the number of negatives
that every sample has, where theirs repeats some. The logarithms are computed without quotients
near 1, whose rounding moves the fourth decimal of theirs in float32. A step compares the batch
with the whole bank in one matrix product, and keeps no ``(B, K, dim)`` tensor of rows. The banks
start anew in each stage.
Defaults: RepDistiller (``--distill crd``: CE 1, weight 0.8, K 16384, temperature 0.07, momentum
0.5, dim 128), same in mdistiller. The published CRD+KD is the joint stage [crd, kd] with KD's
weights (CE 0, KD 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import IncompatibleError
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.cc import Embeddings
from smskd.methods.pooled import lacks_pooled, pooled_pair

EPSILON = 1e-7
WIDE = 2**62
"""Random integers are drawn below this and folded: no class's negatives are seen more often."""


@dataclass(frozen=True)
class CRD(Method):
    """Hyper-parameters of CRD.

    Attributes:
        weight: Weight of both directions together.
        negatives: K, negatives a sample; fewer if the training set does not have as many.
        temperature: Divides the scalar products.
        momentum: How much of a bank's row stays when its sample was seen.
        dim: Width of the embeddings.
    """

    name: ClassVar[str] = "crd"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Tian 2020, arXiv 1910.10699"
    needs: ClassVar[Needs] = Needs(True, frozenset({"pooled"}), frozenset({"pooled"}), index=True)
    draws_random: ClassVar[bool] = True

    weight: float = 0.8
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    dim: int = 128

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a pooled feature, and every sample a negative."""
        if self.negatives < 1 or self.dim < 1 or not 0 <= self.momentum <= 1:
            return (
                f"negatives is {self.negatives}, dim {self.dim} and momentum {self.momentum:g}; "
                "expected at least 1, at least 1, and 0 to 1"
            )
        if shapes.num_train and _fewest_negatives(shapes) < 1:
            return "a training sample has no negatives; expected samples of at least 2 classes"
        return lacks_pooled(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """Embeddings and memory banks.

        Raises:
            IncompatibleError: the number of training samples is unknown, or :meth:`check` gives a
                reason.
        """
        reason = self.check(shapes) if shapes.num_train else "the number of samples is unknown"
        if reason is not None:
            raise IncompatibleError(f"{self.name} cannot work with this pair: {reason}")
        embeddings = Embeddings(shapes.student.pooled, shapes.teacher.pooled, self.dim)
        draw = Negatives(shapes, min(self.negatives, _fewest_negatives(shapes)))
        return Contrast(embeddings, draw, self.temperature, self.momentum)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The contrast in both directions; the banks are then brought up to date."""
        loss = modules(*pooled_pair(signals), signals.index)
        return {"crd": self.weight * signals.mean(loss)}


class Contrast(nn.Module):
    """Embeddings of both networks, and a bank of the embeddings of all training samples.

    Args:
        embeddings: Before they are normalised.
        negatives: Draws them.
        temperature: Divides the scalar products.
        momentum: How much of a bank's row stays.
    """

    bank_s: Tensor
    bank_t: Tensor
    log_z: Tensor
    has_z: Tensor

    def __init__(
        self, embeddings: Embeddings, negatives: Negatives, temperature: float, momentum: float
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        dim, samples = embeddings.embed_s.out_features, negatives.samples
        bound = (3 / dim) ** 0.5  # rows of about unit length
        for name in ("bank_s", "bank_t"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("has_z", torch.zeros(2, dtype=torch.bool))

    def forward(self, feature_s: Tensor, feature_t: Tensor, index: Tensor) -> Tensor:
        """The loss of each sample ``(B,)``; brings the banks' rows at ``index`` up to date.

        Args:
            feature_s: ``(B, D_s)``.
            feature_t: ``(B, D_t)``.
            index: Positions in the training set ``(B,)``.
        """
        anchor_s, anchor_t = map(F.normalize, self.embeddings(feature_s, feature_t))
        drawn = self.negatives(index)
        often = occurrences(drawn, self.negatives.samples)
        loss_s = self._direction(0, anchor_s, self.bank_t, index, drawn, often)
        loss_t = self._direction(1, anchor_t, self.bank_s, index, drawn, often)
        self._remember(self.bank_s, index, anchor_s)
        self._remember(self.bank_t, index, anchor_t)
        return loss_s + loss_t

    def _direction(
        self, number: int, anchor: Tensor, bank: Tensor, index: Tensor, drawn: Tensor, often: Tensor
    ) -> Tensor:
        """Anchors ``(B, dim)`` against the other network's bank: the loss ``(B,)``."""
        loss, slope = self._value_and_slope(number, anchor.detach(), bank, index, drawn, often)
        # The bank changes before the backward pass, so the gradient is at hand already.
        return loss + ((anchor - anchor.detach()) * slope).sum(dim=1)

    @torch.no_grad()
    def _value_and_slope(
        self, number: int, anchor: Tensor, bank: Tensor, index: Tensor, drawn: Tensor, often: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss ``(B,)`` and its gradient with respect to the anchors ``(B, dim)``."""
        scores = anchor @ bank.T / self.temperature
        positive, negative = scores.gather(1, index.unsqueeze(1)), scores.gather(1, drawn)
        count, samples = drawn.shape[1], len(bank)
        noise = count / samples
        # x is log(P / (K / N + eps)): P / (P + K / N + eps) is then sigmoid(x).
        shift = self._log_z(number, positive, negative, samples) + log(noise + EPSILON)
        positive, negative = positive - shift, negative - shift
        loss = F.softplus(-positive).sum(dim=1) + F.softplus(negative).sum(dim=1)
        # Repeated negatives write the same, their total, to their place: no order, no difference.
        slope = torch.zeros_like(scores).scatter_(1, drawn, often * negative.sigmoid())
        slope.scatter_(1, index.unsqueeze(1), -(-positive).sigmoid())
        return loss + count * log1p(EPSILON / noise), slope @ bank / self.temperature

    def _log_z(self, number: int, positive: Tensor, negative: Tensor, samples: int) -> Tensor:
        """Log of Z, estimated from this batch if it is the first."""
        scores = torch.cat([positive, negative], dim=1)
        estimate = scores.logsumexp(dim=(0, 1)) - log(scores.numel()) + log(samples)
        self.log_z[number] = torch.where(self.has_z[number], self.log_z[number], estimate)
        self.has_z[number] = True
        return self.log_z[number]

    @torch.no_grad()
    def _remember(self, bank: Tensor, index: Tensor, anchor: Tensor) -> None:
        mixed = self.momentum * bank[index] + (1.0 - self.momentum) * anchor
        bank.index_copy_(0, index, F.normalize(mixed))


class Negatives(nn.Module):
    """Draws negatives of samples: samples of other classes.

    Args:
        shapes: With the number of training samples and, if they are known, their classes.
        count: Negatives a sample.
    """

    order: Tensor
    start: Tensor
    size: Tensor

    def __init__(self, shapes: PairShapes, count: int) -> None:
        super().__init__()
        self.samples = shapes.num_train
        self.count = count
        order = _classes(shapes).argsort(stable=True)
        # Sorted by class, a sample's own class is the block of `size` positions from `start` on.
        in_order = _classes(shapes)[order]
        start = torch.searchsorted(in_order, _classes(shapes))
        size = torch.searchsorted(in_order, _classes(shapes), right=True) - start
        for name, table in (("order", order), ("start", start), ("size", size)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Positions ``(B, count)`` of negatives of the samples at ``index`` ``(B,)``."""
        start, size = self.start[index].unsqueeze(1), self.size[index].unsqueeze(1)
        draws = torch.randint(WIDE, (len(index), self.count), device=index.device)
        position = draws % (self.samples - size)
        return self.order[position + (position >= start) * size]


def occurrences(drawn: Tensor, samples: int) -> Tensor:
    """How often each of the positions ``(B, K)`` was drawn in its row."""
    ones = torch.ones((), device=drawn.device).expand_as(drawn)
    counts = torch.zeros(len(drawn), samples, device=drawn.device).scatter_add_(1, drawn, ones)
    return counts.gather(1, drawn)


def _classes(shapes: PairShapes) -> Tensor:
    """Classes of all training samples; if they are unknown, each is its own."""
    if shapes.train_labels is None:
        return torch.arange(shapes.num_train)
    return shapes.train_labels.cpu()


def _fewest_negatives(shapes: PairShapes) -> int:
    """How many negatives each sample has at least: all samples but the largest class."""
    return shapes.num_train - int(_classes(shapes).bincount().max())
