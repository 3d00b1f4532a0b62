"""BYOT: the network's own deepest classifier teaches classifiers on its shallower feature maps.

Paper: Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of
Convolutional Neural Networks via Self Distillation", arXiv 1905.08094.
Loss: ``ce_weight * CE(z, y) + sum_b ((1 - alpha) * CE(z_b, y)
+ alpha * tau^2 * KL(softmax(z / tau) || softmax(z_b / tau)) + beta * ||f_b - f||^2)``, mean over
the batch. z ``(B, K)`` and f ``(B, D)`` are the student's logits and pooled feature, constants as
targets. Branch b sits on map b of 1 to n - 1 (all but the stem's and the last): a bottleneck that
shrinks the map to the size of the last one, f_b ``(B, D)`` its mean over positions, and a linear
classifier z_b. The branches train with the student and are dropped after the stage.

The bottleneck is a 1x1 convolution to D / 4 channels, a k x k one with stride k, where k is the
map's size over the last map's, and a 1x1 one to D channels, each with batch norm and ReLU.

Deviations: the deepest classifier has the whole label loss, as in the authors' later code; the
community's code (luanyunteng), from which bottleneck and defaults are, weighs it with 1 - alpha
too (here ``ce_weight`` 0.9). That code also takes the cross-entropy with soft targets for the
divergence (the same gradient), sums the feature term over the batch, where this takes the mean,
and leaves out of it what is 0 or less in both features (nothing that counts, if both follow a
ReLU). The authors' later code has separable convolutions and attention in the branches, alpha 0.3,
no factor tau^2 and no feature term.
Defaults: the community's code for ResNets on CIFAR-100: alpha 0.1, tau 3, and beta 1.28e-4, which
is its 1e-6 on the sum over 128 samples. It trains 200 epochs at a rate of 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.methods.pooled import no_pooled
from smskd.methods.srrl import AnyBatchNorm2d
from smskd.taps import MAPS, POOLED


@dataclass(frozen=True)
class BYOT(Method):
    """Hyper-parameters of BYOT.

    Attributes:
        alpha: Share of the deepest classifier in what a branch learns, the labels having the rest.
        temperature: tau, softens both distributions.
        beta: Weight of the feature term.
    """

    name: ClassVar[str] = "byot"
    kind: ClassVar[str] = "self"
    paper: ClassVar[str] = "Zhang 2019, arXiv 1905.08094"
    needs: ClassVar[Needs] = Needs(teacher=False, student_roles=frozenset({MAPS, POOLED}))

    alpha: float = 0.1
    temperature: float = 3.0
    beta: float = 1.28e-4

    def check(self, shapes: PairShapes) -> str | None:
        """There must be a map between the stem's and the last, and a pooled feature."""
        maps = shapes.student.maps
        if not 0 <= self.alpha <= 1:
            return f"alpha is {self.alpha:g}; expected a share between 0 and 1"
        if len(maps) < 3:
            return f"the student has {len(maps)} feature maps; expected at least 3"
        if any(len(shape) != 3 for shape in maps):
            return f"expected (C, H, W) maps, got {maps} from the student"
        return no_pooled("student", shapes.student.pooled)

    def build(self, shapes: PairShapes) -> nn.Module:
        """One branch for each map between the stem's and the last."""
        student = shapes.student
        return nn.ModuleList(
            Branch(shape, student.maps[-1], student.pooled, student.num_classes)
            for shape in student.maps[1:-1]
        )

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Labels, deepest logits and deepest feature, for all branches together."""
        assert isinstance(modules, nn.ModuleList)
        assert signals.student.pooled is not None  # asked for in needs
        logits, feature = signals.student.logits.detach(), signals.student.pooled.detach()
        said = [branch(m) for branch, m in zip(modules, signals.student.maps[1:-1], strict=True)]
        labelled = [F.cross_entropy(z, signals.labels, reduction="none") for z, _ in said]
        divergence = [softened_kl(z, logits, self.temperature) for z, _ in said]
        distance = [(f - feature).square().sum(dim=1) for _, f in said]
        return {
            "branches": (1 - self.alpha) * signals.mean(_summed(labelled)),
            "byot": self.alpha * signals.mean(_summed(divergence)),
            "feature": self.beta * signals.mean(_summed(distance)),
        }


class Branch(nn.Module):
    """A bottleneck and a classifier on a map.

    Args:
        shape: ``(C, H, W)`` of the map.
        last: ``(C, H, W)`` of the last map, whose size the bottleneck comes to.
        width: D, width of the branch's feature.
        classes: K.
    """

    def __init__(
        self, shape: tuple[int, ...], last: tuple[int, ...], width: int, classes: int
    ) -> None:
        super().__init__()
        middle = max(1, width // 4)
        shrink = (max(1, shape[1] // last[1]), max(1, shape[2] // last[2]))
        self.bottleneck = nn.Sequential(
            *_layer(shape[0], middle, 1), *_layer(middle, middle, shrink), *_layer(middle, width, 1)
        )
        self.classifier = nn.Linear(width, classes)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and feature ``(B, D)`` of a map ``(B, C, H, W)``."""
        feature = self.bottleneck(feature_map).mean(dim=(2, 3))
        return self.classifier(feature), feature


def _layer(channels: int, out: int, size: int | tuple[int, int]) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, out, size, stride=size)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, AnyBatchNorm2d(out), nn.ReLU()


def _summed(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum(dim=0)
