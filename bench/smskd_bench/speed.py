"""How long one network takes for an image: short, real measurements on the device at hand.

A training step is the library's own: batches cut and augmented on the device, forward, backward,
SGD. Images and labels are random, of the data set's shape; they cost the same as real ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch

from smskd.data import Batch, Normalisation, ResidentBatches
from smskd.datasets import dataset_info
from smskd.folded import Folded
from smskd.meter import Meter
from smskd.methods import METHODS
from smskd.models import build_model, taps_of
from smskd.precision import autocast
from smskd.seeding import seeded
from smskd.settings import Precision, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network, TappedModel
from smskd.train import Alone, Group, StageRun
from smskd.views import Augmentation
from smskd_bench.cost import network_cost
from smskd_bench.spec import StageSpec
from smskd_bench.worker import pin_numerics, to_device

Role = Literal["train", "forward"]

Step = Callable[[], int]
"""Works through one batch and returns how many images it had."""

Clock = Callable[[], float]

LEAST_STEPS, MOST_STEPS = 3, 50

CPU_STEP_MACS = 4e9
"""On a CPU, batches that cost more are measured on fewer images, which cost about the same each."""

LEAST_IMAGES = 8

STEPS_A_BLOCK = {"cpu": 1, "cuda": 5}
"""Steps between looks at the clock: a GPU must not be waited for after each."""


@dataclass(frozen=True)
class Workload:
    """One network at one kind of work.

    Attributes:
        model: Name in the zoo.
        dataset: Whose image shape and classes it has.
        batch_size: Images a step.
        precision: Under which it runs.
        threads: CPU threads.
        role: A "train" step of the network as a student, or a "forward" pass of it frozen.
        folded: Networks that are trained as one; images count for each of them.
    """

    model: str
    dataset: str
    batch_size: int
    precision: Precision
    threads: int
    role: Role
    folded: int = 1

    @classmethod
    def of(cls, spec: StageSpec, model: str, role: Role, threads: int) -> Workload:
        """What ``model`` does for each batch of a stage run."""
        recipe = spec.training
        return cls(model, spec.dataset.name, recipe.batch_size, recipe.precision, threads, role)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image; a backward pass is about two forward passes."""
        macs = network_cost(self.model, self.dataset).macs
        return 3 * macs if self.role == "train" else macs

    def __str__(self) -> str:
        many = f" {self.folded} folded" if self.folded > 1 else ""
        return f"{self.model} {self.role} {self.batch_size}{many}"


def measure(
    work: Workload, device: str, limit_s: float = 0.6, clock: Clock = time.perf_counter
) -> float:
    """Milliseconds an image: one warm-up, then the median of steps for about ``limit_s`` seconds.

    Args:
        work: What is measured.
        device: torch device string.
        limit_s: Measuring time after the warm-up.
        clock: Gives seconds.

    Raises:
        RuntimeError: torch cannot do it, for instance for want of memory.
    """
    pin_numerics()
    images = as_measured(work, device).batch_size
    with cpu_threads(work.threads), seeded(0):
        make = forward_step if work.role == "forward" else training_step
        step = folded_step if work.folded > 1 else make
        seconds = _median_step_s(step(work, images, device), device, limit_s, clock)
        return 1000.0 * seconds / (images * work.folded)


def as_measured(work: Workload, device: str) -> Workload:
    """The same with the batch that is measured: its own, or what a CPU does in reasonable time."""
    if torch.device(device).type != "cpu":
        return work
    fitting = max(LEAST_IMAGES, int(CPU_STEP_MACS / work.macs))
    return replace(work, batch_size=min(work.batch_size, fitting))


def training_step(work: Workload, images: int, device: str, teacher: str | None = None) -> Step:
    """A step of training on ``images`` images, with live KD if there is a teacher (its name)."""
    batches = _batches(work, images, device)
    return _step_of(Alone(_prepared(work, images, device, batches, teacher)), [batches], images)


def folded_step(work: Workload, images: int, device: str) -> Step:
    """A step of training for ``work.folded`` seeds at once, on ``images`` images each."""
    data = [_batches(work, images, device) for _ in range(work.folded)]
    runs = [_prepared(work, images, device, batches) for batches in data]
    return _step_of(Folded(runs), data, images)


def forward_step(work: Workload, images: int, device: str) -> Step:
    """A forward pass of the frozen network over ``images`` images."""
    batches = _batches(work, images, device)
    network = _network(work.model, work.dataset, device)
    frozen = TappedModel(network.model.eval().requires_grad_(False), network.taps)
    place = torch.device(device)

    @torch.no_grad()
    def step() -> int:
        with autocast(work.precision, place):
            frozen(next(batches).images)
        return images

    return step


def _prepared(
    work: Workload, images: int, device: str, batches: Iterator[Batch], teacher: str | None = None
) -> StageRun:
    """A stage run of plain training, or of live KD if there is a teacher (its name)."""
    return prepare(
        _network(work.model, work.dataset, device),
        [_network(teacher, work.dataset, device)] if teacher else [],
        Stage(METHODS["kd" if teacher else "scratch"](), epochs=1),
        Training(1, batch_size=images, precision=work.precision),
        next(batches).images[:1],
    )


def _step_of(group: Group, data: Sequence[Iterator[Batch]], images: int) -> Step:
    group.begin(0.05)
    meters = [Meter(1) for _ in group.runs]

    def step() -> int:
        group.step([next(batches) for batches in data], 1, meters)
        return images

    return step


def wait_for(device: str) -> None:
    """Let a GPU finish what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run a block with so many of torch's CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _median_step_s(step: Step, device: str, limit_s: float, clock: Clock) -> float:
    block = STEPS_A_BLOCK[torch.device(device).type]
    _block_s(step, block, device, clock)
    times: list[float] = []
    while len(times) < LEAST_STEPS or (sum(times) < limit_s and len(times) < MOST_STEPS):
        times.append(_block_s(step, block, device, clock))
    return median(times) / block


def _block_s(step: Step, count: int, device: str, clock: Clock) -> float:
    started = clock()
    for _ in range(count):
        step()
    wait_for(device)
    return clock() - started


def _network(model: str, dataset: str, device: str) -> Network:
    info = dataset_info(dataset)
    network = build_model(model, info.num_classes, info.channels, info.size)
    return Network(to_device(network, device), taps_of(model))


def _batches(work: Workload, images: int, device: str) -> Iterator[Batch]:
    """Random training data of the data set's shape, without end."""
    info = dataset_info(work.dataset)
    shape = (4 * images, info.channels, info.size, info.size)
    data = ResidentBatches(
        torch.randint(0, 256, shape, dtype=torch.uint8).to(device),
        torch.randint(0, info.num_classes, shape[:1]).to(device),
        images,
        normalise=Normalisation(info.mean, info.std),
        augment=Augmentation(info.pad, info.flip),
    )
    epoch = 0
    while True:
        epoch += 1
        yield from data.epoch(epoch)
