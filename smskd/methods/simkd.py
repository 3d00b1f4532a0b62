"""SimKD: learn the teacher's last map only, and classify it with the teacher's own classifier.

Paper: Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher
Classifier", arXiv 2203.14001.
Loss: ``ce_weight * CE + weight * mean((P(F_s) - F_t)^2)``, mean over batch, channels and positions.
F_s ``(B, D_s, H, W)`` and F_t ``(B, D_t, H, W)`` are the maps before pooling; the projector P is a
1x1 convolution to ``D_t / factor`` channels, a 3x3 one and a 1x1 one to D_t, each with batch norm
and ReLU. It is trained with the student and stays: what is evaluated and exported is the student
without its classifier, then P, global average pooling and the teacher's classifier.

Deviations from the paper and the authors' code: none in the mathematics. The larger map is
average-pooled to the smaller as in their code (they compare heights; here height and width are
treated alike). Of MobileNetV2 and ShuffleV2 as students they read the map before the last 1x1
convolution, which then serves for nothing; here it is part of the student. Their loss has terms of
weight 0 on the student's own classifier, so that weight decay shrinks it; here it is not touched at
all, and a later stage that starts from this student must learn it. Their checkpoints lack the
teacher's classifier; here it is saved with the projector. The number of classes must be equal, as
the teacher's classifier takes the place of the student's.
Defaults: the authors' script (``-c 0 -d 0 -b 1``, factor 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.headless import Headless
from smskd.methods.srrl import FrozenLinear, conv_norm, teacher_classifier
from smskd.taps import CLASSIFIER, SPATIAL, Taps


@dataclass(frozen=True)
class SimKD(Method):
    """Hyper-parameters of SimKD.

    Attributes:
        weight: Weight of the gap between the maps.
        factor: The projector's inner width is the teacher's over this.
    """

    name: ClassVar[str] = "simkd"
    trains_classifier: ClassVar[bool] = False
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen 2022, arXiv 2203.14001"
    needs: ClassVar[Needs] = Needs(True, frozenset({SPATIAL}), frozenset({SPATIAL, CLASSIFIER}))

    ce_weight: float = 0.0
    weight: float = 1.0
    factor: int = 2

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a map before pooling, and the same classes."""
        if (reason := why_no_maps(shapes) or why_other_classes(shapes)) is not None:
            return reason
        width = shapes.teacher.spatial[0]
        if not 1 <= self.factor <= width:
            return f"factor is {self.factor}; expected 1 <= factor <= {width}, the teacher's width"
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The projector and a copy of the teacher's classifier, which are the student's new head.

        Raises:
            IncompatibleError: there is no teacher to copy from.
        """
        return _Head(
            projector(shapes.student.spatial[0], shapes.teacher.spatial[0], self.factor),
            teacher_classifier(shapes),
            smaller_size(shapes),
            shapes.student_taps,
        )

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared gap of the projected and the teacher's map."""
        map_s, map_t = signals.student.spatial, signals.teacher.spatial
        assert map_s is not None  # asked for in needs
        assert map_t is not None
        assert isinstance(modules, _Head)
        gap = modules.project(map_s) - pool_to(map_t, *modules.size)
        return {"simkd": self.weight * signals.mean(gap.square().mean(dim=(1, 2, 3)))}

    def inference_model(self, student: nn.Module, modules: nn.Module) -> nn.Module:
        """The student with projector and teacher's classifier in place of its own classifier."""
        assert isinstance(modules, _Head)
        return Headless(student, modules.taps, modules)


class _Head(nn.Module):
    """Projector, pooling and classifier; the map ``(B, D_s, H, W)`` to logits ``(B, K)``."""

    def __init__(
        self, projector: nn.Module, classifier: nn.Linear, size: tuple[int, int], taps: Taps
    ) -> None:
        super().__init__()
        self.projector = projector
        self.classifier = FrozenLinear(classifier, persistent=True)
        self.size = size
        self.taps = taps

    def project(self, map_s: Tensor) -> Tensor:
        """The student's map in the teacher's channels ``(B, D_t, H, W)``."""
        projected: Tensor = self.projector(pool_to(map_s, *self.size))
        return projected

    def forward(self, map_s: Tensor, _images: Tensor) -> Tensor:
        """Classify a map."""
        # Of static size, so that it exports to old operator sets.
        pooled = F.avg_pool2d(self.project(map_s), self.size).flatten(1)
        logits: Tensor = self.classifier(pooled)
        return logits


def projector(c_s: int, c_t: int, factor: int) -> nn.Sequential:
    """The projector P: ``(B, C_s, H, W)`` to ``(B, C_t, H, W)``."""
    inner = c_t // factor
    return nn.Sequential(
        *(conv_norm(c_s, inner), nn.ReLU()),
        *(conv_norm(inner, inner, 3), nn.ReLU()),
        *(conv_norm(inner, c_t), nn.ReLU()),
    )


def smaller_size(shapes: PairShapes) -> tuple[int, int]:
    """Height and width of the smaller of the two maps before pooling."""
    (_, h_s, w_s), (_, h_t, w_t) = shapes.student.spatial, shapes.teacher.spatial
    return min(h_s, h_t), min(w_s, w_t)


def why_no_maps(shapes: PairShapes) -> str | None:
    """Why the maps before pooling cannot be compared, or None."""
    for who, shape in (("student", shapes.student.spatial), ("teacher", shapes.teacher.spatial)):
        if len(shape) != 3:
            return f"the {who}'s map before pooling is {shape}; expected (C, H, W)"
    return None


def why_other_classes(shapes: PairShapes) -> str | None:
    """Why the classes of the two networks cannot be compared, or None."""
    classes_s, classes_t = shapes.student.num_classes, shapes.teacher.num_classes
    if classes_s != classes_t:
        return (
            f"the student has {classes_s} classes and the teacher {classes_t} "
            "(expected the same number)"
        )
    return None
