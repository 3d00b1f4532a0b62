"""Residual KD: an assistant learns what the student's feature lacks, and is added to it at the end.

Paper: Gao, Shen, Li, Loy, "Residual Knowledge Distillation", arXiv 2002.09168.
Loss: ``ce_weight * CE(z_s) + weight * mean((F_t - l(F_s))^2)
+ residual_weight * mean(((F_t - l(F_s)) - F_a)^2) + combined_weight * CE(z_c)``, mean over batch,
channels and positions. F_s and F_t are the maps before global pooling, both average-pooled to the
smaller of the two sizes; l takes F_s to the teacher's space ``(B, D_t, H, W)``: a 1x1 convolution
with batch norm, or nothing if the widths are equal. F_a is the assistant's map in that space. The
difference that it learns is a constant in its loss. z_c ``(B, K)`` are the logits of a linear
classifier on the mean of ``l(F_s) + F_a`` over positions.

What is evaluated and exported is z_c: student, l, assistant and that classifier. Its label loss
trains all four of them, as the sum is what must be told apart in the end. The student's own
classifier is trained by ``ce_weight`` as ever, for it is the bare student that the next stage
starts from.

The assistant sees the images: a 3x3 convolution of ``assistant_width`` channels, then separable
convolutions that halve the map and double the channels until it is as small as F_s, then a 1x1
convolution. With 16 channels it costs 1 to 5 million multiply-accumulates for CIFAR networks; l may
cost more (10 million from MobileNetV2 to ResNet50).

Deviations: of the paper no more than the abstract could be read, and no code was found. It has S
mimic T's feature maps and A the residual error, and takes S and A from one network split in two, so
that both cost what it did. Here the student stays whole and the assistant comes on top, so compare
at equal cost. The networks' common space, the form of A, the weights, and one phase for all of it
are decisions of this code. Known elsewhere as RKD, which here is relational KD.
Defaults: none published that could be read; 1 for all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import IncompatibleError
from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.headless import Headless
from smskd.methods.ofa_branches import SeparableConv, draw_weights
from smskd.methods.simkd import smaller_size, why_no_maps
from smskd.methods.srrl import AnyBatchNorm2d, conv_norm
from smskd.taps import NETWORK, SPATIAL


@dataclass(frozen=True)
class ResKD(Method):
    """Hyper-parameters of residual KD.

    Attributes:
        weight: Weight of the student's distance from the teacher's map.
        residual_weight: Weight of the assistant's distance from what the student lacks.
        combined_weight: Weight of the cross-entropy of student and assistant together.
        assistant_width: Channels of the assistant's first layer.
    """

    name: ClassVar[str] = "reskd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Gao 2020, arXiv 2002.09168"
    needs: ClassVar[Needs] = Needs(True, frozenset({SPATIAL, NETWORK}), frozenset({SPATIAL}))

    weight: float = 1.0
    residual_weight: float = 1.0
    combined_weight: float = 1.0
    assistant_width: int = 16

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a map before pooling."""
        if self.assistant_width < 1:
            return f"assistant_width is {self.assistant_width}; expected at least 1"
        return why_no_maps(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """The way into the teacher's space, the assistant and the classifier of both.

        Raises:
            IncompatibleError: the size of the images is not known.
        """
        if not shapes.image:
            raise IncompatibleError(
                f"{self.name} builds a network on the images, whose size is not known (expected)"
            )
        return Residual(shapes, self.assistant_width)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Mimicry of the student, residual of the assistant, and labels of both together."""
        assert isinstance(modules, Residual)
        assert signals.networks is not None  # asked for in needs
        assert signals.student.spatial is not None
        assert signals.teacher.spatial is not None
        mimic = modules.lifted(signals.student.spatial)
        residual = modules.assistant(signals.networks.images)
        lack = pool_to(signals.teacher.spatial, *modules.size) - mimic
        error = lack.detach() - residual
        combined = F.cross_entropy(
            modules.logits(mimic, residual), signals.labels, reduction="none"
        )
        return {
            "mimic": self.weight * signals.mean(lack.square().mean(dim=(1, 2, 3))),
            "residual": self.residual_weight * signals.mean(error.square().mean(dim=(1, 2, 3))),
            "combined": self.combined_weight * signals.mean(combined),
        }

    def inference_model(self, student: nn.Module, modules: nn.Module) -> nn.Module:
        """The student with its assistant."""
        assert isinstance(modules, Residual)
        return Headless(student, modules.taps, modules)


class Residual(nn.Module):
    """What residual KD trains beside the student, and the head of both at inference.

    Args:
        shapes: Of the pair, with the size of the images.
        width: Channels of the assistant's first layer.
    """

    def __init__(self, shapes: PairShapes, width: int) -> None:
        super().__init__()
        width_s, width_t = shapes.student.spatial[0], shapes.teacher.spatial[0]
        self.taps = shapes.student_taps
        self.size = smaller_size(shapes)
        same = width_s == width_t
        self.lift: nn.Module = nn.Identity() if same else conv_norm(width_s, width_t)
        self.assistant = Assistant(shapes.image, self.size, width, width_t)
        self.classifier = nn.Linear(width_t, shapes.student.num_classes)

    def forward(self, map_s: Tensor, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of the student's map ``(B, D_s, H, W)`` with the assistant's."""
        return self.logits(self.lifted(map_s), self.assistant(images))

    def lifted(self, spatial: Tensor) -> Tensor:
        """The student's map in the teacher's space, ``(B, D_t, H, W)``."""
        lifted: Tensor = self.lift(pool_to(spatial, *self.size))
        return lifted

    def logits(self, mimic: Tensor, residual: Tensor) -> Tensor:
        """Logits ``(B, K)`` of two maps ``(B, D_t, H, W)`` together."""
        # Of static size, so that it exports to old operator sets.
        pooled = F.avg_pool2d(mimic + residual, self.size).flatten(1)
        logits: Tensor = self.classifier(pooled)
        return logits


class Assistant(nn.Module):
    """A slim network from images to a map.

    Args:
        image: ``(C, H, W)``.
        size: Height and width of the map.
        width: Channels of the first layer; each halving doubles them.
        channels: Of the map.
    """

    def __init__(
        self, image: tuple[int, ...], size: tuple[int, int], width: int, channels: int
    ) -> None:
        super().__init__()
        self.size = size
        stem = nn.Conv2d(image[0], width, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, AnyBatchNorm2d(width), nn.ReLU()]
        height, breadth = image[1:]
        while (height + 1) // 2 >= size[0] and (breadth + 1) // 2 >= size[1] and height > 1:
            layers.append(SeparableConv(width, 2 * width))
            height, breadth, width = (height + 1) // 2, (breadth + 1) // 2, 2 * width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 1))
        draw_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, D_t, H, W)`` of images ``(B, C, H, W)``."""
        return pool_to(self.layers(images), *self.size)
