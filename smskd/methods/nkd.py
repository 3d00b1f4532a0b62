"""NKD: the teacher's confidence in the true class, and its opinion on the others, each as a CE.

Paper: Yang, Zeng, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
Approach with Normalized Loss and Customized Soft Labels", arXiv 2303.13005.
Loss: ``ce_weight * CE - p_t,y * log p_s,y + gamma * tau^2 * CE(q_t, q_s)``, mean over the batch.
p is the softmax ``(B, K)`` at temperature 1 and y the true class; q is the softmax at temperature
tau over the K - 1 other classes, so that both networks' sum to one, and
``CE(q_t, q_s) = - sum_c q_t,c log q_s,c``.

Deviations from the paper: none. The target is left out of q with exact log-probabilities instead of
subtracting 1000 from its logit, as the authors' first code (2022, March 2023) did.
``compat="sdd"`` takes q over all K classes, the true one included: the authors' code (cls_KD) did
so between 2023-07-17 and 2023-10-10, when it was corrected, and the code of SDD has a copy from
that time. SDD's NKD also grows over 20 epochs; here it does not.
Defaults: cls_KD's CIFAR-100 configuration, ResNet34-ResNet18 (CE 1, tau 3, gamma 3.5). Its ImageNet
configurations have tau 1 and gamma 1.5, and so has SDD's NKD; SDD's SD-NKD takes tau 4 and DKD's
beta as gamma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms
from smskd.methods.dkd import decouple


@dataclass(frozen=True)
class NKD(Method):
    """Hyper-parameters of NKD.

    Attributes:
        gamma: Weight of the term on the other classes.
        temperature: tau, softens the distributions over the other classes only.
        compat: "sdd" leaves the true class in the term on the other classes, as SDD's code does.
    """

    name: ClassVar[str] = "nkd"
    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Yang 2023, arXiv 2303.13005"
    needs: ClassVar[Needs] = Needs()

    gamma: float = 3.5
    temperature: float = 3.0
    compat: Literal["none", "sdd"] = "none"

    def check(self, shapes: PairShapes) -> str | None:
        """Fewer than three classes leave no distribution over the others."""
        num_classes = shapes.student.num_classes
        if num_classes < 3:
            return (
                f"{num_classes} classes; expected at least 3, as with fewer there is no "
                "distribution over the other classes and gamma has no effect (use kd)"
            )
        return None

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The term on the true class and the one on the others."""
        logits_s, logits_t = signals.student.logits, signals.teacher.logits
        truth = signals.labels.unsqueeze(1)
        log_p_s, log_p_t = (F.log_softmax(z, dim=1).gather(1, truth) for z in (logits_s, logits_t))
        target = -(log_p_t.exp() * log_p_s).squeeze(1)
        log_q_s, log_q_t = (self._others(z, signals.labels) for z in (logits_s, logits_t))
        others = -(log_q_t.exp() * log_q_s).sum(dim=1)
        return {
            "target": signals.mean(target),
            "others": self.gamma * self.temperature**2 * signals.mean(others),
        }

    def _others(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``log q`` ``(B, K)``, 0 in the target's place."""
        softened = logits / self.temperature
        if self.compat == "sdd":
            return F.log_softmax(softened, dim=1)
        is_target = F.one_hot(labels, logits.shape[1]).bool()
        return decouple(softened, is_target)[1]
