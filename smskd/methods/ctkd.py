"""CTKD: a temperature that is learned to make the distillation harder, step by step.

Paper: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge Distillation",
arXiv 2211.16231.
Change: the logits of student and teachers are divided by
``tau = lowest_temperature + temperature_range * sigmoid(theta)`` and every distillation term is
multiplied by ``tau^2``. theta is one learned number for all samples. It climbs the loss that the
student descends: its gradient is multiplied by lambda, which falls from 0 to -1 along a half cosine
over ``curriculum_epochs`` (-0.02 in the first epoch, -1 from the last on).

Use it in front of a loss on logits of temperature 1, such as kd with ``temperature: 1``: tau takes
the place of the method's own, whose factor is then 1. A loss on features would only be scaled.
Deviations from the authors' code: none for its global temperature (their one per sample is not
here). theta is in the stage's optimiser, weight decay included, as there.
Defaults: the authors' CIFAR-100 script (range 1 to 21, 10 epochs, theta starts at 1, so tau at
15.6; CE 0.1 and KD 0.9 are those of kd).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar

import torch
from torch import nn

from smskd.methods.base import Modifier, PairShapes, Signals, Terms


@dataclass(frozen=True)
class CTKD(Modifier):
    """Hyper-parameters of CTKD.

    Attributes:
        lowest_temperature: tau if theta were minus infinity.
        temperature_range: How far above that tau can get.
        curriculum_epochs: Epochs until theta climbs at full strength; 0 for at once.
        theta: What the learned number starts at.
    """

    name: ClassVar[str] = "ctkd"
    paper: ClassVar[str] = "Li 2023, arXiv 2211.16231"
    fits: ClassVar[tuple[str, ...]] = ("response",)

    lowest_temperature: float = 1.0
    temperature_range: float = 20.0
    curriculum_epochs: int = 10
    theta: float = 1.0

    def build(self, shapes: PairShapes) -> nn.Module:
        """The module that holds theta, a scalar."""
        modules = nn.Module()
        modules.register_parameter("theta", nn.Parameter(torch.tensor(self.theta)))
        return modules

    def around(
        self, distill: Callable[[Signals], Terms], signals: Signals, modules: nn.Module
    ) -> Terms:
        """The terms at the learned temperature."""
        theta = modules.get_parameter("theta")
        # The value is theta's, the gradient is multiplied by what stands in front.
        climbing = theta.detach() + self.strength(signals.epoch) * (theta - theta.detach())
        tau = self.lowest_temperature + self.temperature_range * climbing.sigmoid()
        teachers = [teacher.logits / tau for teacher in signals.teachers]
        terms = distill(signals.with_logits(signals.student.logits / tau, teachers))
        return {name: tau.square() * term for name, term in terms.items()}

    def strength(self, epoch: int) -> float:
        """lambda, the factor on theta's gradient in an epoch (from 1): 0 down to -1."""
        if epoch >= self.curriculum_epochs:
            return -1.0
        return (cos(pi * epoch / self.curriculum_epochs) - 1.0) / 2.0
