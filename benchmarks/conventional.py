"""The training loop that most distillation code has, written for this comparison.

Recipe of RepDistiller (``train_student.py``, ``helper/loops.py``, ``distiller_zoo/KD.py``), which
mdistiller and later repositories share: PIL transforms in a DataLoader
(:mod:`benchmarks.pil_loader`), fp32, the default memory order (NCHW), a live teacher in evaluation
mode under ``no_grad``, torch's default SGD with momentum 0.9 and weight decay 5e-4, 0.1 CE + 0.9 KD
with tau 4 and ``batchmean * tau^2``. By the same convention every step reads its loss with
``.item()`` and computes top-1 and top-5. Works with any two networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.numerics import CONVENTIONAL
from benchmarks.pil_loader import Passes

CE_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.1, 0.9, 4.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


class Average:
    """A running mean, as these loops keep one for each number they show."""

    def __init__(self) -> None:
        self.sum: Any = 0.0
        self.count = 0

    def update(self, value: float | Tensor, count: int) -> None:
        """Add ``value``, the mean of ``count`` samples."""
        self.sum = self.sum + value * count
        self.count += count


class ConventionalLoop:
    """The loop.

    Args:
        student: Trained in place.
        teacher: Put into evaluation mode.
        device: Where to train.
        source: Endless ``(images, labels)`` batches: ``Passes(loader)`` to train end to end, or
            ``repeat(batch)`` with a batch on the device to do steps only.
    """

    name = "conventional"
    precision = "fp32"
    numerics = CONVENTIONAL

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        source: Passes | repeat[Any],
    ) -> None:
        self.device = device
        self.student = student.to(device).train()
        self.teacher = teacher.to(device).eval()
        self.source: Iterator[Any] = source
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.losses, self.top1, self.top5 = Average(), Average(), Average()

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on a batch on the device; returns the loss."""
        logits = self.student(images)
        with torch.no_grad():
            target = self.teacher(images)
        loss = CE_WEIGHT * F.cross_entropy(logits, labels) + KD_WEIGHT * kd_loss(logits, target)
        top1, top5 = accuracy(logits, labels)
        value = loss.item()
        self.losses.update(value, len(labels))
        self.top1.update(top1, len(labels))
        self.top5.update(top5, len(labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def step_on(self, images: Tensor, labels: Tensor, index: Tensor) -> float:
        """As in :class:`benchmarks.loop.Loop`."""
        return self.step(images.contiguous(), labels)

    def train(self, steps: int) -> int:
        """So many steps on the source's batches; returns the number of images."""
        count = 0
        for _ in range(steps):
            images, labels = next(self.source)
            self.step(images.to(self.device), labels.to(self.device))
            count += len(labels)
        return count

    def close(self) -> None:
        """End the loader's workers."""
        if isinstance(self.source, Passes):
            self.source.close()


def kd_loss(logits: Tensor, target: Tensor) -> Tensor:
    """KL between softened outputs ``(B, K)``, ``batchmean`` times tau squared; a scalar."""
    log_p = F.log_softmax(logits / TEMPERATURE, dim=1)
    q = F.softmax(target / TEMPERATURE, dim=1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 of a batch in percent, left on the device."""
    with torch.no_grad():
        hits = logits.topk(5, dim=1).indices == labels.view(-1, 1)
        percent = 100.0 / len(labels)
        return hits[:, 0].sum() * percent, hits.sum() * percent
