"""Times several contestants in turn: a, b, c, a, b, c, ... in many short rounds.

A machine that others use too is fast in one minute and slow in the next. Contestants of one round
share that minute, so their ratio within a round is worth more than any of their speeds, and the
median over rounds is worth more than one ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import active_children

WARMUP_ROUNDS = 1
MIN_ROUNDS = 3
"""Rounds that are timed whatever the time budget, as fewer have no spread."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: Unique among the contestants of one table.
        work: Does one round's share and returns the number of images it processed.
        before: Called before each measurement, not timed.
        after: Called after each measurement, not timed.
    """

    name: str
    work: Callable[[], int]
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        images: Images processed.
        wall_s: Seconds on the clock.
        cpu_s: Seconds of processor time, child processes included.
    """

    images: int
    wall_s: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        """Images in a second of wall time."""
        return self.images / self.wall_s

    @property
    def images_per_cpu_s(self) -> float:
        """Images in a second of processor time."""
        return self.images / max(self.cpu_s, 1e-9)


@dataclass(frozen=True)
class Spread:
    """A median with what is around it; ``low`` and ``high`` are the quartiles."""

    median: float
    low: float
    high: float
    min: float
    max: float


@dataclass(frozen=True)
class Clock:
    """Where time comes from.

    Attributes:
        wall: Seconds on a monotonic clock.
        cpu: Seconds of processor time of this process and its children.
        synchronise: Waits until the device has done all that was asked of it.
    """

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = field(default_factory=lambda: cpu_seconds)
    synchronise: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Rounds:
    """What was measured: by contestant, one sample a round; warm-up rounds apart."""

    warmup: dict[str, list[Sample]]
    timed: dict[str, list[Sample]]

    @property
    def count(self) -> int:
        """Number of timed rounds."""
        return min((len(samples) for samples in self.timed.values()), default=0)


def interleave(
    contestants: Sequence[Contestant],
    rounds: int,
    budget_s: float,
    warmup_rounds: int = WARMUP_ROUNDS,
    clock: Clock | None = None,
) -> Rounds:
    """Time all contestants in turn, round by round.

    Args:
        contestants: In the order in which they take their turns.
        rounds: Timed rounds at most.
        budget_s: No round is begun that would probably end later than this many seconds after the
            start, but :data:`MIN_ROUNDS` are always timed. Rounds are always complete.
        warmup_rounds: Rounds before the timed ones; kept apart in the result.
        clock: Default: this machine's clocks, no device to wait for.
    """
    clock = clock or Clock()
    started = clock.wall()
    warmup = [_round(contestants, clock) for _ in range(warmup_rounds)]
    timed: list[dict[str, Sample]] = []
    while len(timed) < rounds:
        began = clock.wall()
        timed.append(_round(contestants, clock))
        ended = clock.wall()
        if len(timed) >= MIN_ROUNDS and 2 * ended - began - started > budget_s:
            break
    names = [contestant.name for contestant in contestants]
    return Rounds(*({n: [r[n] for r in done] for n in names} for done in (warmup, timed)))


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles (inclusive, linear between neighbours), smallest and largest."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return Spread(median, low, high, min(values), max(values))


def ratios(samples: Sequence[Sample], baseline: Sequence[Sample]) -> list[float]:
    """Speed over the baseline's speed, in each round by itself."""
    return [a.images_per_s / b.images_per_s for a, b in zip(samples, baseline, strict=True)]


def cpu_ratios(samples: Sequence[Sample], baseline: Sequence[Sample]) -> list[float]:
    """As :func:`ratios`, of images per second of processor time."""
    return [a.images_per_cpu_s / b.images_per_cpu_s for a, b in zip(samples, baseline, strict=True)]


def cpu_seconds() -> float:
    """Processor time of this process, of children that ended and of those that still run.

    The system adds a child's time to its parent's only when it has ended, but a loader's worker
    processes live longer than one measurement.
    """
    running = sum(_process_cpu_s(child.pid) for child in active_children() if child.pid)
    return time.process_time() + _ended_children_cpu_s() + running


def _ended_children_cpu_s() -> float:
    import resource  # not on every system, and not needed for the statistics

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _process_cpu_s(pid: int) -> float:
    """Processor time of another process: its clock on Linux, see clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:  # ended just now, or not Linux: then it counts when it has ended
        return 0.0


def _round(contestants: Sequence[Contestant], clock: Clock) -> dict[str, Sample]:
    return {contestant.name: _measure(contestant, clock) for contestant in contestants}


def _measure(contestant: Contestant, clock: Clock) -> Sample:
    contestant.before()
    clock.synchronise()
    wall, cpu = clock.wall(), clock.cpu()
    images = contestant.work()
    clock.synchronise()
    sample = Sample(images, clock.wall() - wall, clock.cpu() - cpu)
    contestant.after()
    return sample
