"""SDD: distil the logits of regions of the image too, and more where they contradict the whole.

Paper: Wei, Luo, Luo, "Scale Decoupled Distillation", arXiv 2403.13512.
Change: for each m in ``scales``, the map before global pooling ``(B, D, H, W)`` is averaged to
m x m regions, and the network's own classifier is applied to each: R region logits ``(B, K)``. The
loss of the modified method is taken on each region of student and teacher, and the mean over the R
regions replaces it (scale 1 is the whole image). A region of a sample counts
``contradiction_weight`` times where the teacher is right on the region and wrong on the image, or
the reverse; else once. The weights reach losses that average samples with ``Signals.mean``, and
multiply those that other modifiers set. Put SDD first: what changes logits (logit standardisation)
then sees each region's.

Deviations from the authors' code: none where the map's sides are powers of 2. There every map is
pooled to 4 x 4 first, one of 7 x 7 by overlapping windows; here each scale pools the map itself and
scale 1 is exactly the whole. A map smaller than a scale repeats its cells, as there (MobileNetV2's
is 2 x 2). With several teachers the first one decides what contradicts. The method is run once a
region, not on one batch of all regions: the same for losses of single samples, and well defined for
relations between samples and for methods with features.
Defaults: weight 2 and scales 1, 2, 4 (the code; [1, 2, 4] for networks of different kinds, [1, 2]
for similar ones). They grow KD's loss for 1 epoch and DKD's and NKD's for 20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Modifier, Needs, PairShapes, Signals, Terms
from smskd.taps import CLASSIFIER, SPATIAL, Outputs


@dataclass(frozen=True)
class SDD(Modifier):
    """Hyper-parameters of SDD.

    Attributes:
        scales: Each m divides the image into m x m regions.
        contradiction_weight: Weight of regions on which the teacher contradicts itself.
    """

    name: ClassVar[str] = "sdd"
    paper: ClassVar[str] = "Wei 2024, arXiv 2403.13512"
    fits: ClassVar[tuple[str, ...]] = ("response",)
    needs: ClassVar[Needs] = Needs.features(SPATIAL, CLASSIFIER)

    scales: tuple[int, ...] = (1, 2, 4)
    contradiction_weight: float = 2.0

    def check(self, shapes: PairShapes) -> str | None:
        """Regions need a map before the pooling, and a teacher."""
        if not self.scales or min(self.scales) < 1:
            return f"scales are {self.scales}; expected one or more, each at least 1"
        if not shapes.teachers:
            return "it was given no teacher (expected at least 1)"
        for who, sizes in (("student", shapes.student), ("teacher", shapes.teacher)):
            if len(sizes.spatial) != 3:
                return f"expected a (D, H, W) map before pooling, the {who} has {sizes.spatial}"
        return None

    def around(
        self, distill: Callable[[Signals], Terms], signals: Signals, modules: nn.Module
    ) -> Terms:
        """The mean over the regions of each of the method's terms."""
        networks = signals.networks
        assert networks is not None  # asked for in needs
        regions_s = self._regions(signals.student, networks.student_classifier)
        heads = zip(signals.teachers, networks.teacher_classifiers, strict=True)
        regions_t = [self._regions(teacher, classifier) for teacher, classifier in heads]
        weights = self._weights(regions_t[0], signals)
        of_regions = [
            distill(replace(signals.with_logits(student, teachers), weights=weight))
            for student, *teachers, weight in zip(regions_s, *regions_t, weights, strict=True)
        ]
        names = of_regions[0]
        return {name: torch.stack([terms[name] for terms in of_regions]).mean() for name in names}

    def _regions(self, outputs: Outputs, classifier: nn.Linear | None) -> Tensor:
        """Logits ``(R, B, K)`` of all regions."""
        spatial = outputs.spatial
        assert spatial is not None  # asked for in needs
        assert classifier is not None
        pooled = [pool_to(spatial, scale, scale).flatten(2) for scale in self.scales]
        logits: Tensor = classifier(torch.cat(pooled, dim=2).permute(2, 0, 1))
        return logits

    def _weights(self, regions: Tensor, signals: Signals) -> Tensor:
        """``(R, B)``, times what is set already."""
        right = regions.argmax(dim=2) == signals.labels
        right_on_whole = signals.teacher.logits.argmax(dim=1) == signals.labels
        extra = (self.contradiction_weight - 1.0) * (right != right_on_whole).to(regions.dtype)
        return (1.0 + extra) if signals.weights is None else (1.0 + extra) * signals.weights
