"""Which stage runs are trained as one network: the same work for several seeds.

Folding (:mod:`smskd.folded`) saves launches and loses some efficiency of each convolution. Which of
the two is more depends on network and device, so it is measured on the device at hand, once, and
kept with the other speeds in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from smskd.datasets import dataset_info
from smskd.folded import why_not_foldable
from smskd.models import build_model, taps_of
from smskd.seeding import seeded
from smskd.taps import Network
from smskd_bench.calibration import Progress, calibrate
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec, key_of
from smskd_bench.speed import Workload
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
    threads: int | None = None,
    progress: Progress = lambda done, total, what: None,
    wanted: Callable[[str], bool] = lambda key: True,
) -> list[tuple[str, ...]]:
    """The groups of stage runs that are folded.

    Args:
        choice: "auto" measures whether it is faster.
        plan: What is to be run.
        device: torch device string.
        store: Keeps measurements.
        threads: CPU threads that a worker was given; None lets it choose.
        progress: Told before each measurement.
        wanted: Whether a stage run is still to be run; others need no measurement.
    """
    groups = [] if choice == "off" else fold_groups(plan)
    groups = [g for g in groups if sum(map(wanted, g)) > 1 and _can_fold(plan.nodes[g[0]])]
    if choice == "on" or not groups:
        return groups
    pairs = [(group, *_workloads(group, plan, threads)) for group in groups]
    speeds = calibrate([w for _, *both in pairs for w in both], device, store, progress)

    def pays(alone: Workload, folded: Workload) -> bool:
        one, many = speeds.ms_per_image(alone), speeds.ms_per_image(folded)
        return one is not None and many is not None and one > WORTH_IT * many

    return [group for group, alone, folded in pairs if pays(alone, folded)]


def _workloads(
    group: tuple[str, ...], plan: Plan, threads: int | None
) -> tuple[Workload, Workload]:
    """A training step of one student alone, and of all of them folded."""
    spec = plan.nodes[group[0]]
    teachers = [plan.nodes[key] for key in spec.teachers]
    count = threads or step_threads(spec, teachers, torch.get_num_threads())
    recipe = spec.training
    alone = Workload(
        spec.model, spec.dataset.name, recipe.batch_size, recipe.precision, count, "train"
    )
    return alone, replace(alone, folded=len(group))


_FOLDABLE: dict[tuple[str, str], bool] = {}


def _can_fold(spec: StageSpec) -> bool:
    """Whether the student's layers can be folded at all; tried on a fresh one."""
    place = (spec.model, spec.dataset.name)
    if place not in _FOLDABLE:
        info = dataset_info(spec.dataset.name)
        with seeded(0):
            model = build_model(spec.model, info.num_classes, info.channels)
            image = torch.rand(1, info.channels, info.size, info.size)
        reason = why_not_foldable(Network(model, taps_of(spec.model)), 2, image)
        _FOLDABLE[place] = reason is None
    return _FOLDABLE[place]


def _signature(spec: StageSpec, plan: Plan, memo: dict[str, str]) -> str:
    """A hash of the specification without seeds, its own and those of what it depends on."""
    if spec.key not in memo:
        document: dict[str, Any] = replace(spec, seed=0).document()
        document["parent"] = spec.parent and _signature(plan.nodes[spec.parent], plan, memo)
        document["teachers"] = [_signature(plan.nodes[key], plan, memo) for key in spec.teachers]
        memo[spec.key] = key_of(document)
    return memo[spec.key]


def folded_with(groups: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """For each stage run that is folded, its group."""
    return {key: group for group in groups for key in group}
