"""The least work of a training step, counted layer by layer, and the least time it takes.

Counted are the layers that multiply matrices: convolutions and linear layers. What is between them
(normalisation, activations, additions, pooling) could be fused into them; the loss and the cutting
of the batch are small; all this counts as nothing. For a layer with MACs m, input X, output Y and
weights W, all of them for the whole batch, one pass is one kernel:

    forward              m MACs   reads X and W, writes Y
    gradient of input    m MACs   reads dY and W, writes dX    (not for the first layer)
    gradient of weights  m MACs   reads dY and X, writes dW

A frozen network has forward passes only. The optimiser (SGD with momentum) reads weight, gradient
and momentum and writes weight and momentum, all float32, and has no MACs. X, Y, W and their
gradients have the bytes of the step's precision, except dW, which is float32.

A kernel takes at least as long as its MACs at the device's peak, and at least as long as its bytes
at the bandwidth of memory: the floor is the sum of the larger ones. It is a floor for direct
convolutions whose tensors come from memory; what a cache holds between two layers, or Winograd's
algorithm, can go below it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smskd.settings import Precision

BYTES: dict[Precision, int] = {"fp32": 4, "tf32": 4, "bf16": 2}
"""Of a number in a network run under this precision."""

FLOAT32 = 4
OPTIMISER_PASSES = 5


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer, in numbers; ``inputs``, ``outputs`` and ``macs`` of one image."""

    inputs: int
    outputs: int
    weights: int
    macs: int


@dataclass(frozen=True)
class Kernel:
    """What one pass has to do at least."""

    macs: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """What the device does at most: multiply-accumulates and bytes moved, a second."""

    macs_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Floor:
    """The least that a step has to do, and the least time for it.

    Attributes:
        macs: Multiply-accumulates.
        bytes: Read and written.
        seconds: Least time.
        arithmetic_s: The part of it in kernels that arithmetic bounds.
    """

    macs: int
    bytes: int
    seconds: float
    arithmetic_s: float


def layers_of(model: nn.Module, image: Tensor) -> list[Layer]:
    """Sizes of all convolutions and linear layers in the order in which they run.

    Args:
        model: Maps ``(1, C, H, W)`` to logits; neither run nor changed itself.
        image: ``(1, C, H, W)`` on the model's device.
    """
    found: list[Layer] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        weights = sum(p.numel() for p in module.parameters(recurse=False))
        # Every output number takes one multiplication by each weight of its own channel.
        macs = output.numel() * (weight.numel() // len(weight))
        found.append(Layer(inputs[0].numel(), output.numel(), weights, macs))

    double = copy.deepcopy(model).eval()
    for module in double.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    with torch.no_grad():
        double(image)
    return found


def forward(layers: Iterable[Layer], batch_size: int, width: int) -> list[Kernel]:
    """Forward passes; ``width`` is the bytes of a number."""
    return [
        Kernel(batch_size * x.macs, width * (batch_size * (x.inputs + x.outputs) + x.weights))
        for x in layers
    ]


def backward(layers: Sequence[Layer], batch_size: int, width: int) -> list[Kernel]:
    """Passes for the gradients of all weights, and of all inputs but the images."""
    for_inputs = forward(layers[1:], batch_size, width)
    for_weights = [
        Kernel(
            batch_size * x.macs,
            width * batch_size * (x.inputs + x.outputs) + FLOAT32 * x.weights,
        )
        for x in layers
    ]
    return [*for_inputs, *for_weights]


def descend(parameters: int) -> Kernel:
    """The optimiser's step over so many parameters."""
    return Kernel(0, OPTIMISER_PASSES * FLOAT32 * parameters)


def step_kernels(
    student: nn.Module,
    teacher: nn.Module | None,
    image: Tensor,
    batch_size: int,
    precision: Precision,
) -> list[Kernel]:
    """All kernels of a step; ``teacher`` is None where its outputs are looked up."""
    width = BYTES[precision]
    layers = layers_of(student, image)
    frozen = layers_of(teacher, image) if teacher is not None else []
    parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return [
        *forward(layers, batch_size, width),
        *forward(frozen, batch_size, width),
        *backward(layers, batch_size, width),
        descend(parameters),
    ]


def floor_of(kernels: Iterable[Kernel], peaks: Peaks) -> Floor:
    """Sum of what bounds each kernel."""
    macs = moved = 0
    seconds = arithmetic = 0.0
    for kernel in kernels:
        by_macs = kernel.macs / peaks.macs_per_s
        by_bytes = kernel.bytes / peaks.bytes_per_s
        macs, moved = macs + kernel.macs, moved + kernel.bytes
        seconds += max(by_macs, by_bytes)
        arithmetic += by_macs if by_macs >= by_bytes else 0.0
    return Floor(macs, moved, seconds, arithmetic)
