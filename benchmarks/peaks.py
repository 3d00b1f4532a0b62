"""What a device does at most: measured, not taken from a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.counts import Peaks
from benchmarks.interleave import Clock
from benchmarks.numerics import EXACT, TF32
from smskd.settings import Precision

SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices."""

COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Far more than any cache holds."""

LEAST_TIMES, FOR_S = 5, 1.0


def measured_peaks(
    precisions: Iterable[Precision], device: torch.device, clock: Clock
) -> dict[Precision, Peaks]:
    """Best of several, by precision: a product of large matrices, a copy of a large vector."""
    copied = _copied_bytes_per_s(device, clock)
    return {p: Peaks(_product_macs_per_s(p, device, clock), copied) for p in precisions}


def _product_macs_per_s(precision: Precision, device: torch.device, clock: Clock) -> float:
    (TF32 if precision == "tf32" else EXACT).apply()
    side = SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return side**3 / _best_s(lambda: torch.mm(a, b, out=product), clock)


def _copied_bytes_per_s(device: torch.device, clock: Clock) -> float:
    """A copy reads and writes; both count."""
    size = COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_s(lambda: target.copy_(source), clock)


def _best_s(work: Callable[[], object], clock: Clock) -> float:
    """Shortest time of one call; the first is not timed."""
    work()
    clock.synchronise()
    began, times = time.perf_counter(), list[float]()
    while len(times) < LEAST_TIMES or time.perf_counter() - began < FOR_S:
        started = clock.wall()
        work()
        clock.synchronise()
        times.append(clock.wall() - started)
    return min(times)
