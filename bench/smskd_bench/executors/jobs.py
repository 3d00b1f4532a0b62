"""What a worker process executes in one go, and in which order it is handed out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeAlias

from smskd_bench.executors.ledger import Ledger
from smskd_bench.folds import folded_with
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec

LOOK_AGAIN_S = 0.5
"""How long a job that another process has is left alone."""

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
        self._busy: dict[str, tuple[float, Job]] = {}  # by the first key
        self._announced: set[str] = set()

    def take(self) -> Job | None:
        """The first job that can run now, or None; what needs no run is settled on the way."""
        still: list[Job] = []
        found: Job | None = None
        waiting = iter(self._waiting)
        for job in waiting:
            if not self._may_try(job):
                still.append(job)
                continue
            self._busy.pop(job[0].key, None)
            found = tuple(s for s in job if not self._ledger.settle_unrun(s)) or None
            if found:
                break
        self._waiting = [*still, *waiting]
        return found

    def put_back(self, job: Job) -> None:
        """Take back a job that has to begin again; it keeps its place."""
        self._waiting.append(job)
        self._waiting.sort(key=lambda job: self._place[job[0].key])

    def defer(self, job: Job) -> None:
        """Take back a job that another process has; it is tried again in a while."""
        self._busy[job[0].key] = (time.monotonic() + LOOK_AGAIN_S, job)
        self.put_back(job)

    def seconds_to_wait(self) -> float | None:
        """Until a deferred job may be tried again; None if there is none."""
        if not self._busy:
            return None
        soonest = min(when for when, _ in self._busy.values())
        return max(0.01, soonest - time.monotonic())

    def announce(self) -> None:
        """Tell once of each deferred job that there is nothing else to do but wait for it."""
        for spec in (spec for _, job in self._busy.values() for spec in job):
            if spec.key not in self._announced:
                self._announced.add(spec.key)
                self._ledger.observer.waiting(spec)

    def _may_try(self, job: Job) -> bool:
        ready = all(self._ledger.is_ready(spec) for spec in job)
        when, _ = self._busy.get(job[0].key, (0.0, job))
        return ready and when <= time.monotonic()
