"""What the step benchmark asks of a training loop, ours or another's."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from benchmarks.numerics import Numerics


class Loop(Protocol):
    """One contestant: networks, optimiser and source of batches, ready to train.

    Attributes:
        name: As in the table.
        precision: "fp32", "tf32" or "bf16".
        numerics: Settings of the GPU that this loop runs under.
        student: The network it trains.
    """

    name: str
    precision: str
    numerics: Numerics
    student: nn.Module

    def step_on(self, images: Tensor, labels: Tensor, index: Tensor) -> float:
        """One training step on a given batch; returns its loss.

        Args:
            images: Normalised, un-augmented, ``(B, C, H, W)`` on the device.
            labels: ``(B,)`` on the device.
            index: Positions of the images in the training set ``(B,)``, on the device.
        """

    def train(self, steps: int) -> int:
        """So many steps on the loop's own batches; returns the number of images."""

    def close(self) -> None:
        """End worker processes and take hooks off."""
