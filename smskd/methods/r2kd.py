"""R2KD: match teacher and pruned teacher by correlation distances, on clean and on mixed images.

Paper: Kim, Ham, Cho, Kim, "Robustness-Reinforced Knowledge Distillation with Correlation Distance
and Network Pruning", arXiv 2311.13934.
Loss: ``ce_weight * CE + V + R`` on the batch, plus ``V + R`` on an augmented batch. The teacher's
logits are ``z_t = (1 - pruned_weight) * z_teacher + pruned_weight * z_pruned``, ``(B, K)``.
``V = value_weight * tau^2 * [(1 - mean_i cos(p_s,i, p_t,i)) + (1 - mean_c cos(p_s^c, p_t^c))]``
compares the softmax at tau by sample (rows) and by class (columns).
``R = rank_weight * (1 - mean_i rho(r_s,i, r_t,i))`` is Spearman's: rho is Pearson's correlation, r
are the ranks of the classes of a sample. The pruned teacher has the smallest weights (by size) of
each convolution and linear layer set to 0, and is not trained again.

Deviations from the paper: none in the losses, as far as it could be read; R with soft ranks.
Deviations from the authors' code: its ranks are positions of a sort, which have no gradient, so
that its R is a constant to the optimiser; ``rank: hard`` reproduces that (with mean ranks for equal
values, where theirs depend on the order of the classes), ``rank: soft`` makes R train, with
differentiable ranks of the logits for both networks. The cosines are taken in the log domain,
without 1e-8 beside the norms, which outweighs the columns of improbable classes; "absolute" cosines
there, which changes nothing for probabilities. CutMixPick picks by the entropy of the mixed images,
theirs, by mistake, by that of the clean ones; it keeps half of them, theirs 64, which are all at
batch 64. Cutout takes a quarter of the image's side, their 8 of 32 and 16 of 64 pixels. AutoAugment
is left out: it works on 8-bit images, which a loss does not see. The pruned copy runs in float32
whatever the precision. Modifiers of logits reach those of the batch, not those of the pruned copy
and of the augmented one.
Defaults: the code (mdistiller/engine/cfg.py and tools/train.py: CE 1, weights 2 and 2, tau 4,
pruned 10 %, its weight 0.3, CutMix). rank_temperature is ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from smskd.errors import IncompatibleError
from smskd.methods.base import Method, Needs, Networks, PairShapes, Signals, Terms
from smskd.methods.correlation import pearson
from smskd.methods.mixed_views import Mixing, least_sure, mixed
from smskd.methods.soft_rank import hard_ranks, soft_ranks


@dataclass(frozen=True)
class R2KD(Method):
    """Hyper-parameters of R2KD.

    Attributes:
        value_weight: Weight of the cosines of probabilities.
        rank_weight: Weight of the correlation of ranks.
        temperature: tau, softens the probabilities.
        rank: Differentiable ranks, or those of the authors' code, which do not train.
        rank_temperature: Softness of the ranks, in units of the logits.
        prune_share: Share of each layer's weights that the pruned teacher lacks, 0 to below 1.
        pruned_weight: Share of the pruned teacher in the teacher's logits, 0 to 1.
        augment: The second batch.
    """

    name: ClassVar[str] = "r2kd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Kim 2024, arXiv 2311.13934"
    needs: ClassVar[Needs] = Needs.features("network")
    draws_random: ClassVar[bool] = True

    value_weight: float = 2.0
    rank_weight: float = 2.0
    temperature: float = 4.0
    rank: Literal["soft", "hard"] = "soft"
    rank_temperature: float = 1.0
    prune_share: float = 0.1
    pruned_weight: float = 0.3
    augment: Mixing = "cutmix"

    def check(self, shapes: PairShapes) -> str | None:
        """Shares must be shares; one class has no rank."""
        if not 0 <= self.prune_share < 1:
            return f"prune_share is {self.prune_share:g}; expected 0 to below 1"
        if not 0 <= self.pruned_weight <= 1:
            return f"pruned_weight is {self.pruned_weight:g}; expected 0 to 1"
        if shapes.student.num_classes < 2:
            return f"{shapes.student.num_classes} classes; expected at least 2, to have ranks"
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The pruned copy of the teacher.

        Raises:
            IncompatibleError: the teacher itself was not given.
        """
        if not shapes.teacher_networks:
            raise IncompatibleError(f"{self.name} copies the teacher (expected the network itself)")
        return Pruned(shapes.teacher_networks[0].model, self.prune_share)

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Values and ranks on the batch, and on the augmented one."""
        networks = signals.networks
        assert networks is not None  # asked for in needs
        views = [self._view(signals, networks.images, modules)]
        if self.augment != "none":
            views.append(self._view(*self._augmented(signals, networks), modules))
        values, ranks = zip(*views, strict=True)
        return {
            "value": self.value_weight * torch.stack(values).sum(),
            "rank": self.rank_weight * torch.stack(ranks).sum(),
        }

    def _augmented(self, signals: Signals, networks: Networks) -> tuple[Signals, Tensor]:
        """What student and teacher say about the augmented images, and these."""
        images = mixed(networks.images, self.augment)
        taught, weights = networks.teachers[0](images), signals.weights
        if self.augment == "cutmix_pick":
            picked = least_sure(taught.logits)
            images = images[picked]
            taught = taught.map(lambda x: x[picked])
            weights = None if weights is None else weights[picked]
        said = networks.student(images)
        return replace(signals, student=said, teachers=(taught,), weights=weights), images

    def _view(self, signals: Signals, images: Tensor, modules: nn.Module) -> tuple[Tensor, Tensor]:
        """Both losses, unweighted, on one batch."""
        logits_s, share = signals.student.logits, self.pruned_weight
        logits_t = (1 - share) * signals.teacher.logits + share * modules(images)
        return self._values(signals, logits_s, logits_t), self._ranks(signals, logits_s, logits_t)

    def _values(self, signals: Signals, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        log_s = F.log_softmax(logits_s / self.temperature, dim=1)
        log_t = F.log_softmax(logits_t / self.temperature, dim=1)
        by_sample = 1 - log_cosine(log_s, log_t, dim=1)
        # The classes' cosines belong to the whole batch, so they weigh as its samples on average.
        by_class = (1 - log_cosine(log_s, log_t, dim=0).mean()).expand_as(by_sample)
        return self.temperature**2 * signals.mean(by_sample + by_class)

    def _ranks(self, signals: Signals, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        if self.rank == "hard":
            return signals.mean(1 - pearson(hard_ranks(logits_s), hard_ranks(logits_t)))
        softness = self.rank_temperature
        correlation = pearson(soft_ranks(logits_s, softness), soft_ranks(logits_t, softness))
        return signals.mean(1 - correlation)


class Pruned(nn.Module):
    """A frozen copy of a network without its smallest weights, layer by layer.

    The copy is no part of the module's state: it is the same whenever it is built.

    Args:
        network: Stays as it is.
        share: Of the weights of each convolution and linear layer, 0 to below 1.
    """

    def __init__(self, network: nn.Module, share: float) -> None:
        super().__init__()
        copied = copy.deepcopy(network).eval().requires_grad_(False)
        for layer in list(copied.modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # torch's pruning flattens without copying, which channels-last weights do not allow
                layer.weight.data = layer.weight.data.contiguous()
                prune.l1_unstructured(layer, "weight", amount=float(share))
                prune.remove(layer, "weight")
        self.copy = [copied]  # in a list, so that it is not registered

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of images ``(B, C, H, W)``, without gradient."""
        with torch.no_grad():
            logits: Tensor = self.copy[0](images)
        return logits


def log_cosine(log_a: Tensor, log_b: Tensor, dim: int) -> Tensor:
    """Cosines, along ``dim``, of positive vectors that are given by their logarithms.

    Exact where the vectors themselves would underflow.
    """
    norms = (2 * log_a).logsumexp(dim) + (2 * log_b).logsumexp(dim)
    return ((log_a + log_b).logsumexp(dim) - norms / 2).exp()
