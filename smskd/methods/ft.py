"""FT: imitate a paraphrase of the teacher's last map that an autoencoder has learned.

Paper: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
arXiv 1802.04977.
Loss, up to epoch ``round(init_share * epochs)`` of the stage: ``ce_weight * CE + paraphrase_weight
* mean((D(E(F_t)) - F_t)^2)``, which trains the paraphraser, encoder E and decoder D, and gives the
student no gradient but that of the labels. Afterwards: ``ce_weight * CE + weight *
mean(|q(T(F_s)) - q(E(F_t))|^p2)``, mean over batch and positions; E is fixed, the translator T is
trained with the student, and ``q(F) = normalise(mean_c |F_c|^p1)`` is flattened, of unit L2 norm.
F_s and F_t are the last maps; E and T make ``rate * C_t`` channels of them.

In the first phase the student learns from the labels. The paper and RepDistiller train the
paraphraser before the student, outside its budget; the two do not depend on each other, so here
they share the epochs, and the student does not idle for an eighth of the stage.

Deviations from the paper, all as in RepDistiller: q averages over channels (the paper normalises
the whole factor), the paraphraser's loss is squared (L1 in the authors' code), T has batch norms,
the weight is 200 (500). Not as in RepDistiller: its F^p1 is |F|^p1 here, the same for the default;
and the paraphraser is trained under the stage's learning rate. Theirs is 0.01 with ResNets, whose
maps make it diverge at 0.05: a paraphrase_weight of 0.2 gives the same steps at 0.05. The larger
factor is average-pooled to the smaller.
Defaults: RepDistiller (``--distill factor``: CE 1, weight 200, rate 0.5, p1 2, p2 1, 30 of 240
epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from smskd.methods.ab import in_init_phase, why_not_share
from smskd.methods.at import attention
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.nst import to_same_size, why_not_maps

SLOPE = 0.1
"""Of every LeakyReLU below 0."""


@dataclass(frozen=True)
class FT(Method):
    """Hyper-parameters of FT.

    Attributes:
        weight: Weight of the factor term.
        paraphrase_weight: Weight of the paraphraser's loss in its phase.
        rate: Channels of a factor, as a share of the teacher's.
        p1: Power of the absolute factor, at least 1, before the mean over channels.
        p2: Power of the absolute difference of two factors, at least 1.
        init_share: Share of the stage's epochs in which the paraphraser is trained.
    """

    name: ClassVar[str] = "ft"
    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Kim 2018, arXiv 1802.04977"
    needs: ClassVar[Needs] = Needs.features("maps")

    weight: float = 200.0
    paraphrase_weight: float = 0.2
    rate: float = 0.5
    p1: float = 2.0
    p2: float = 1.0
    init_share: float = 0.125

    def check(self, shapes: PairShapes) -> str | None:
        """Both networks must have a spatial map, and the factor at least one channel."""
        for name, power in (("p1", self.p1), ("p2", self.p2)):
            if power < 1:
                return f"{name} is {power:g}; expected at least 1 (its gradient is infinite below)"
        if reason := why_not_share(self.init_share) or why_not_maps(shapes, "maps", 1):
            return reason
        if self._channels(shapes) < 1:
            width = shapes.teacher.maps[-1][0]
            return f"rate {self.rate:g} of {width} channels is none; expected at least 1"
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The paraphraser's two halves and the translator."""
        c_s, c_t = shapes.student.maps[-1][0], shapes.teacher.maps[-1][0]
        factor = self._channels(shapes)
        return nn.ModuleDict(
            {
                "encoder": _layers(nn.Conv2d, (c_t, c_t, factor, factor)),
                "decoder": _layers(nn.ConvTranspose2d, (factor, factor, c_t, c_t)),
                "translator": _layers(nn.Conv2d, (c_s, c_s, factor, factor), norms=True),
            }
        )

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """What the paraphraser loses, and after its phase the difference of the factors."""
        encoder, decoder, translator = modules.children()
        map_s, map_t = signals.student.maps[-1], signals.teacher.maps[-1]
        if in_init_phase(signals, self.init_share):
            loss = F.mse_loss(decoder(encoder(map_t)), map_t)
            return {"paraphrase": self.paraphrase_weight * loss}
        with torch.no_grad():
            factor_t = encoder(map_t)
        factor_s, factor_t = to_same_size(translator(map_s), factor_t)
        gap = attention(factor_s, self.p1) - attention(factor_t, self.p1)
        return {"factor": self.weight * signals.mean(gap.abs().pow(self.p2).mean(dim=1))}

    def _channels(self, shapes: PairShapes) -> int:
        return int(self.rate * shapes.teacher.maps[-1][0])


def _layers(
    conv: type[nn.Conv2d | nn.ConvTranspose2d], channels: tuple[int, ...], norms: bool = False
) -> nn.Module:
    """3x3 convolutions from each number of channels to the next, a LeakyReLU after each."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers.append(conv(before, after, kernel_size=3, stride=1, padding=1))
        layers += [nn.BatchNorm2d(after)] if norms else []
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)
