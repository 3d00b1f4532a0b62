"""Checks, before anything is timed, that all contestants do the same work.

Each starts from the same weights and takes two steps on the same un-augmented batch (the first has
no momentum yet). The loss of the first step and the way the weights have gone must agree: closely
in fp32, as far as bf16 goes in bf16.

How far float32 can agree depends on the network: an untrained MobileNetV2 amplifies rounding so
much that two orders of memory give gradients 1 % apart (in float64 they agree to 1e-13). So the
student's own rounding noise is measured, as the distance of its float32 gradient from its float64
gradient, and the weights may be :data:`NOISES` times that apart; a noisy network is compared after
its first step, before its noise has grown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

NOISES = 20.0
NOISY = 2e-3
"""Rounding noise from which on the second step says nothing."""

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
        By loop: the loss, its relative difference, the relative difference of the update, after how
        many steps, and the student's rounding noise.

    Raises:
        RefusedError: they do not do the same work, so their times must not be compared.
    """
    EXACT.apply()
    starts = [_weights(loop) for loop in loops]
    for loop, start in zip(loops, starts, strict=True):
        if start.shape != starts[0].shape or not torch.equal(start, starts[0]):
            raise _refused(loop, loops[0], "they start from different weights")
    noise = gradient_noise(loops[0].student, images, labels)
    steps = 1 if noise > NOISY else STEPS
    losses, updates = [], []
    for loop in loops:
        taken = [loop.step_on(images, labels, index) for _ in range(steps)]
        losses.append(taken[0])
        updates.append(_weights(loop) - starts[0])
    found: dict[str, Difference] = {}
    for loop, loss, update in zip(loops, losses, updates, strict=True):
        apart = abs(loss - losses[0]) / abs(losses[0])
        turned = ((update - updates[0]).norm() / updates[0].norm()).item()
        found[loop.name] = {
            "loss": loss, "loss_difference": apart, "update_difference": turned,
            "steps": steps, "rounding_noise": noise,
        }  # fmt: skip
        allowed = TOLERANCES[loop.precision]
        if not apart <= allowed.loss:
            raise _refused(loop, loops[0], f"the loss of one batch is {loss} and {losses[0]}")
        if not turned <= _most(allowed.update, noise, loop.precision):
            why = f"after {steps} steps their weight updates differ by {turned:.1%}"
            raise _refused(loop, loops[0], why)
    return found


def _most(update: float, noise: float, precision: str) -> float:
    """How far apart the weights may be; bf16 of a noisy network is judged by its loss alone."""
    if precision == "bf16":
        return update if noise <= NOISY else math.inf
    return max(update, NOISES * noise)


def gradient_noise(student: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Relative distance of the float32 gradient of the cross-entropy from the float64 one."""
    exact, rounded = (_gradient(student, images, labels, kind) for kind in KINDS)
    return float((rounded - exact).norm() / exact.norm())


KINDS = (torch.float64, torch.float32)


def _gradient(student: nn.Module, images: Tensor, labels: Tensor, kind: torch.dtype) -> Tensor:
    model = copy.deepcopy(student).to(kind).train()
    F.cross_entropy(model(images.to(kind)), labels).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([gradient.double().reshape(-1) for gradient in found])


def _weights(loop: Loop) -> Tensor:
    """All parameters in one float64 vector, a copy."""
    return torch.cat([p.detach().double().reshape(-1) for p in loop.student.parameters()])


def _refused(loop: Loop, first: Loop, why: str) -> RefusedError:
    return RefusedError(
        f"{loop.name} and {first.name} do not do the same work: {why}",
        "their times do not compare; find the difference first",
    )
