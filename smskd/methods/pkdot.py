"""PKDOT: give the batch the relational structure it has for the teacher, by optimal transport.

Paper: Aslam, Zeeshan, Belharbi, Pedersoli, Koerich, Bacon, Granger, "Distilling Privileged
Multimodal Information for Expression Recognition using Optimal Transport", arXiv 2401.15489.
Loss: ``ce_weight * CE + weight * Sinkhorn(rows of A_t, rows of A_s)``. S is ``(B, B)``, the cosines
of the pooled features, less its minimum; A is ``(B, k)``, in each row the k columns in which the
teacher's similarity is lowest, lowest first, the same columns for both networks. The B rows are the
points of a cloud for the Sinkhorn divergence (:mod:`smskd.methods.sinkhorn`, blur 0.1). No adapter
is needed: only B x B matrices are compared.

Deviations from the paper: the teacher and student are image classifiers; its T-Net, which makes up
for a modality that the student lacks, has no place here. The paper speaks of the k most similar
samples as anchors, the authors' code takes the k least similar (the other variant is commented
out): ``anchor`` chooses, the code's is the default.
Deviations from the code: the columns are in order of the teacher's similarity (equal ones in that
of the student's), theirs in that of a partial sort, which depends on the order of the batch and
changes the cost; k is at most the batch size, where theirs fails on 30 samples or fewer; a feature
of zeros has similarity 0, where theirs is NaN; and the Sinkhorn iterations have a fixed number,
where those of geomloss follow the data.
Defaults: the code (PKDOT_kfold.py: CE 1, 0.6, 30 columns at batch 128, p 2, blur 0.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.pooled import no_pooled
from smskd.methods.sinkhorn import sinkhorn_divergence
from smskd.taps import Outputs


@dataclass(frozen=True)
class PKDOT(Method):
    """Hyper-parameters of PKDOT.

    Attributes:
        weight: Weight of the transport term.
        columns: k, how many other samples each sample is related to; at most the batch size.
        anchor: Whether those are the least or the most similar to it, for the teacher.
        blur: Length below which differences between rows are blurred, above 0.
    """

    name: ClassVar[str] = "pkdot"
    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Aslam 2024, arXiv 2401.15489"
    needs: ClassVar[Needs] = Needs.features("pooled")

    weight: float = 0.6
    columns: int = 30
    anchor: Literal["lowest", "highest"] = "lowest"
    blur: float = 0.1

    def check(self, shapes: PairShapes) -> str | None:
        """There must be features, and others in the batch to relate a sample to."""
        if self.columns < 1:
            return f"columns is {self.columns}; expected at least 1"
        if self.blur <= 0:
            return f"blur is {self.blur:g}; expected more than 0"
        networks = [("student", shapes.student), *(("teacher", t) for t in shapes.teachers)]
        for who, network in networks:
            if reason := no_pooled(who, network.pooled):
                return reason
        if shapes.batch_size == 1:
            return (
                "a batch is 1 sample, which is related to nothing; expected batches of at least 2 "
                f"(of {self.columns} or more to fill all columns)"
            )
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Transport between the rows of the two similarity matrices."""
        similar_s, similar_t = pooled_cosines(signals.student), pooled_cosines(signals.teacher)
        return {"transport": self.weight * self.transport(similar_s, similar_t)}

    def transport(self, similar_s: Tensor, similar_t: Tensor) -> Tensor:
        """Divergence of the rows of two ``(..., B, B)`` in the teacher's columns: ``(...)``."""
        similar_s = similar_s.expand_as(similar_t)
        chosen = self._chosen_columns(similar_s, similar_t)
        rows_s = _from_zero(similar_s).gather(-1, chosen)
        rows_t = _from_zero(similar_t).gather(-1, chosen)
        return sinkhorn_divergence(rows_t, rows_s, self.blur)

    def _chosen_columns(self, similar_s: Tensor, similar_t: Tensor) -> Tensor:
        """The k columns of each row ``(..., B, k)``; the student's order where the teacher ties."""
        descending = self.anchor == "highest"
        first = similar_s.argsort(dim=-1, stable=True, descending=descending)
        then = similar_t.gather(-1, first).argsort(dim=-1, stable=True, descending=descending)
        return first.gather(-1, then)[..., : self.columns]


def pooled_cosines(outputs: Outputs) -> Tensor:
    """Cosines ``(B, B)`` between the pooled features of a batch."""
    assert outputs.pooled is not None  # asked for in needs
    return cosines(outputs.pooled)


def cosines(feature: Tensor) -> Tensor:
    """Cosines between the samples of a batch: ``(B, D)`` to ``(B, B)``; features of 0 have 0."""
    squared = feature.square().sum(dim=1, keepdim=True)
    # The norm has no slope at 0: dead features take a detour over 1.
    unit = feature / squared.where(squared > 0, torch.ones_like(squared)).sqrt()
    return unit @ unit.T


def _from_zero(similar: Tensor) -> Tensor:
    return similar - similar.amin(dim=(-2, -1), keepdim=True)
