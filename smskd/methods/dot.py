"""DOT: the distillation loss gets a momentum of its own, larger than that of the label loss.

Paper: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", arXiv 2307.08436.
Change: of a parameter w with the gradients g_task of the label loss and g_kd of the distillation
loss, each step makes ``v_task = (m - delta) v_task + g_task + wd * w``,
``v_kd = (m + delta) v_kd + g_kd`` and ``w = w - lr (v_task + v_kd)``, with the recipe's rate lr,
momentum m and weight decay wd. The losses stay as they are, so it goes with any method; the term
of a stage's reference counts as distillation. Costs a second backward pass.

A parameter that one of the losses has never reached (an adapter, or a classifier beside a loss on
features) has one buffer with momentum m and the weight decay, as in the authors' code (mdistiller,
``engine/dot.py``). With delta 0 everything is SGD with momentum, as it is without a label loss or
without a distillation loss.

Deviations from that code: if a loss no longer reaches a parameter that it did reach, its buffer
goes on decaying and moving the parameter, where theirs rests; and the weight decay acts from the
first step on, where theirs leaves out the first step of what only distillation reaches. Nesterov
momentum, which theirs does not have, looks ahead with each buffer's own momentum.
Defaults: paper and code for CIFAR-100 (delta 0.075 at m 0.9); they have 0.09 on ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smskd.methods.base import Modifier, Terms, total
from smskd.methods.dot_optimizer import TwoMomentumSGD


@dataclass(frozen=True)
class DOT(Modifier):
    """Give the two losses momenta of their own.

    Attributes:
        delta: What distillation has more, and the label loss less, than the recipe's momentum.
    """

    name: ClassVar[str] = "dot"
    paper: ClassVar[str] = "Zhao 2023, arXiv 2307.08436"

    delta: float = 0.075

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """SGD with a momentum buffer for each loss.

        Raises:
            ConfigError: a momentum would be less than 0, or not less than 1.
        """
        return TwoMomentumSGD(groups, self.delta)

    def descend(self, task: Terms, distill: Terms, optimizer: torch.optim.Optimizer) -> None:
        """One step on the two losses' gradients, each found by a backward pass of its own."""
        assert isinstance(optimizer, TwoMomentumSGD)
        weights = optimizer.weights
        of_distill = _gradients(distill, weights, keep_graph=bool(task))
        optimizer.descend(_gradients(task, weights, keep_graph=False), of_distill)


def _gradients(
    terms: Terms, weights: Sequence[Tensor], keep_graph: bool
) -> Sequence[Tensor | None]:
    """Gradient of the terms' sum for each weight, None where it does not depend on it."""
    loss = total(terms) if terms else None
    if loss is None or not loss.requires_grad:
        return [None] * len(weights)
    return torch.autograd.grad(loss, weights, retain_graph=keep_graph, allow_unused=True)
