"""Compile a stage's networks with ``torch.compile``: fewer, fused kernels for the same formulas.

Compiling takes a minute, so it is done once per architecture, features read and batch shape, and
reused for every seed, method and stage in the process: parameters are inputs of the compiled code.
Shapes are static; the smaller last batch of an epoch runs as it is. On a GPU the forward and the
backward pass are each replayed as CUDA graphs. Results change by rounding.

Shapes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from smskd.frozen import Live
from smskd.taps import Outputs, TappedModel
from smskd.train import StageRun

MANY = 64
"""Networks times modes times shapes that one process may compile before falling back."""


def compile_networks(run: StageRun) -> None:
    """Let a stage run's student, and what is live of teachers and reference, run compiled."""
    frozen = [*run.teachers, *([run.anchor.network] if run.anchor else [])]
    live = [network for network in frozen if isinstance(network, Live)]
    for network in live:
        # As it was built, not as it was traced: tracing makes a new class each time, for which the
        # compiler would begin anew.
        traced = network.network
        traced.close()
        network.network = TappedModel(network.origin, traced.taps, traced.roles)
    for tapped in (run.student, *(network.network for network in live)):
        tapped.compiled = _Full(run.training.batch_size, begins_step=tapped is run.student)


class _Full:
    """Runs a network compiled on full batches; None for others."""

    def __init__(self, batch_size: int, begins_step: bool) -> None:
        self.batch_size = batch_size
        self.begins_step = begins_step

    def __call__(self, network: TappedModel, images: Tensor) -> Outputs | None:
        if len(images) != self.batch_size:
            return None
        if self.begins_step and images.is_cuda:  # outputs of the last are done with
            torch.compiler.cudagraph_mark_step_begin()
        return _compiled(images.device.type)(network, images)


def _forward(network: TappedModel, images: Tensor) -> Outputs:
    return network.run(images)


@cache
def _compiled(device: str) -> Callable[[TappedModel, Tensor], Outputs]:
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MANY)
    mode = "reduce-overhead" if device == "cuda" else "default"
    compiled: Callable[[TappedModel, Tensor], Outputs] = torch.compile(
        _forward, dynamic=False, mode=mode
    )
    return compiled
