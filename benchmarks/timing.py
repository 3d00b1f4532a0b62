"""What the benchmarks of training steps have in common: how long, how often, on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.interleave import Clock

if TYPE_CHECKING:
    import torch

STEPS = {"cpu": 1, "cuda": 20}
"""Steps of one turn, by device type."""

COMPILE_MISSING = "compiling takes minutes on a CPU; ask for it with --compile"


@dataclass(frozen=True)
class Timing:
    """What is the same for all tables of a benchmark; ``seconds`` of one.

    Attributes:
        compiled: Whether compiled networks are measured too.
    """

    device: torch.device
    batch_size: int
    rounds: int
    seconds: float
    compiled: bool
    clock: Clock
