"""Turns of processes that share one device; they are started once and idle between turns."""

from __future__ import annotations

from contextlib import ExitStack

from smskd_bench.parallel import cores
from smskd_bench.speed import Workload
from smskd_bench.worker_trial import Crew

from benchmarks.expected import ONE_WORKER, WORKERS, workers_name
from benchmarks.interleave import Contestant
from benchmarks.pair import Pair

TURN_S = 1.0
"""Seconds that one turn trains."""


def crew_turns(
    pair: Pair, batch_size: int, device: str, threads: int, stack: ExitStack
) -> tuple[list[Contestant], dict[str, str]]:
    """One process with all cores, then several that divide the cores, as the harness does.

    Args:
        pair: Trained by KD with a live teacher on images of CIFAR-100's shape.
        batch_size: B.
        device: torch device string.
        threads: CPU threads of one process by itself.
        stack: Ends the processes.

    Returns:
        The turns, each tried once, and by name why others cannot be taken, such as want of memory.
    """
    turns: list[Contestant] = []
    missing: dict[str, str] = {}
    for count in (1, *WORKERS):
        each = max(1, min(threads, cores() // count))
        work = Workload(pair.student, "cifar100", batch_size, "fp32", each, "train")
        crew = stack.enter_context(Crew(count, work, device, pair.teacher))
        name = workers_name(count) if count > 1 else ONE_WORKER
        turn = CrewTurn(crew).contestant(name)
        try:
            turn.before()
            turn.work()
        except RuntimeError as error:  # a process that was killed is of this kind too
            missing[name] = str(error).splitlines()[0]
            crew.close()
        else:
            turns.append(turn)
    return turns, missing


class CrewTurn:
    """One turn: get ready untimed, then train for :data:`TURN_S`."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def contestant(self, name: str) -> Contestant:
        """For :func:`benchmarks.interleave.interleave`."""
        return Contestant(name, self.work, before=self.before)

    def before(self) -> None:
        """Build the networks and take a first step."""
        self.crew.get_ready(TURN_S)

    def work(self) -> int:
        """Images trained by all processes."""
        return round(self.crew.train() * TURN_S)
