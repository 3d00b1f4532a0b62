"""SP: samples that are alike to the teacher shall be alike to the student.

Paper: Tung, Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682.
Loss: ``ce_weight * CE + weight * ||G_s - G_t||_F^2 / B^2``, where ``G = rownorm(Q Q^T)`` is
``(B, B)`` with rows of unit L2 norm, and ``Q`` is the last feature map as ``(B, C * H * W)``. Only
B x B matrices are compared, so the networks' maps may have any size.

Deviations from the paper: none; of the layer pairs it allows, the last one is used, as RepDistiller
and mdistiller do. Only non-zero rows can have unit norm: rows of zeros stay zero.
Defaults: RepDistiller (``--distill similarity``: CE 1, weight 3000), same in mdistiller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class SP(Method):
    """Hyper-parameters of SP.

    Attributes:
        weight: Weight of the similarity term.
    """

    name: ClassVar[str] = "sp"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Tung 2019, arXiv 1907.09682"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 3000.0

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a map."""
        for who, maps in (("student", shapes.student.maps), ("teacher", shapes.teacher.maps)):
            if not maps:
                return f"the {who} has no feature map; expected at least 1"
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Squared Frobenius distance of the two similarity matrices, per entry."""
        gap = similarity(signals.student.maps[-1]) - similarity(signals.teacher.maps[-1])
        return {"sp": self.weight * gap.square().mean()}


def similarity(feature_map: Tensor) -> Tensor:
    """Row-normalised Gram matrix of a batch: ``(B, ...)`` to ``(B, B)``."""
    flat = feature_map.flatten(1)
    return F.normalize(flat @ flat.T)
