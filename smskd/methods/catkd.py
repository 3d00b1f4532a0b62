"""CAT-KD: attend to each class at the places in the image where the teacher sees it.

Paper: Guo, Yan, Li, Lin, "Class Attention Transfer Based Knowledge Distillation",
arXiv 2304.12777.
Loss: ``ce_weight * CE + weight * mean((A_s - A_t)^2)``, mean over batch, classes and positions.
``A = unit(pool(W F))`` ``(B, K, r, r)`` are class activation maps: the classifier's weights W
``(K, D)`` applied at each position of the map before pooling F ``(B, D, H, W)``, average-pooled to
r x r, and each map divided by its L2 norm if ``normalise``. The student's W is trained by this too.

Deviations from the authors' code: they rebuild both networks with a 1x1 convolution without bias in
place of the classifier; here the networks stay as they are, with the bias in their logits, and the
activation maps leave it out. So the teacher's logits keep it too, which theirs lose. Pooling comes
before W: the same, but cheaper. Maps of zeros, whose norm cannot be 1, stay zero, and have a finite
gradient.
Defaults: the authors' configuration file (CE 1, weight 400, resolution 2, normalised). Their runs
set them per pair. Normalised: 15 for vgg13-MobileNetV2, 40 for ResNet50-MobileNetV2, 600 for
resnet32x4-ShuffleV1 and resnet32x4-ShuffleV2, 80 for wrn40-2-ShuffleV1, the last three at
resolution 4. Not normalised: 0.7 for resnet56-20, 1.8 for resnet110-32, 15 for resnet32x4-8x4,
12 for wrn40-2-wrn16-2, 1.5 for wrn40-2-wrn40-1, 4.5 for vgg13-vgg8. They advise a weight that
brings the term to 1 to 50 after the first epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.simkd import why_no_maps, why_other_classes
from smskd.methods.srrl import FrozenLinear, teacher_classifier
from smskd.taps import CLASSIFIER, SPATIAL


@dataclass(frozen=True)
class CATKD(Method):
    """Hyper-parameters of CAT-KD.

    Attributes:
        weight: Weight of the gap between the class activation maps.
        resolution: r, height and width of the maps that are compared.
        normalise: Whether each class's map is divided by its norm.
    """

    name: ClassVar[str] = "catkd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Guo 2023, arXiv 2304.12777"
    needs: ClassVar[Needs] = Needs.features(SPATIAL, CLASSIFIER)

    weight: float = 400.0
    resolution: int = 2
    normalise: bool = True

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a map before pooling, and the same classes."""
        if self.resolution < 1:
            return f"resolution is {self.resolution}; expected at least 1"
        return why_no_maps(shapes) or why_other_classes(shapes)

    def build(self, shapes: PairShapes) -> nn.Module:
        """A copy of the teacher's classifier.

        Raises:
            IncompatibleError: there is no teacher to copy from.
        """
        return FrozenLinear(teacher_classifier(shapes), persistent=False)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared gap of the class activation maps."""
        map_s, map_t, networks = signals.student.spatial, signals.teacher.spatial, signals.networks
        assert map_s is not None  # asked for in needs
        assert map_t is not None
        assert networks is not None
        assert networks.student_classifier is not None
        assert isinstance(modules, FrozenLinear)
        maps_s = self._attention(map_s, networks.student_classifier.weight)
        maps_t = self._attention(map_t, modules.weight)
        return {"cat": self.weight * signals.mean((maps_s - maps_t).square().mean(dim=(1, 2, 3)))}

    def _attention(self, spatial: Tensor, weight: Tensor) -> Tensor:
        """Class activation maps ``(B, K, r, r)`` of ``(B, D, H, W)``."""
        pooled = pool_to(spatial, self.resolution, self.resolution)
        maps = F.conv2d(pooled, weight[:, :, None, None])
        return unit(maps) if self.normalise else maps


def unit(maps: Tensor) -> Tensor:
    """Divide each map of ``(B, K, H, W)`` by its L2 norm; zeros stay zeros."""
    squared = maps.square().sum(dim=(2, 3), keepdim=True)
    # sqrt has an infinite slope at 0: maps of zeros are divided by 1 instead.
    norm = squared.where(squared > 0, torch.ones_like(squared)).sqrt()
    return maps / norm
