"""What a worker process executes in one go, and in which order it is handed out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from smskd_bench.executors.ledger import Ledger
from smskd_bench.folds import folded_with
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec

Job: TypeAlias = tuple[StageSpec, ...]
"""Stage runs that one worker carries out together; none of them depends on another."""


def jobs_of(plan: Plan, folds: Iterable[tuple[str, ...]] = ()) -> list[Job]:
    """The whole plan as jobs, in the order of their first stage runs.

    Args:
        plan: What is to be run.
        folds: Keys of stage runs that are trained as one network; the others are jobs of their own.
    """
    group_of = folded_with(folds)
    groups = dict.fromkeys(group_of.get(key, (key,)) for key in plan.nodes)
    return [tuple(plan.nodes[key] for key in group) for group in groups]


class JobQueue:
    """Jobs that are not handed out yet, in plan order."""

    def __init__(self, plan: Plan, ledger: Ledger, folds: Iterable[tuple[str, ...]] = ()) -> None:
        self._ledger = ledger
        self._place = {key: place for place, key in enumerate(plan.nodes)}
        self._waiting = jobs_of(plan, folds)

    def take(self) -> Job | None:
        """The first job that can run now, or None; what needs no run is settled on the way."""
        still: list[Job] = []
        found: Job | None = None
        while self._waiting and found is None:
            job = self._waiting.pop(0)
            if all(self._ledger.is_ready(spec) for spec in job):
                found = tuple(s for s in job if not self._ledger.settle_unrun(s)) or None
            else:
                still.append(job)
        self._waiting = still + self._waiting
        return found

    def put_back(self, job: Job) -> None:
        """Take back a job that has to begin again; it keeps its place."""
        self._waiting.append(job)
        self._waiting.sort(key=lambda job: self._place[job[0].key])
