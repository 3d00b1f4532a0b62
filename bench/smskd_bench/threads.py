"""How many CPU threads a stage run gets; the worker and the prediction of its time both ask."""

from __future__ import annotations

from collections.abc import Iterable

from smskd_bench.cost import network_cost
from smskd_bench.spec import StageSpec

SMALL_STEP_MACS = 1e9
"""A training step below this gains little from a second thread and loses much on a busy machine."""


def step_threads(spec: StageSpec, teachers: Iterable[StageSpec], available: int) -> int:
    """One thread where a training step is too small to share, else all that are ``available``.

    It does not depend on the machine's load, so that a repeated run takes the same number.
    """
    student, *others = (network_cost(s.model, s.dataset.name).macs for s in (spec, *teachers))
    return threads_for((3 * student + sum(others)) * spec.training.batch_size, available)


def threads_for(macs: float, available: int) -> int:
    """Threads for a piece of work of ``macs`` multiply-accumulates."""
    return 1 if macs < SMALL_STEP_MACS else available
