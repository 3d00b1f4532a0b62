"""What a plan costs, counted in multiply-accumulates before anything is spent.

A training image costs three student forwards (the backward pass is about two), one forward of each
teacher and one of the reference; an evaluated image costs one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from smskd.cost import ModelCost, model_cost
from smskd.datasets import dataset_info
from smskd.models import build_model, taps_of
from smskd.seeding import seeded
from smskd.taps import POOLED, probe
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec


@dataclass(frozen=True)
class PlanCost:
    """Sizes of a plan.

    Attributes:
        cells: Cells of the matrix.
        stages_before: Stage runs if every cell were trained alone, teacher included.
        stages: Stage runs after sharing.
        epochs_before: Epochs of the former.
        epochs: Epochs of the latter.
        macs_before: Multiply-accumulates of the former.
        macs: Multiply-accumulates of the latter.
        done: Stage runs that have their result.
        epochs_left: Epochs of those that have not.
        macs_left: Multiply-accumulates of those that have not.
    """

    cells: int
    stages_before: int
    stages: int
    epochs_before: int
    epochs: int
    macs_before: int
    macs: int
    done: int
    epochs_left: int
    macs_left: int


@cache
def network_cost(model: str, dataset: str) -> ModelCost:
    """Parameters and MACs of one image of a network for a data set's image shape."""
    info = dataset_info(dataset)
    with seeded(0):  # drawing its weights must not move the stream that training draws from
        network = build_model(model, info.num_classes, info.channels, info.size)
    return model_cost(network, (info.channels, info.size, info.size))


@cache
def pooled_width(model: str, dataset: str) -> int:
    """Width of a network's pooled feature for a data set's image shape."""
    info = dataset_info(dataset)
    with seeded(0):
        network = build_model(model, info.num_classes, info.channels, info.size)
    image = torch.zeros(1, info.channels, info.size, info.size)
    return probe(network, taps_of(model), [POOLED], image).pooled


def epoch_macs(spec: StageSpec, plan: Plan) -> int:
    """MACs of one training epoch of a stage run."""
    student = network_cost(spec.model, spec.dataset.name).macs
    teachers = [network_cost(plan.nodes[key].model, spec.dataset.name) for key in spec.teachers]
    per_image = 3 * student + sum(t.macs for t in teachers) + (student if spec.reference else 0)
    return per_image * num_train(spec)


def stage_macs(spec: StageSpec, plan: Plan) -> int:
    """MACs of a whole stage run, its test at the end included."""
    test = (
        network_cost(spec.model, spec.dataset.name).macs * dataset_info(spec.dataset.name).num_test
    )
    return epoch_macs(spec, plan) * spec.training.epochs + test


def num_train(spec: StageSpec) -> int:
    """Training images of a stage run."""
    data = spec.dataset
    return data.train_size or dataset_info(data.name).num_train - data.dev_size


def plan_cost(plan: Plan, done: set[str]) -> PlanCost:
    """Count a plan, shared and unshared; ``done`` are keys that have their result."""
    macs = {key: stage_macs(spec, plan) for key, spec in plan.nodes.items()}
    epochs = {key: spec.training.epochs for key, spec in plan.nodes.items()}
    alone = plan.run_alone()
    left = [key for key in plan.nodes if key not in done]
    return PlanCost(
        cells=len(plan.cells),
        stages_before=len(alone),
        stages=len(plan.nodes),
        epochs_before=sum(epochs[key] for key in alone),
        epochs=sum(epochs.values()),
        macs_before=sum(macs[key] for key in alone),
        macs=sum(macs.values()),
        done=len(plan.nodes) - len(left),
        epochs_left=sum(epochs[key] for key in left),
        macs_left=sum(macs[key] for key in left),
    )
