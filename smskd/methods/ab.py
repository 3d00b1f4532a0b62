"""AB: before training on the labels, let the student's neurons be active where the teacher's are.

Paper: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons", arXiv 1811.03233.
Loss, up to epoch ``round(init_share * epochs)`` of the stage: ``weight * sum_l 2^(l - L) / B *
sum(f)``, over batch, channels and positions of the l-th of L pre-activations s of the student and t
of the teacher, with ``f = max(0, margin - s)^2`` where ``t > 0`` and ``f = max(0, margin + s)^2``
elsewhere. Afterwards: ``ce_weight * CE`` alone. The pre-activations are 1 to n, without the stem's.

Where width or size differ, s goes through a connector that is trained with the student in the
phase, a 1x1 convolution and a batch norm. Then whichever of the two is larger is average-pooled.

Deviations from the paper: the phase is a share of the stage, under its learning rate and optimiser,
where the authors and RepDistiller (30 epochs before 240) put it in front. Where sizes differ,
RepDistiller has 3x3 or transposed convolutions in place of connector and pooling, which exist for a
student of half the size but for no smaller one. If the networks have different numbers of maps,
which it refuses, the first ones are paired. The authors' code keeps the teacher in training mode in
the phase, RepDistiller and this do not.
Defaults: RepDistiller (``--distill abound``: CE 1, weight 3/1000, margin 1, 30 of 240 epochs);
weight and margin are those of the authors' CIFAR-10 code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.nst import to_same_size, why_not_maps


@dataclass(frozen=True)
class AB(Method):
    """Hyper-parameters of AB.

    Attributes:
        weight: Weight of the boundary term.
        margin: How far from 0 the student's neurons must be, on the teacher's side.
        init_share: Share of the stage's epochs that is spent on the boundaries.
    """

    name: ClassVar[str] = "ab"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Heo 2019, arXiv 1811.03233"
    needs: ClassVar[Needs] = Needs.features("preact")

    weight: float = 0.003
    margin: float = 1.0
    init_share: float = 0.125

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial pre-activations after the stem's."""
        return why_not_share(self.init_share) or why_not_maps(shapes, "preact", 2)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A connector for each pair of maps; nothing where their shapes are equal."""
        pairs = zip(shapes.student.preact[1:], shapes.teacher.preact[1:], strict=False)
        return nn.ModuleList(nn.Identity() if s == t else connector(s[0], t[0]) for s, t in pairs)

    def task(self, signals: Signals) -> Terms:
        """The loss on the labels, after the phase."""
        return {} if in_init_phase(signals, self.init_share) else super().task(signals)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Distance to the right side of the boundaries, during the phase."""
        if not in_init_phase(signals, self.init_share):
            return {}
        layers = []
        for connect, map_s, map_t in zip(
            modules.children(), signals.student.preact[1:], signals.teacher.preact[1:], strict=False
        ):
            layers.append(boundary_gap(*to_same_size(connect(map_s), map_t), self.margin))
        weighted = [loss / 2.0**above for above, loss in enumerate(reversed(layers))]
        return {"boundary": self.weight * signals.mean(torch.stack(weighted).sum(dim=0))}


def boundary_gap(map_s: Tensor, map_t: Tensor, margin: float) -> Tensor:
    """Squared distance of neurons ``(B, C, H, W)`` from the teacher's side, per sample ``(B,)``."""
    missing = torch.where(map_t > 0, margin - map_s, margin + map_s)
    return missing.relu().square().sum(dim=(1, 2, 3))


def connector(channels_s: int, channels_t: int) -> nn.Module:
    """A 1x1 convolution, drawn as by He for its outputs, and a batch norm."""
    conv = nn.Conv2d(channels_s, channels_t, 1, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / channels_t))
    return nn.Sequential(conv, nn.BatchNorm2d(channels_t))


def in_init_phase(signals: Signals, init_share: float) -> bool:
    """Whether the epoch belongs to the first ``init_share`` of the stage."""
    return signals.epoch <= round(init_share * signals.epochs)


def why_not_share(init_share: float) -> str | None:
    """Why this is no share of a stage, or None."""
    if 0.0 <= init_share <= 1.0:
        return None
    return f"init_share is {init_share:g}; expected 0 to 1"
