"""Label smoothing: plain training on labels that give some probability to every class. No teacher.

Paper: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer
Vision", arXiv 1512.00567.
Loss: ``ce_weight * CE(t, p_s)`` with ``t = (1 - smoothing) * y + smoothing / K``, ``(B, K)``, mean
over the batch.

It is the control of distillation: what a teacher that knows nothing of the image would give. With
``ce_weight`` 0 it has no loss.
Deviations from the paper: none. The Tf-KD code shares the smoothed part among the K - 1 wrong
classes only: the same as smoothing K / (K - 1) times as strong.
Defaults: smoothing 0.1 (the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from smskd.methods.base import Method, Needs, PairShapes, Signals, Terms


@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Hyper-parameters of label smoothing.

    Attributes:
        smoothing: Part of the probability that is spread evenly over all classes.
    """

    name: ClassVar[str] = "label_smoothing"
    kind: ClassVar[str] = "none"
    paper: ClassVar[str] = "Szegedy 2016, arXiv 1512.00567"
    needs: ClassVar[Needs] = Needs(teacher=False)

    smoothing: float = 0.1

    def check(self, shapes: PairShapes) -> str | None:
        """A part lies between 0 and 1."""
        if not 0 <= self.smoothing <= 1:
            return f"smoothing is {self.smoothing:g}; expected between 0 and 1"
        return None

    def task(self, signals: Signals) -> Terms:
        """Cross-entropy with the smoothed labels."""
        if self.ce_weight == 0.0:
            return {}
        logits, labels = signals.student.logits, signals.labels
        ce = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return {"ce": self.ce_weight * ce}

    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """Nothing to distil."""
        return {}
