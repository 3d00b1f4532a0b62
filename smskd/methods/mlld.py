"""MLLD: match the teacher for each sample, between samples and between classes, on two views.

Paper: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023 (not on arXiv); used with
arXiv 2403.01427 (logit standardisation), whose tables it leads.
Loss: ``ce_weight * (CE + CE_strong) + weight * sum_tau sum_view (I + L_B + L_C)`` over the
temperatures tau and two views, plain and strong. With P the softmax ``(B, K)`` at tau:
``I = mean_i tau^2 KL(P_t,i || P_s,i)``, ``L_B = ||P_s P_s^T - P_t P_t^T||^2 / B`` on ``(B, B)`` and
``L_C = ||P_s^T P_s - P_t^T P_t||^2 / K`` on ``(K, K)``.

The strong view is :mod:`smskd.methods.strong_view`, a tensor version of RandAugment (2, 10). Both
networks see it in a second pass, so the teacher has to be run, and a step costs twice as much.
Deviations from the authors' code, whose three oddities ``compat="mlkd"`` brings back: it
multiplies the averaged terms of the plain view by masks of unconfident samples and classes, which
only scales them by the masks' mean, a half; its strong I takes the plain view at the temperatures
2 and 6; and it computes L_B and L_C of the strong view but does not add them. CE_strong is among
the distillation terms (``ce_strong``), so what scales those scales it too. Modifiers of logits
reach the plain view only; the logit-standardisation code standardises both views, in I alone.
Defaults: the authors' code (CE 0.1, weight 0.9, these temperatures). It goes with a learning rate
of 0.025 (0.01 for MobileNetV2 and ShuffleNets) and 480 epochs in the logit-standardisation tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, Networks, PairShapes, Signals, Terms
from smskd.methods.strong_view import strong_view
from smskd.taps import NETWORK

PLAIN_AGAIN = (2.0, 6.0)
"""Temperatures at which the authors' code takes the plain view for the strong one."""


class Levels(NamedTuple):
    """Differences of two networks on one view at T temperatures.

    Attributes:
        instance: Of each sample's distribution ``(T, B)``.
        batch: Of each sample's relations to all samples ``(T, B)``.
        classes: Of the relations between classes ``(T,)``.
    """

    instance: Tensor
    batch: Tensor
    classes: Tensor


@dataclass(frozen=True)
class MLLD(Method):
    """Hyper-parameters of MLLD.

    Attributes:
        weight: Weight of each of the three levels.
        temperatures: At which the networks are compared, all of them in each step.
        strong: Whether the networks are compared on a strong view too.
        compat: "mlkd" adds the terms up as the authors' code does.
    """

    name: ClassVar[str] = "mlld"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Jin 2023, CVPR"
    needs: ClassVar[Needs] = Needs.features(NETWORK)
    draws_random: ClassVar[bool] = True

    ce_weight: float = 0.1
    weight: float = 0.9
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    strong: bool = True
    compat: Literal["none", "mlkd"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Temperatures are positive."""
        if not self.temperatures or min(self.temperatures) <= 0:
            return f"temperatures are {self.temperatures}; expected one or more, each above 0"
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The three levels over all views, and the label loss on the strong one."""
        logits_t = signals.teacher.logits
        plain = levels(signals.student.logits, logits_t, self.temperatures)
        if not self.strong:
            return self._summed(signals, plain, None)
        assert signals.networks is not None  # asked for in needs
        strong_s, strong_t = on_strong_view(signals.networks)
        strong = levels(strong_s, strong_t, self.temperatures)
        terms = self._summed(signals, plain, strong)
        if self.ce_weight > 0:
            terms["ce_strong"] = self.ce_weight * F.cross_entropy(strong_s, signals.labels)
        return terms

    def _summed(self, signals: Signals, plain: Levels, strong: Levels | None) -> Terms:
        if self.compat == "mlkd":
            return self._summed_as_mlkd(signals, plain, strong)
        views = [plain, strong] if strong else [plain]
        instance = torch.stack([view.instance.sum(0) for view in views]).sum(0)
        batch = torch.stack([view.batch.sum(0) for view in views]).sum(0)
        classes = torch.stack([view.classes.sum() for view in views]).sum()
        return self._terms(signals.mean(instance), signals.mean(batch), classes)

    def _summed_as_mlkd(self, signals: Signals, plain: Levels, strong: Levels | None) -> Terms:
        p_t = F.softmax(signals.teacher.logits, dim=1)
        samples, classes = unconfident(p_t.amax(dim=1)), unconfident(p_t.sum(dim=0))
        instance = samples * plain.instance.sum(0)
        if strong:
            rows = zip(self.temperatures, plain.instance, strong.instance, strict=True)
            mixed = [again if tau in PLAIN_AGAIN else new for tau, again, new in rows]
            instance = instance + torch.stack(mixed).sum(0)
        batch = signals.mean(samples * plain.batch.sum(0))
        return self._terms(signals.mean(instance), batch, classes * plain.classes.sum())

    def _terms(self, instance: Tensor, batch: Tensor, classes: Tensor) -> Terms:
        levels = {"instance": instance, "batch": batch, "class": classes}
        return {name: self.weight * term for name, term in levels.items()}


def on_strong_view(networks: Networks) -> tuple[Tensor, Tensor]:
    """Logits ``(B, K)`` of student and first teacher on one strong view of the step's images."""
    images = strong_view(networks.images)
    return networks.student(images).logits, networks.teachers[0](images).logits


def levels(logits_s: Tensor, logits_t: Tensor, temperatures: tuple[float, ...]) -> Levels:
    """Compare two networks at several temperatures.

    Args:
        logits_s: Student ``(B, K)``.
        logits_t: Teacher ``(B, K)``.
        temperatures: T of them.

    Returns:
        The three levels, none of them weighted or averaged over samples.
    """
    log_s, log_t = (
        F.log_softmax(torch.stack([logits / tau for tau in temperatures]), dim=2)
        for logits in (logits_s, logits_t)
    )
    p_s, p_t = log_s.exp(), log_t.exp()
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)
    instance = torch.stack([tau**2 * row for tau, row in zip(temperatures, kl, strict=True)])
    batch = (p_s @ p_s.mT - p_t @ p_t.mT).square().sum(dim=2)
    classes = (p_s.mT @ p_s - p_t.mT @ p_t).square().sum(dim=(1, 2)) / logits_s.shape[1]
    return Levels(instance, batch, classes)


def unconfident(confidence: Tensor) -> Tensor:
    """Part of the entries ``(N,)`` that are not above their median: a half or a little more."""
    return (confidence <= confidence.quantile(0.5)).to(confidence.dtype).mean()
