"""SSD: learn from noisy copies of the teacher's feature, those that the student finds credible.

Paper: Aslam, Martinez, Pedersoli, Koerich, Etemad, Granger, "Learning from Stochastic Teacher
Representations Using Student-Guided Knowledge Distillation", arXiv 2504.14307 (SSD is the training,
SGKD the guidance).
Loss: ``ce_weight * CE + weight * mean((h_s - sum_n a_n h_t^n)^2)``, mean over batch and width. The
features h_t^n ``(B, passes, D)`` are the teacher's pooled feature under dropout. With the scores
``<h_s, h_t^n> / divisor`` of a sample, a is their softmax over those that reach their
``percentile``, 0 for the others; a is part of the gradient, as in the authors' code. h_s is the
student's pooled feature, linearly projected to D if the widths differ (dropped after the stage).
``logit_weight`` adds ``tau^2 * KL`` between the logits, which the authors' code has switched off.

Deviations from the paper: its teachers have dropout layers in their last part and are the student's
own architecture; the networks here have none, so dropout is put on the pooled feature, whose
``passes`` copies cost no forward pass. The share 0.2 is ours. Theirs runs softmax, threshold and
renormalisation one after the other; the softmax over the chosen ones is the same. Their logit term
takes the logits of the last noisy pass, here it takes the teacher's own.
The loss does not depend on the order of a batch in distribution, but the noise is drawn in the
batch's order, so for a given state of the generator it does.
Defaults: the authors' code (30 passes, divisor 5, percentile 90, weights 0.5 and 0.5, tau 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.methods.pooled import lacks_pooled, pooled_pair


@dataclass(frozen=True)
class SSD(Method):
    """Hyper-parameters of SSD.

    Attributes:
        weight: Weight of the feature term.
        passes: Number of noisy features.
        dropout: Share of the teacher's pooled feature that each of them drops.
        divisor: Divides the scores.
        percentile: Only scores at or above it, among a sample's own, count; 0 takes all.
        logit_weight: Weight of the KL between the logits.
        temperature: tau of that KL.
    """

    name: ClassVar[str] = "ssd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Aslam 2025, arXiv 2504.14307"
    needs: ClassVar[Needs] = Needs.features("pooled")
    draws_random: ClassVar[bool] = True

    ce_weight: float = 0.5
    weight: float = 0.5
    passes: int = 30
    dropout: float = 0.2
    divisor: float = 5.0
    percentile: float = 90.0
    logit_weight: float = 0.0
    temperature: float = 2.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a pooled feature; for the KL, the same classes."""
        if self.passes < 1 or not 0 <= self.dropout < 1:
            return (
                f"passes is {self.passes} and dropout {self.dropout:g}; expected at least 1 pass "
                "and a share below 1"
            )
        if self.divisor <= 0 or not 0 <= self.percentile <= 100:
            return (
                f"divisor is {self.divisor:g} and percentile {self.percentile:g}; expected a "
                "divisor above 0 and a percentile from 0 to 100"
            )
        classes_s, classes_t = shapes.student.num_classes, shapes.teacher.num_classes
        if self.logit_weight > 0 and classes_s != classes_t:
            return f"{classes_s} and {classes_t} classes; the KL expected the same number"
        return lacks_pooled(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """The projection of the student's pooled feature to the teacher's width, if they differ."""
        width_s, width_t = shapes.student.pooled, shapes.teacher.pooled
        return nn.Identity() if width_s == width_t else nn.Linear(width_s, width_t)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared distance from the student's feature to its mixture of the teacher's."""
        feature_s, feature_t = pooled_pair(signals)
        projected_s = modules(feature_s)
        noisy_t = dropped(feature_t, self.passes, self.dropout)
        target = mixture(projected_s, noisy_t, self.divisor, self._chosen)
        loss = (projected_s - target).square().mean(dim=1)
        terms = {"ssd": self.weight * signals.mean(loss)}
        if self.logit_weight > 0:
            kl = softened_kl(signals.student.logits, signals.teacher.logits, self.temperature)
            terms["kd"] = self.logit_weight * signals.mean(kl)
        return terms

    @property
    def _chosen(self) -> int:
        """How many scores reach the percentile, if no two are equal."""
        # The percentile lies at this position of the sorted scores, between two if it is not whole.
        position = self.percentile / 100 * (self.passes - 1)
        return self.passes - ceil(round(position, 9))


def dropped(feature: Tensor, passes: int, share: float) -> Tensor:
    """Copies under dropout: ``(B, D)`` to ``(B, passes, D)``."""
    # Drawn as float32 whatever the feature's type, so that every precision sees the same noise.
    draws = torch.rand(len(feature), passes, feature.shape[1], device=feature.device)
    return feature.unsqueeze(1) * (draws >= share) / (1.0 - share)


def mixture(feature_s: Tensor, features_t: Tensor, divisor: float, chosen: int) -> Tensor:
    """The teacher's features, mixed as the student finds them credible.

    Args:
        feature_s: ``(B, D)``.
        features_t: ``(B, N, D)``.
        divisor: Divides the scores.
        chosen: How many of the N count; more if equal ones are among them.

    Returns:
        ``(B, D)``.
    """
    scores = (features_t @ feature_s.unsqueeze(2)).squeeze(2) / divisor
    threshold = scores.detach().topk(chosen, dim=1).values[:, -1:]
    weights = scores.masked_fill(scores < threshold, float("-inf")).softmax(dim=1)
    return (weights.unsqueeze(1) @ features_t).squeeze(1)
