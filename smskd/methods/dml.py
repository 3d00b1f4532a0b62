"""DML: untrained networks learn together, each from the labels and from what the others say.

Paper: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", arXiv 1706.00384.
Loss: of network i of the student and its P peers,
``ce_i * CE(z_i, y) + weight * sum_{j != i} KL(softmax(z_j) || softmax(z_i)) / P``, mean over the
batch, z_i ``(B, K)``; what the others say is a constant in it. ce_i is ``ce_weight`` of the student
and ``peer_ce_weight`` of a peer. All networks see the same views.

Deviations from the authors' code: one step for all networks on one batch, where it updates one
after the other, each on a batch of its own; the divergences are averaged over the peers as in the
paper, where the code sums them (the same for one peer; else ``weight`` P makes the sum); and they
are exact, where the code adds 1e-8 inside the logarithm.
Peers run outside autocast, so in float32 under bf16, and not compiled. Their losses are part of the
distillation terms, so a stage's ``method_weight`` scales them too.
Defaults: paper (two networks of one architecture, both weights 1, temperature 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import IncompatibleError
from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.kd import softened_kl
from smskd.taps import NETWORK


@dataclass(frozen=True)
class DML(Method):
    """Hyper-parameters of DML.

    Attributes:
        weight: Weight of the divergence from the other networks, in every network's loss.
        peer_ce_weight: Weight of the peers' cross-entropy on the labels.
        peers: Number of networks beside the student.
    """

    name: ClassVar[str] = "dml"
    kind: ClassVar[str] = "online"
    paper: ClassVar[str] = "Zhang 2018, arXiv 1706.00384"
    needs: ClassVar[Needs] = Needs(teacher=False, student_roles=frozenset({NETWORK}))

    weight: float = 1.0
    peer_ce_weight: float = 1.0
    peers: int = 1

    def check(self, shapes: PairShapes) -> str | None:
        """There must be somebody to learn from."""
        if self.peers < 1:
            return f"peers is {self.peers}; expected at least 1 network beside the student"
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """The peers: untrained networks like the student.

        Raises:
            IncompatibleError: nothing here can build another student.
        """
        if shapes.new_student is None:
            raise IncompatibleError(
                f"{self.name} trains more students, but only shapes are known here (expected a way "
                "to build one)"
            )
        return nn.ModuleList(shapes.new_student() for _ in range(self.peers))

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The student's divergence from its peers, and the peers' own losses."""
        assert signals.networks is not None  # asked for in needs
        assert isinstance(modules, nn.ModuleList)
        images = signals.networks.images
        logits = [signals.student.logits, *(peer(images) for peer in modules)]
        mimicry, *of_peers = [_mimicry(logits, i) for i in range(len(logits))]
        labelled = torch.stack([F.cross_entropy(z, signals.labels) for z in logits[1:]]).sum()
        mimicked = torch.stack([kl.mean() for kl in of_peers]).sum()
        return {
            "dml": self.weight * signals.mean(mimicry),
            "peers": self.peer_ce_weight * labelled + self.weight * mimicked,
        }


def _mimicry(logits: list[Tensor], i: int) -> Tensor:
    """Mean divergence of network i from the others, ``(B,)``."""
    others = [z.detach() for j, z in enumerate(logits) if j != i]
    return torch.stack([softened_kl(logits[i], z, 1.0) for z in others]).mean(dim=0)
