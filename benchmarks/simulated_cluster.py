"""A cluster that exists on paper: stage runs of known cost, handed out as the executors do.

The jobs come from the executors' own queue, in plan order as their dependencies get done. Nothing
is moved between machines, nothing fails, and all devices are alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smskd_bench.executors.jobs import JobQueue
from smskd_bench.executors.ledger import Ledger, Outcome
from smskd_bench.executors.observing import Observers
from smskd_bench.plan import Plan
from smskd_bench.store import Store

Costs = Mapping[str, float]
"""Seconds of every stage run of a plan on one device, by key."""

NOWHERE = Path("/dev/null/no-store")
"""A store in which nothing is done and nothing can be."""


@dataclass(frozen=True)
class Schedule:
    """What became of a plan on so many devices.

    Attributes:
        devices: How many.
        makespan_s: From the first start to the last end.
        work_s: Of all stage runs, one after the other.
        longest_chain_s: Of stage runs that wait for each other: the critical path.
        starts: When each stage run begins, in seconds, by key.
    """

    devices: int
    makespan_s: float
    work_s: float
    longest_chain_s: float
    starts: dict[str, float]

    @property
    def bound_s(self) -> float:
        """No schedule on so many devices can be shorter."""
        return max(self.longest_chain_s, self.work_s / self.devices)

    @property
    def efficiency(self) -> float:
        """Share of the devices' time in which they work."""
        return self.work_s / (self.devices * self.makespan_s)


def simulate(plan: Plan, costs: Costs, devices: int) -> Schedule:
    """Run a plan in simulated time on ``devices`` equal devices, one stage run on each."""
    ledger = Ledger(plan, Store(NOWHERE), Observers(()))
    queue = JobQueue(plan, ledger)
    running: list[tuple[float, str]] = []
    starts: dict[str, float] = {}
    now = 0.0
    while True:
        while len(running) < devices and (job := queue.take()) is not None:
            for spec in job:
                starts[spec.key] = now
                heapq.heappush(running, (now + costs[spec.key], spec.key))
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] == now:
            ledger.settle(Outcome(heapq.heappop(running)[1], "done"))
    work_s = sum(costs[key] for key in plan.nodes)
    chain_s = sum(costs[key] for key in longest_chain(plan, costs))
    return Schedule(devices, now, work_s, chain_s, starts)


def longest_chain(plan: Plan, costs: Costs) -> list[str]:
    """Keys of the stage runs that wait for each other the longest, the first one first."""
    ends: dict[str, float] = {}
    latest: dict[str, str | None] = {}
    for key, spec in plan.nodes.items():  # in dependency order
        latest[key] = before = max(spec.depends_on, key=ends.__getitem__, default=None)
        ends[key] = costs[key] + (ends[before] if before else 0.0)
    chain: list[str] = []
    last = max(ends, key=ends.__getitem__, default=None)
    while last is not None:
        chain.append(last)
        last = latest[last]
    return chain[::-1]


def schedules(plan: Plan, costs: Costs, devices: Sequence[int]) -> list[Schedule]:
    """The same plan on clusters of several sizes."""
    return [simulate(plan, costs, count) for count in devices]
