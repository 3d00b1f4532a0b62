"""Accuracy of a network on a fixed set, and agreement between two networks.

Shapes: N samples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.data import Normalisation, check_images
from smskd.modes import eval_mode


@dataclass(frozen=True)
class FixedSet:
    """Images ``(N, C, H, W)`` (uint8, or float32 ready for the network) and labels ``(N,)``.

    ``batch_size`` of them are evaluated at once; it changes rounding at most.

    Raises:
        DataError: they do not fit together.
    """

    images: Tensor
    labels: Tensor
    normalise: Normalisation | None = None
    batch_size: int = 1000

    def __post_init__(self) -> None:
        check_images(self.images, self.labels, self.normalise)

    def to(self, device: torch.device) -> FixedSet:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, start: int, size: int) -> Tensor:
        """Network-ready float32 images ``(B, C, H, W)``."""
        images = self.images[start : start + size]
        images = self.normalise(images) if self.normalise else images
        return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Evaluation:
    """How a network did on a fixed set.

    Attributes:
        top1: Accuracy in percent.
        top5: Share of samples with the label among the five highest logits, in percent.
        loss: Mean cross-entropy in nats.
        predictions: Predicted class of every sample ``(N,)``.
    """

    top1: float
    top5: float
    loss: float
    predictions: Tensor


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], data: FixedSet) -> Evaluation:
    """Run ``model`` over ``data`` in evaluation mode, in float32; its mode is given back."""
    with eval_mode(model) if isinstance(model, nn.Module) else nullcontext():
        starts = range(0, len(data.labels), data.batch_size)
        logits = torch.cat([model(data.batch(i, data.batch_size)).float() for i in starts])
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == data.labels.view(-1, 1)
    return Evaluation(
        top1=percent(hits[:, 0]),
        top5=percent(hits.any(dim=1)),
        loss=F.cross_entropy(logits, data.labels.long()).item(),
        predictions=top[:, 0].cpu(),
    )


@dataclass(frozen=True)
class Agreement:
    """How much of the reference is left in the student, in percent.

    Attributes:
        same: Samples on which both predict the same class.
        kept: Of the samples the reference had right, those the student has right too.
        gained: Of the samples the reference had wrong, those the student has right.
    """

    same: float
    kept: float
    gained: float


def agreement(student: Tensor, reference: Tensor, labels: Tensor) -> Agreement:
    """Compare predictions ``(N,)`` of a student with those of its reference."""
    labels = labels.cpu()
    right_s, right_r = student == labels, reference == labels
    return Agreement(
        percent(student == reference), percent(right_s[right_r]), percent(right_s[~right_r])
    )


def percent(mask: Tensor) -> float:
    """Share of true entries in percent; 0 for an empty mask."""
    return 100.0 * mask.double().mean().item() if mask.numel() else 0.0
