"""SRRL: the teacher's classifier shall say of the student's feature what it says of the teacher's.

Paper: Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Softmax Regression
Representation Learning", ICLR 2021 (OpenReview ZzwDy_wiWv); their code also cites their earlier
arXiv 2003.04289.
Loss: ``ce_weight * CE + weight * mean((h - h_t)^2) + classifier_weight * mean((c(h) - c(h_t))^2)``
with ``h = pool(T(F_s))`` ``(B, D_t)``. F_s ``(B, D_s, H, W)`` is the student's map before pooling,
T a 1x1 convolution to D_t channels, batch norm and ReLU, trained with the student; h_t ``(B, D_t)``
is the teacher's pooled feature and c its classifier, frozen, so ``c(h_t)`` are its logits
``(B, K)``. The means run over batch and width, and over batch and classes.

Deviations from the authors' code: none in the mathematics. Like theirs, T sees the map, not the
pooled feature, and its convolution begins with He's normal weights (fan out). The SimKD toolbox,
from which the CIFAR-100 numbers of this method usually come, lets T see the pooled feature
(``compat: simkd``) and adds KD of weight 1 at temperature 4; for its protocol train jointly with
``kd`` (weight 1, ce_weight 0). With a batch of one pooled feature T's batch norm, which has no
variance to divide by, uses its running statistics.
Defaults: the authors' ImageNet script (CE 1, feature 1, ``--weight`` 1), which has no KD. The
authors of MGD (cls_KD) give the classifier's term 5 on CIFAR-100.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import IncompatibleError
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import no_pooled
from smskd.taps import CLASSIFIER, POOLED, SPATIAL


@dataclass(frozen=True)
class SRRL(Method):
    """Hyper-parameters of SRRL.

    Attributes:
        weight: Weight of the gap between the features.
        classifier_weight: Weight of the gap between what the teacher's classifier says of them.
        compat: "simkd" pools before the transfer layer, as the SimKD toolbox does.
    """

    name: ClassVar[str] = "srrl"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Yang 2021, ICLR 2021 (OpenReview ZzwDy_wiWv)"
    needs: ClassVar[Needs] = Needs(True, frozenset({SPATIAL}), frozenset({POOLED, CLASSIFIER}))

    weight: float = 1.0
    classifier_weight: float = 1.0
    compat: Literal["none", "simkd"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """The student must have a map before pooling, the teacher a pooled feature."""
        if len(shapes.student.spatial) != 3:
            return (
                f"the student's map before pooling is {shapes.student.spatial}; expected (C, H, W)"
            )
        return no_pooled("teacher", shapes.teacher.pooled)

    def build(self, shapes: PairShapes) -> nn.Module:
        """The transfer layer T and a copy of the teacher's classifier.

        Raises:
            IncompatibleError: there is no teacher to copy from.
        """
        return _Transfer(
            shapes.student.spatial[0], teacher_classifier(shapes), self.compat == "simkd"
        )

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared gaps of the features and of the teacher's classifier on them."""
        feature_t = signals.teacher.pooled
        feature, logits, logits_t = modules(signals.student.spatial, feature_t)
        return {
            "feature": self.weight * signals.mean((feature - feature_t).square().mean(dim=1)),
            "classifier": self.classifier_weight
            * signals.mean((logits - logits_t).square().mean(dim=1)),
        }


class _Transfer(nn.Module):
    def __init__(self, width_s: int, classifier: nn.Linear, pool_first: bool) -> None:
        super().__init__()
        self.pool_first = pool_first
        transfer = conv_norm(width_s, classifier.in_features)
        nn.init.kaiming_normal_(transfer.get_parameter("conv.weight"), mode="fan_out")
        self.transfer = nn.Sequential(transfer, nn.ReLU())
        self.classifier = FrozenLinear(classifier, persistent=False)

    def forward(self, spatial: Tensor, feature_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's feature ``(B, D_t)``, and the logits of both features ``(B, K)``."""
        if self.pool_first:
            spatial = spatial.mean(dim=(2, 3), keepdim=True)
        feature = self.transfer(spatial).mean(dim=(2, 3))
        return feature, self.classifier(feature), self.classifier(feature_t)


class FrozenLinear(nn.Module):
    """A copy of a linear layer that is not trained: ``(B, D)`` to ``(B, K)``.

    Args:
        linear: What is copied.
        persistent: Whether the copy is saved with the modules, or made anew from the teacher.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, persistent: bool) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("weight", linear.weight.detach().clone(), persistent)
        self.register_buffer("bias", bias, persistent)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features."""
        return F.linear(features, self.weight, self.bias)


class AnyBatchNorm2d(nn.BatchNorm2d):
    """Batch norm for batches of any size: one value a channel is scaled by running statistics.

    A single value has no variance; torch refuses to train on it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def conv_norm(c_in: int, c_out: int, size: int = 1) -> nn.Sequential:
    """A convolution that keeps height and width (size is odd), without bias, and a batch norm."""
    conv = nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=AnyBatchNorm2d(c_out)))


def teacher_classifier(shapes: PairShapes) -> nn.Linear:
    """The first teacher's last linear layer.

    Raises:
        IncompatibleError: only the teacher's sizes are known.
        ConfigError: the teacher's taps do not name a linear classifier.
    """
    if not shapes.teacher_networks:
        raise IncompatibleError("the method reuses the teacher's classifier, but got no teacher")
    return shapes.teacher_networks[0].classifier
