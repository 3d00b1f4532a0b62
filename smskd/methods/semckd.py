"""SemCKD: every student map learns from all teacher maps, most from those of like similarities.

Paper: Chen, Mei, Zhang, Wang, Wang, Feng, Chen, "Cross-Layer Distillation with Semantic
Calibration", arXiv 2012.03236.
Loss: ``ce_weight * CE + kd_weight * KD + weight * mean_bs(sum_t(a_bst * g_bst))``, KD as in
:mod:`smskd.methods.kd`. For sample b, ``g_bst`` is the mean squared difference of student map s in
projector P_st and teacher map t, and ``a_bst = softmax_t(q_bs . k_bt)``. The query q_bs is the unit
vector that a small network (linear, ReLU, linear; one for each map) makes of row b of the
similarities ``F_s F_s^T`` ``(B, B)``, F flattened; the key k_bt the same of the teacher's. P_st is
a 1x1 convolution to twice the teacher's channels, a 3x3 one and a 1x1 one to them, with batch norm
and ReLU between. The larger map is average-pooled to the smaller. Stems' maps are not used.

Deviations from the authors' code. Their small networks take exactly one batch, so they leave out an
epoch's last one; here rows of another length are filled with zeros to the batch size (or, if
longer, cut). They take rows in the batch's order, so that the loss depends on it
(``compat: semckd``); here a row begins with the samples to which the teacher's maps respond most
(sum of squares): the same values in an order that the samples decide. Projectors are at most 1024
channels wide inside, no limit for teachers of up to 512; a ResNet50 would give them more than 800
million parameters. Zero vectors stay zero, where theirs become NaN.
Defaults: the authors' script (CE 1, KD 1, weight 400, temperature 4; embeddings of a quarter of the
batch size).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.at import pool_to
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.methods.simkd import why_other_classes
from smskd.methods.srrl import conv_norm
from smskd.taps import MAPS

MAX_INNER = 1024
"""Most channels inside a projector."""

USUAL_BATCH = 64
"""Length of the similarities' rows where the batch size is unknown."""


@dataclass(frozen=True)
class SemCKD(Method):
    """Hyper-parameters of SemCKD.

    Attributes:
        weight: Weight of the calibrated gap between the maps.
        kd_weight: Weight of KD beside it.
        temperature: tau of KD.
        compat: "semckd" takes similarities in the batch's order, as the authors do.
    """

    name: ClassVar[str] = "semckd"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen 2021, arXiv 2012.03236"
    needs: ClassVar[Needs] = Needs.features(MAPS)

    weight: float = 400.0
    kd_weight: float = 1.0
    temperature: float = 4.0
    compat: Literal["none", "semckd"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have spatial maps after the stem's, and for KD the same classes."""
        for who, maps in (("student", shapes.student.maps), ("teacher", shapes.teacher.maps)):
            if len(maps) < 2:
                return (
                    f"the {who} has {len(maps)} feature maps; expected at least 2, as the first, "
                    "the stem's, is not used"
                )
            if any(len(shape) != 3 for shape in maps):
                return f"expected (C, H, W) maps, got {maps} from the {who}"
        return why_other_classes(shapes) if self.kd_weight else None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The embeddings of similarities and the projectors."""
        widths_s, widths_t = (
            [shape[0] for shape in one.maps[1:]] for one in (shapes.student, shapes.teacher)
        )
        length = shapes.batch_size or USUAL_BATCH
        return _Calibration(widths_s, widths_t, length, self.compat == "none")

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The calibrated gap, and KD."""
        gap = modules(signals.student.maps[1:], signals.teacher.maps[1:])
        terms = {"semckd": self.weight * signals.mean(gap)}
        if self.kd_weight:
            kl = softened_kl(signals.student.logits, signals.teacher.logits, self.temperature)
            terms["kd"] = self.kd_weight * signals.mean(kl)
        return terms


class _Calibration(nn.Module):
    """Embeddings and projectors; ``length`` is that of a row of similarities."""

    def __init__(
        self, widths_s: Sequence[int], widths_t: Sequence[int], length: int, sort: bool
    ) -> None:
        super().__init__()
        self.length = length
        self.sort = sort
        self.queries = nn.ModuleList(_embedding(length) for _ in widths_s)
        self.keys = nn.ModuleList(_embedding(length) for _ in widths_t)
        self.projectors = nn.ModuleList(projector(s, t) for s, t in product(widths_s, widths_t))

    def forward(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        """Gap of each sample ``(B,)``, weighted by attention."""
        order = self._order(maps_t)
        queries = self._embed(self.queries, maps_s, order)
        keys = self._embed(self.keys, maps_t, order)
        attention = F.softmax(queries @ keys.transpose(1, 2), dim=2)
        pairs = zip(self.projectors, product(maps_s, maps_t), strict=True)
        gaps = torch.stack([_gap(project, *maps) for project, maps in pairs], dim=1)
        return (attention.flatten(1) * gaps).sum(dim=1) / len(maps_s)

    def _order(self, maps_t: Sequence[Tensor]) -> Tensor:
        if not self.sort:
            return torch.arange(len(maps_t[0]), device=maps_t[0].device)
        response = torch.stack([m.flatten(1).square().sum(dim=1) for m in maps_t]).sum(dim=0)
        return response.argsort(descending=True, stable=True)

    def _embed(
        self, embeddings: Iterable[nn.Module], maps: Sequence[Tensor], order: Tensor
    ) -> Tensor:
        """One unit vector a sample and map, ``(B, number of maps, E)``."""
        rows = [similarities(m, order, self.length) for m in maps]
        vectors = [embed(row) for embed, row in zip(embeddings, rows, strict=True)]
        return F.normalize(torch.stack(vectors, dim=1), dim=2)


def similarities(feature_map: Tensor, order: Tensor, length: int) -> Tensor:
    """Inner products with the samples in ``order``, zeros after them: ``(B, length)``."""
    flat = feature_map.flatten(1)
    return F.pad((flat @ flat.T)[:, order], (0, length - len(flat)))


def projector(c_s: int, c_t: int) -> nn.Sequential:
    """The projector P: ``(B, C_s, H, W)`` to ``(B, C_t, H, W)``."""
    inner = min(2 * c_t, MAX_INNER)
    return nn.Sequential(
        *(conv_norm(c_s, inner), nn.ReLU()),
        *(conv_norm(inner, inner, 3), nn.ReLU()),
        nn.Conv2d(inner, c_t, 1, bias=False),
    )


def _embedding(length: int) -> nn.Sequential:
    width = max(length // 4, 1)
    return nn.Sequential(nn.Linear(length, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _gap(project: nn.Module, map_s: Tensor, map_t: Tensor) -> Tensor:
    """Mean squared difference of each sample ``(B,)``, at the smaller size."""
    height, width = (min(map_s.shape[d], map_t.shape[d]) for d in (2, 3))
    gap = project(pool_to(map_s, height, width)) - pool_to(map_t, height, width)
    per_sample: Tensor = gap.square().mean(dim=(1, 2, 3))
    return per_sample
