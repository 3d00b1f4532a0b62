"""OFA-KD: classifiers on all stages of the student learn the teacher's logits, whatever its kind.

Paper: Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous
Architectures in Knowledge Distillation", arXiv 2310.19444.
Loss: ``ce_weight * CE + weight * L(z_s) + branch_weight * sum_b L(z_b)``, mean over the batch, with
``L(z) = -sum_c ((p_t,c + 1[c = y])^gamma - 1[c = y]) log p_c``, where ``p = softmax(z / tau)``. z_s
and z_t ``(B, K)`` are the networks' logits and z_b those of a branch on map b of 1 to n (all but
the stem's). A gamma above 1 raises the target of the true class, the more the surer the teacher is;
with gamma 1 the loss is the cross-entropy with the teacher's probabilities, which is KD but for a
constant. The branches train with the student and are dropped after the stage.

"conv" branches, for maps of convolutional networks, halve the map n - b times with separable
convolutions, each doubling the channels, the last one coming to those of the wider network's last
feature; the last map has a 1x1 convolution instead. Then mean over positions and a linear layer.
"attention" branches, for tokens that are tapped as maps, merge patches to a grid of 7 to 13 a side,
have max(n - b, 1) transformer blocks with 4 heads as wide as the student's last map, and the same
end.

Deviations from the authors' code: student's and teacher's widths are those of the last map and of
the classifier's input (their "feature dimension"); a teacher without a tapped classifier does not
count. Tokens have lost their class token, so attention branches average the patches even where
the student has one. Patches are merged while the grid is even (theirs fails where it is odd), with
GELU after every merge; tokens of another width are projected where nothing is merged. The log of
the student's probabilities is taken in one piece. A modifier changes the logits of the two
networks, not those of branches.
Defaults: the authors' code (all weights 1, tau 1, gamma 1; for ImageNet its README has gamma 1.5).
It trains CIFAR-100 at 224 pixels for 300 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.ofa_branches import HEADS, AttentionBranch, ConvBranch
from smskd.taps import MAPS


@dataclass(frozen=True)
class OFA(Method):
    """Hyper-parameters of OFA-KD.

    Attributes:
        weight: Weight of the loss on the student's own logits.
        branch_weight: Weight of each branch's.
        gamma: Power of the enhanced target; 1 does not enhance it.
        temperature: tau, softens all distributions.
        branch: Form of the branches.
    """

    name: ClassVar[str] = "ofa"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Hao 2023, arXiv 2310.19444"
    needs: ClassVar[Needs] = Needs(student_roles=frozenset({MAPS}))
    exempt: ClassVar[Mapping[str, str]] = {
        "order_of_classes": "the branches' classifiers are drawn for the classes as they come"
    }

    weight: float = 1.0
    branch_weight: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    branch: Literal["conv", "attention"] = "conv"

    def check(self, shapes: PairShapes) -> str | None:
        """There must be maps to put branches on."""
        maps = shapes.student.maps
        if self.gamma <= 0:
            return f"gamma is {self.gamma:g}; expected a power above 0"
        if len(maps) < 2:
            return (
                f"the student has {len(maps)} feature maps; expected at least 2, as the first, the "
                "stem's, has no branch"
            )
        if any(len(shape) != 3 for shape in maps):
            return f"expected (C, H, W) maps, got {maps} from the student"
        if self.branch == "attention" and maps[-1][0] % HEADS:
            return (
                f"the student's last map has {maps[-1][0]} channels; expected a multiple of the "
                f"{HEADS} heads of attention branches"
            )
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """A branch for each map after the stem's."""
        student = shapes.student
        last = len(student.maps) - 1
        branches: list[nn.Module] = []
        for i, shape in enumerate(student.maps[1:], start=1):
            if self.branch == "conv":
                width = _wider(shapes)
                branches.append(ConvBranch(shape[0], last - i, width, student.num_classes))
            else:
                width, depth = student.maps[-1][0], max(last - i, 1)
                branches.append(AttentionBranch(shape, width, depth, student.num_classes))
        return nn.ModuleList(branches)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The loss of the student's logits, and of all branches together."""
        assert isinstance(modules, nn.ModuleList)
        maps = signals.student.maps[1:]
        said = [branch(feature_map) for branch, feature_map in zip(modules, maps, strict=True)]
        target = enhanced(signals.teacher.logits / self.temperature, signals.labels, self.gamma)
        own, *others = (
            -(target * F.log_softmax(z / self.temperature, dim=1)).sum(dim=1)
            for z in (signals.student.logits, *said)
        )
        return {
            "ofa": self.weight * signals.mean(own),
            "branches": self.branch_weight * signals.mean(torch.stack(others).sum(dim=0)),
        }


def enhanced(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The target of each class, ``(p + 1[c = y])^gamma - 1[c = y]``.

    Args:
        logits: Teacher ``(B, K)``.
        labels: y ``(B,)``.
        gamma: Power.
    """
    true = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return (logits.softmax(dim=1) + true).pow(gamma) - true


def _wider(shapes: PairShapes) -> int:
    """Width of the last feature of the wider network."""
    widths = [shapes.student.maps[-1][0]]
    for network in shapes.teacher_networks:
        if network.taps.classifier is not None:
            classifier = network.model.get_submodule(network.taps.classifier)
            widths.append(int(getattr(classifier, "in_features", 0)))
    return max(widths)
