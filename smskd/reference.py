"""The reference of SMSKD: a frozen copy of the previous stage's student, and its weighted loss.

Paper: Tian, Huang, Tang, Yao, "Integrating Knowledge Distillation Methods: A Sequential
Multi-Stage Framework", arXiv 2601.15657. The full text could not be read; the form below follows
its abstract and secondary sources, and every open point is a setting (``docs/algorithm.md``).

    L_ref = sum_i w_i * tau_r^2 * KL(softmax(z_r,i / tau_r) || softmax(z_s,i / tau_r)) / denominator
    w_i   = g(TCP_i),   TCP_i = softmax(z_t,i / tau_tcp)[y_i],   no gradient through w

TCP, the true-class probability, is from Corbiere et al., arXiv 1910.04851.
Shapes: B batch, K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import ConfigError
from smskd.frozen import Frozen, Live
from smskd.fused import fused
from smskd.methods.base import Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.settings import Reference, Weighting
from smskd.taps import MAPS, Network, Outputs, TappedModel, Taps


def true_class_probability(logits_t: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """TCP ``(B,)`` of teacher logits ``(B, K)``: its softmax at the true class."""
    log_p = F.log_softmax(logits_t.detach() / temperature, dim=1)
    return log_p.gather(1, labels.view(-1, 1)).squeeze(1).exp()


def sample_weights(tcp: Tensor, weighting: Weighting) -> Tensor:
    """Weights ``(B,)`` from TCP ``(B,)``: the map, then the normalisation."""
    weights = {
        "one_minus_tcp": lambda: 1.0 - tcp,
        "tcp": lambda: tcp,
        "constant": lambda: torch.ones_like(tcp),
        "exp_minus_tcp": lambda: torch.exp(-tcp),
        "two_minus_tcp": lambda: 2.0 - tcp,
    }[weighting.map]()
    # A teacher that is certain of a whole batch gives weights of 0; 0/0 must stay 0.
    tiny = torch.finfo(weights.dtype).tiny
    if weighting.normalise == "batch_mean":
        return weights / weights.mean().clamp_min(tiny)
    if weighting.normalise == "batch_sum":
        return weights / weights.sum().clamp_min(tiny)
    return weights


def weighted_mean(losses: Tensor, weights: Tensor, weighting: Weighting) -> Tensor:
    """Weighted sum of per-sample losses ``(B,)`` over the chosen denominator."""
    total = (weights * losses).sum()
    if weighting.denominator == "weights":
        return total / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    return total / len(losses)


@dataclass
class Anchor:
    """The frozen reference network with its settings."""

    network: Frozen
    settings: Reference

    @classmethod
    def freeze(
        cls, student: nn.Module, taps: Taps, settings: Reference, image: Tensor | None = None
    ) -> Anchor:
        """Copy the student as it is now and freeze the copy (running statistics, no gradient).

        Args:
            student: Stays as it is.
            taps: Its taps.
            settings: Of the reference.
            image: ``(1, C, H, W)`` to try a faster form of the copy on; None leaves it as it is.
        """
        roles = anchor_roles(settings)
        frozen = Network(copy.deepcopy(student).eval().requires_grad_(False), taps)
        faster = frozen if image is None else fused(frozen, roles, image)
        return cls(Live(TappedModel(faster.model, taps, roles), frozen.model), settings)

    def terms(self, signals: Signals, said: Outputs) -> tuple[Terms, Tensor]:
        """The reference term and the sample weights ``(B,)``.

        Args:
            signals: The batch as the method sees it.
            said: What the reference said about the same images.
        """
        weighting = self.settings.weighting
        weights = sample_weights(self._tcp(signals), weighting)
        loss = weighted_mean(self._distance(signals.student, said), weights, weighting)
        return {"reference": self.settings.weight * loss}, weights

    def _tcp(self, signals: Signals) -> Tensor:
        if not self.settings.needs_teacher:
            return torch.ones_like(signals.student.logits[:, 0])
        if not signals.teachers:
            raise ConfigError(
                f"reference weights {self.settings.weighting.map!r} need a teacher",
                "give a teacher, or set the weight map to 'constant'",
            )
        logits_t = signals.teacher.logits
        return true_class_probability(logits_t, signals.labels, self.settings.weighting.temperature)

    def _distance(self, student: Outputs, said: Outputs) -> Tensor:
        """How far the student has moved from the reference, a sample ``(B,)``."""
        if self.settings.space == "features":
            return (student.maps[-1] - said.maps[-1]).square().flatten(1).mean(dim=1)
        return softened_kl(student.logits, said.logits, self.settings.temperature)


def anchor_roles(settings: Reference) -> frozenset[str]:
    """Feature roles that the reference loss reads from the student and the reference."""
    return frozenset({MAPS}) if settings.space == "features" else frozenset()
