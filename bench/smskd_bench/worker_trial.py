"""How many processes at once train most images a second on one device, found by trying.

A small student leaves a large GPU idle between its kernels; several processes fill the gaps, until
they only wait for each other. Where that is depends on the networks and on the machine.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import BrokenBarrierError
from typing import Any

import torch

from smskd_bench.speed import STEPS_A_BLOCK, Workload, cpu_threads, training_step, wait_for
from smskd_bench.worker import pin_numerics

CANDIDATES = (1, 2, 4, 8)
TRIAL_S = 2.0
READY_S = 120.0
"""How long a process may take to start and warm up; the first use of a GPU is slow."""

LOOK_EVERY_S = 0.005

TIE = 1.05
"""More processes must be faster by this factor: each costs memory, and measurements scatter."""


@dataclass(frozen=True)
class WorkerTrial:
    """What was found.

    Attributes:
        workers: The number of processes to use.
        images_per_s: Training images a second of all processes together, for each number tried.
        stopped: Why no larger number was tried, if that was an error.
    """

    workers: int
    images_per_s: dict[int, float]
    stopped: str = ""

    @property
    def speedup(self) -> float:
        """Throughput of the chosen number against one process."""
        one = self.images_per_s[min(self.images_per_s)]
        return self.images_per_s[self.workers] / one if one else 1.0


def measured_workers(
    work: Workload,
    device: str,
    teacher: str | None = None,
    candidates: Sequence[int] = CANDIDATES,
    trial_s: float = TRIAL_S,
) -> WorkerTrial:
    """Train one pair in 1, 2, 4, 8 processes at once and choose the number of most images a second.

    A number that is no faster than the one before ends the trial, and so does one for which the
    memory is not enough. If not even one process can train, the answer is one: the run itself then
    says what is wrong.

    Args:
        work: The student's training step; its ``threads`` are those of each process.
        device: torch device string.
        teacher: Model that is run live in each step.
        candidates: Numbers of processes, ascending.
        trial_s: Length of each trial in seconds.
    """
    found: dict[int, float] = {}
    for count in candidates:
        try:
            speed = _images_per_s(count, work, device, teacher, trial_s)
        except RuntimeError as error:  # memory; a process that was killed is of this kind too
            found = found or {count: 0.0}
            return WorkerTrial(_best(found), found, str(error).splitlines()[0])
        found[count] = speed
        if _best(found) != count:
            break
    return WorkerTrial(_best(found), found)


def _best(found: dict[int, float]) -> int:
    """The smallest number that no larger one beats by more than a tie."""
    best = min(found)
    for count in sorted(found):
        if found[count] > TIE * found[best]:
            best = count
    return best


def _images_per_s(
    count: int, work: Workload, device: str, teacher: str | None, trial_s: float
) -> float:
    """Throughput of ``count`` processes together."""
    with Crew(count, work, device, teacher) as crew:
        crew.get_ready(trial_s)
        return crew.train()


class Crew:
    """So many processes that train the same pair at the same time, as often as they are asked to.

    Args:
        count: Processes.
        work: The student's training step; its ``threads`` are those of each process.
        device: torch device string.
        teacher: Model that is run live in each step.
    """

    def __init__(self, count: int, work: Workload, device: str, teacher: str | None) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child cannot use CUDA
        self.count = count
        self._work = work, device, teacher
        self._barrier = context.Barrier(count + 1)
        self._pool = ProcessPoolExecutor(count, context, _remember, (self._barrier,))
        self._runs: list[Future[float]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_ready(self, trial_s: float) -> None:
        """Wait until all have built their networks and can train for ``trial_s`` seconds.

        A failure shows in :meth:`train`.
        """
        self._runs = [self._pool.submit(_train, *self._work, trial_s) for _ in range(self.count)]
        while self._barrier.n_waiting < self.count and not any(run.done() for run in self._runs):
            time.sleep(LOOK_EVERY_S)

    def train(self) -> float:
        """Let them train; images a second of all together.

        Raises:
            RuntimeError: one of them failed, for instance for want of memory.
        """
        # After a failure nobody is there to meet; its own error tells why.
        with suppress(BrokenBarrierError):
            self._barrier.wait(0.0 if any(run.done() for run in self._runs) else READY_S)
        errors = [e for run in self._runs if (e := run.exception()) is not None]
        errors.sort(key=lambda error: isinstance(error, BrokenBarrierError))
        if errors:
            raise errors[0]
        return sum(run.result() for run in self._runs)

    def close(self) -> None:
        """End the processes."""
        self._barrier.abort()  # those that still wait for the others
        self._pool.shutdown()


_together: Any = None
"""In a child: the barrier at which all of them start. It can only be inherited, not sent."""


def _remember(barrier: Any) -> None:
    global _together
    _together = barrier


def _train(work: Workload, device: str, teacher: str | None, trial_s: float) -> float:
    """In a child: train for ``trial_s`` seconds once all are ready; images a second."""
    pin_numerics()
    with cpu_threads(work.threads):
        try:
            step = training_step(work, work.batch_size, device, teacher)
            step()
            wait_for(device)
        except BaseException:
            _together.abort()
            raise
        _together.wait(READY_S)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < trial_s:
            images += sum(step() for _ in range(STEPS_A_BLOCK[torch.device(device).type]))
            wait_for(device)
        return images / (time.perf_counter() - started)
