"""Which stage runs are trained as one network: the same work for several seeds.

Folding (:mod:`smskd.folded`) saves launches and loses some efficiency of each convolution. Which of
the two is more depends on network and device, so it is measured on the device at hand, once, and
kept with the other speeds in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Literal

import torch

from smskd.datasets import dataset_info
from smskd.folded import why_not_foldable
from smskd.models import build_model, taps_of
from smskd.seeding import seeded
from smskd.taps import Network
from smskd_bench.calibration import Progress, calibrate
from smskd_bench.parallel import Parallelism, width
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec
from smskd_bench.speed import Workload, as_measured
from smskd_bench.store import Store
from smskd_bench.threads import step_threads

FoldChoice = Literal["auto", "on", "off"]

MOST = 8
"""Seeds in one network at most; more are divided."""

WORTH_IT = 1.1
"""How many times as fast a folded step must be, so that noise does not decide."""


def fold_groups(plan: Plan) -> list[tuple[str, ...]]:
    """Keys of stage runs that differ in their seed only, their teachers and parents likewise."""
    alike: dict[str, list[str]] = {}
    memo: dict[str, str] = {}
    for key, spec in plan.nodes.items():
        if not spec.imported:
            alike.setdefault(_signature(spec, plan, memo), []).append(key)
    groups = (sorted(keys, key=lambda key: plan.nodes[key].seed) for keys in alike.values())
    parts = (tuple(g[i : i + MOST]) for g in groups for i in range(0, len(g), MOST))
    return [part for part in parts if len(part) > 1]


def choose_folds(
    choice: FoldChoice,
    plan: Plan,
    device: str,
    store: Store,
    spread: Parallelism | None = None,
    progress: Progress = lambda done, total, what: None,
    wanted: Callable[[str], bool] = lambda key: True,
) -> list[tuple[str, ...]]:
    """The groups of stage runs that are folded.

    Args:
        choice: "auto" measures whether it is faster.
        plan: What is to be run.
        device: torch device string.
        store: Keeps measurements, and says how stage runs were begun, which go on like that.
        spread: Workers and their threads: fewer jobs than workers would leave some idle.
        progress: Told before each measurement.
        wanted: Whether a stage run is still to be run; others need no measurement.
    """
    groups = [] if choice == "off" else fold_groups(plan)
    leads = {group: plan.nodes[group[0]] for group in groups}
    groups = [
        group for group, lead in leads.items()
        if sum(map(wanted, group)) > 1 and _can_fold(lead.model, lead.dataset.name)
    ]  # fmt: skip
    if choice == "on" or not groups:
        return groups
    begun = {group: as_begun for group in groups if (as_begun := _as_begun(group, store))}
    spread = spread or Parallelism(1)
    fresh = [(g, *_workloads(g, plan, spread.threads)) for g in groups if g not in begun]
    speeds = calibrate([w for _, *both in fresh for w in both], device, store, progress)
    needed = WORTH_IT * _crowding(groups, plan, spread.workers, wanted)

    def pays(alone: Workload, folded: Workload) -> bool:
        one, many = (speeds.measured.get(as_measured(w, device)) for w in (alone, folded))
        return one is not None and many is not None and one > needed * many

    chosen = {group for group, alone, folded in fresh if pays(alone, folded)}
    chosen |= {group for group, how in begun.items() if how == "folded"}
    return [group for group in groups if group in chosen]


def _as_begun(group: tuple[str, ...], store: Store) -> Literal["folded", "apart"] | None:
    """How a group was begun; None if none of it was."""
    states = [store.checkpoint(key) for key in group if not store.is_done(key)]
    sizes = {state["sessions"][-1].get("folded", 1) for state in states if state}
    if not sizes:
        return None
    return "folded" if sizes == {len(group)} else "apart"


def _crowding(
    groups: list[tuple[str, ...]], plan: Plan, workers: int, wanted: Callable[[str], bool]
) -> float:
    """How many times more workers have something to do without folding than with it."""
    left = [key for key in plan.nodes if wanted(key)]
    followers = {key for group in groups for key in group[1:]}
    jobs = [key for key in left if key not in followers]
    return min(workers, width(plan, left)) / max(1, min(workers, width(plan, jobs)))


def _workloads(
    group: tuple[str, ...], plan: Plan, threads: int | None
) -> tuple[Workload, Workload]:
    """A training step of one student alone, and of all of them folded."""
    spec = plan.nodes[group[0]]
    teachers = [plan.nodes[key] for key in spec.teachers]
    count = threads or step_threads(spec, teachers, torch.get_num_threads())
    alone = Workload.of(spec, spec.model, "train", count)
    return alone, replace(alone, folded=len(group))


@cache
def _can_fold(model: str, dataset: str) -> bool:
    """Whether a student's layers can be folded at all; tried on a fresh one."""
    info = dataset_info(dataset)
    with seeded(0):
        network = build_model(model, info.num_classes, info.channels, info.size)
        image = torch.rand(1, info.channels, info.size, info.size)
    return why_not_foldable(Network(network, taps_of(model)), 2, image) is None


def _signature(spec: StageSpec, plan: Plan, memo: dict[str, str]) -> str:
    """A hash of the specification without seeds, its own and those of what it depends on."""
    if spec.key not in memo:
        parent = _signature(plan.nodes[spec.parent], plan, memo) if spec.parent else None
        teachers = tuple(_signature(plan.nodes[key], plan, memo) for key in spec.teachers)
        memo[spec.key] = spec.sibling(spec.model, spec.model_version, 0, parent, teachers).key
    return memo[spec.key]


def folded_with(groups: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """For each stage run that is folded, its group."""
    return {key: group for group in groups for key in group}
