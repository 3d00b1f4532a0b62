"""Checks, before anything is timed, that all contestants do the same work.

Each starts from the same weights and takes two steps on the same un-augmented batch (the first has
no momentum yet). The loss of the first step and the way the weights have gone after the second must
agree: closely in fp32, as far as bf16 goes in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loop import Loop
from benchmarks.numerics import EXACT
from smskd.errors import RefusedError

STEPS = 2


@dataclass(frozen=True)
class Tolerance:
    """How far two loops may be apart.

    Attributes:
        loss: Relative difference of the loss.
        update: Length of the difference of the two weight updates, over the length of the update.
    """

    loss: float
    update: float


# Seen: rounding in another memory order turns the update by up to 2e-3, bf16 by up to 1e-1; leaving
# weight decay out turns it by 2e-2.
TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, update=5e-3),
    "tf32": Tolerance(loss=1e-5, update=5e-3),  # off during the check
    "bf16": Tolerance(loss=2e-2, update=0.3),
}

Difference = dict[str, float]


def check_same_work(
    loops: Sequence[Loop], images: Tensor, labels: Tensor, index: Tensor
) -> dict[str, Difference]:
    """Take the steps with every loop and compare with the first, which must be in fp32.

    Args:
        loops: Fresh ones.
        images: Normalised ``(B, C, H, W)`` on the device.
        labels: ``(B,)``.
        index: Positions of the images in the training set ``(B,)``.

    Returns:
        By loop: the loss, its relative difference, the relative difference of the update.

    Raises:
        RefusedError: they do not do the same work, so their times must not be compared.
    """
    EXACT.apply()
    starts = [_weights(loop) for loop in loops]
    for loop, start in zip(loops, starts, strict=True):
        if start.shape != starts[0].shape or not torch.equal(start, starts[0]):
            raise _refused(loop, loops[0], "they start from different weights")
    losses = [_first_loss(loop, images, labels, index) for loop in loops]
    updates = [_weights(loop) - starts[0] for loop in loops]
    found: dict[str, Difference] = {}
    for loop, loss, update in zip(loops, losses, updates, strict=True):
        apart = abs(loss - losses[0]) / abs(losses[0])
        turned = ((update - updates[0]).norm() / updates[0].norm()).item()
        found[loop.name] = {"loss": loss, "loss_difference": apart, "update_difference": turned}
        allowed = TOLERANCES[loop.precision]
        if not apart <= allowed.loss:
            raise _refused(loop, loops[0], f"the loss of one batch is {loss} and {losses[0]}")
        if not turned <= allowed.update:
            why = f"after {STEPS} steps their weight updates differ by {turned:.1%}"
            raise _refused(loop, loops[0], why)
    return found


def _first_loss(loop: Loop, images: Tensor, labels: Tensor, index: Tensor) -> float:
    """The loss before any step; all steps are taken."""
    first, *_ = [loop.step_on(images, labels, index) for _ in range(STEPS)]
    return first


def _weights(loop: Loop) -> Tensor:
    """All parameters in one float64 vector, a copy."""
    return torch.cat([p.detach().double().reshape(-1) for p in loop.student.parameters()])


def _refused(loop: Loop, first: Loop, why: str) -> RefusedError:
    return RefusedError(
        f"{loop.name} and {first.name} do not do the same work: {why}",
        "their times do not compare; find the difference first",
    )
