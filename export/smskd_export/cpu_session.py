"""Run a graph on the CPU through ONNX Runtime, and time it.

The thread count is exact, because a benchmark that silently takes all cores measures the machine.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from smskd.errors import ExportError
from smskd_export.targets import Protocol

Floats = NDArray[np.float32]
Clock = Callable[[], int]

SCOPE = "one session.run call: host array in, host array out; no image decoding, no scaling"
_INPUTS = 64
_MIN_WARMUP_RUNS = 10
_ERRORS_ONLY = 3


class CpuSession:
    """An ONNX Runtime session with exactly ``threads`` threads, operators one after the other.

    Attributes:
        batch: The batch size the graph insists on, or None if it takes any.
        load_ns: Time to read and prepare the graph, in nanoseconds.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Load ``path``.

        Raises:
            ExportError: ONNX Runtime cannot load the graph.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        start = time.perf_counter_ns()
        try:
            self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base class of their own
            raise ExportError(f"ONNX Runtime cannot load {path.name}: {error}") from error
        self.load_ns = time.perf_counter_ns() - start
        port = self._session.get_inputs()[0]
        self._input = port.name
        self.batch = port.shape[0] if isinstance(port.shape[0], int) else None

    def run(self, images: Floats) -> Floats:
        """Map images ``(B, C, H, W)`` in 0..1 to logits ``(B, K)``."""
        logits: Floats = self._session.run(None, {self._input: images})[0]
        return logits


@dataclass(frozen=True)
class Timing:
    """Raw measurements, nothing removed.

    Attributes:
        samples_ns: Time of every inference ``(n,)`` int64, in order, without the warm-up.
        window_sizes: Number of samples of each window; their sum is n.
        first_ns: Time of the very first inference, which also sets up buffers.
        timer_overhead_ns: Median time between two readings of the clock with nothing between.
    """

    samples_ns: NDArray[np.int64]
    window_sizes: tuple[int, ...]
    first_ns: int
    timer_overhead_ns: int


def measure_latency(
    session: CpuSession,
    image_shape: tuple[int, int, int],
    protocol: Protocol,
    clock: Clock = time.perf_counter_ns,
) -> Timing:
    """Time single inferences, one after the other, at the graph's batch size (1 if it is free).

    The inputs cycle through 64 different random images. Python's garbage collector rests meanwhile:
    its pauses belong to the harness, not to the model.
    """
    shape = (_INPUTS, session.batch or 1, *image_shape)
    inputs = cycle(np.random.default_rng(0).random(shape, dtype=np.float32))
    with _no_garbage_collection():
        overhead = _timer_overhead_ns(clock)
        first = _time_one(session, next(inputs), clock)
        _time_many(session, inputs, _MIN_WARMUP_RUNS, protocol.warmup_s, clock)
        windows = [
            _time_many(session, inputs, protocol.min_samples, protocol.min_duration_s, clock)
            for _ in range(protocol.windows)
        ]
    samples = np.array([ns for window in windows for ns in window], dtype=np.int64)
    return Timing(samples, tuple(len(window) for window in windows), first, overhead)


def _time_one(session: CpuSession, images: Floats, clock: Clock) -> int:
    start = clock()
    session.run(images)
    return clock() - start


def _time_many(
    session: CpuSession, inputs: Iterator[Floats], min_runs: int, min_s: float, clock: Clock
) -> list[int]:
    """Times of at least ``min_runs`` inferences that last at least ``min_s`` seconds together."""
    samples: list[int] = []
    end = clock() + round(min_s * 1e9)
    while len(samples) < min_runs or clock() < end:
        samples.append(_time_one(session, next(inputs), clock))
    return samples


def _timer_overhead_ns(clock: Clock, readings: int = 101) -> int:
    return int(np.median([-(clock() - clock()) for _ in range(readings)]))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
