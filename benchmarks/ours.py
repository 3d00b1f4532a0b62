"""This project's training step, as its harness runs it: prepared stage, resident data.

A step is :func:`smskd.train.step_terms` and ``objective.descend`` on a batch that
:class:`smskd.data.ResidentBatches` cuts, networks in channels-last order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from smskd_bench.worker import to_device
from torch import Tensor, nn

from benchmarks.images import INFO, TrainImages
from benchmarks.numerics import EXACT, TF32
from benchmarks.pair import SEED, Pair
from smskd.compiled import compile_networks
from smskd.data import Batch, Normalisation, ResidentBatches
from smskd.datasets.base import DatasetInfo
from smskd.frozen import Frozen
from smskd.meter import Meter
from smskd.methods import METHODS
from smskd.methods.base import total
from smskd.models import taps_of
from smskd.output_table import OutputTable, TableSettings
from smskd.settings import Precision, Reference, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network
from smskd.train import StageRun, step_terms
from smskd.views import Augmentation, draw_order

METER_STEPS = 782
"""Steps whose sums are read at once: an epoch of 50,000 images in batches of 64."""


@dataclass(frozen=True)
class Held:
    """The reference of a later stage.

    Attributes:
        student: Of the previous stage; copied.
        settings: Weight and sample weights.
        table: Replaces its forward pass; None runs it live.
    """

    student: nn.Module
    settings: Reference
    table: Frozen | None = None


@dataclass(frozen=True)
class Options:
    """Which of our ways to train.

    Attributes:
        precision: Of the networks.
        table: Replaces the teacher's forward pass; None runs it live.
        channels_last: Order of memory of networks and images; False is torch's default.
        compiled: Whether the networks run compiled.
        held: The reference; None in a first stage.
        title: Name in the table; empty for :func:`contestant_name`.
    """

    precision: Precision = "fp32"
    table: Frozen | None = None
    channels_last: bool = True
    compiled: bool = False
    held: Held | None = None
    title: str = ""

    @property
    def name(self) -> str:
        """As in the table."""
        return self.title or contestant_name(self.precision, self.table is not None)


def contestant_name(precision: Precision, table: bool) -> str:
    """Name of one of our ways in the table."""
    return f"ours {precision} {'table' if table else 'live'}"


def filled_table(
    folder: Path, name: str, model: nn.Module, batches: ResidentBatches, images: int
) -> OutputTable:
    """The exact table of a frozen network, filled for what is read here.

    Args:
        folder: Where the table is kept.
        name: The network's in the zoo.
        model: The network; frozen.
        batches: The training set on its device.
        images: So many will be read from epoch 1 on, and the first batch un-augmented.
    """
    network = Network(to_device(model, str(batches.labels.device)), taps_of(name))
    table = OutputTable(folder, network, batches, TableSettings(storage="fp32"))
    wanted = np.zeros((batches.num_samples, batches.augment.num_views), bool)
    wanted[: batches.batch_size, plain_number(batches)] = True
    for epoch in count(1):
        order = draw_order(batches.seed, epoch, batches.num_samples)[:images]
        wanted[order, batches.views(epoch)[order]] = True
        images -= len(order)
        if images <= 0:
            break
    table.fill(wanted)
    return table


class OurLoop:
    """The loop.

    Args:
        pair: Names of the networks, for their taps.
        student: Trained in place.
        teacher: Frozen.
        device: Where to train.
        batches: The training set on that device.
        options: Precision and source of the teacher's outputs.
        steps_only: Do all steps on one batch that was cut before.
    """

    def __init__(
        self,
        pair: Pair,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        batches: ResidentBatches,
        options: Options,
        steps_only: bool = False,
    ) -> None:
        self.name = options.name
        self.precision: str = options.precision
        self.numerics = TF32 if options.precision == "tf32" else EXACT
        self.student = _placed(student, device, options).train()
        teacher = _placed(teacher, device, options)
        self.run = _prepared(pair, self.student, teacher, batches, options)
        self.batches = batches
        self.channels_last = options.channels_last
        self.source = map(self._in_order, _same(batches) if steps_only else _epochs(batches))
        self._meter, self._steps = Meter(1), 0

    def step(self, batch: Batch) -> Tensor:
        """One step; returns the loss, left on the device."""
        task, distill = step_terms(self.run, batch, 1, self._meter)
        self.run.objective.descend(task, distill, self.run.optimizer)
        return total(task, distill).detach()

    def step_on(self, images: Tensor, labels: Tensor, index: Tensor) -> float:
        """As in :class:`benchmarks.loop.Loop`; the images are cut from our own data."""
        view = torch.full_like(index, plain_number(self.batches))
        batch = Batch(plain_view(self.batches, index), labels, index, view)
        return self.step(self._in_order(batch)).item()

    def train(self, steps: int) -> int:
        """So many steps on the data's batches; returns the number of images."""
        images = 0
        for _ in range(steps):
            batch = next(self.source)
            self.step(batch)
            images += len(batch.labels)
            self._end_of_step()
        return images

    def close(self) -> None:
        """Take the hooks off."""
        self.run.close()

    def _in_order(self, batch: Batch) -> Batch:
        """The batch with its images in the networks' order of memory."""
        if self.channels_last:
            return batch
        return replace(batch, images=batch.images.contiguous())

    def _end_of_step(self) -> None:
        """Read the meter as often as an epoch ends, as the training loop does."""
        self._steps += 1
        if self._steps % METER_STEPS == 0:
            self._meter.row()
            self._meter = Meter(1)


def plain_view(batches: ResidentBatches, index: Tensor) -> Tensor:
    """The normalised images ``(B, C, H, W)`` at ``index`` ``(B,)``, neither shifted nor flipped."""
    return batches.cut(index, torch.full_like(index, plain_number(batches)))


def plain_number(batches: ResidentBatches) -> int:
    """The view that is neither shifted nor flipped."""
    augment = batches.augment
    side = 2 * augment.pad + 1
    return (augment.pad * side + augment.pad) * (2 if augment.flip else 1)


def resident(
    data: TrainImages,
    batch_size: int,
    device: torch.device,
    seed: int = SEED,
    info: DatasetInfo = INFO,
) -> ResidentBatches:
    """The training set on the device."""
    return ResidentBatches(
        data.images.to(device),
        data.labels.to(device),
        batch_size,
        seed,
        Normalisation(info.mean, info.std),
        Augmentation(info.pad, info.flip),
    )


def _placed(model: nn.Module, device: torch.device, options: Options) -> nn.Module:
    return to_device(model, str(device)) if options.channels_last else model.to(device)


def _prepared(
    pair: Pair, student: nn.Module, teacher: nn.Module, batches: ResidentBatches, options: Options
) -> StageRun:
    """The stage, ready to train, its frozen networks live or looked up as the options say."""
    device = batches.labels.device
    held = options.held
    training = Training(epochs=240, batch_size=batches.batch_size, precision=options.precision)
    run = prepare(
        Network(student, taps_of(pair.student)),
        [Network(teacher, taps_of(pair.teacher))],
        Stage(METHODS["kd"](), epochs=240, reference=held.settings if held else None),
        training,
        plain_view(batches, torch.zeros(1, dtype=torch.int64, device=device)),
        previous=_placed(held.student, device, options) if held else None,
        seed=SEED,
        num_train=batches.num_samples,
        train_labels=batches.labels,
    )
    if options.table:
        run.teachers = (options.table,)
    if held and held.table and run.anchor:
        run.anchor.network = held.table
    if options.compiled:
        compile_networks(run)
    run.student.model.train()
    run.objective.train()
    return run


def _epochs(batches: ResidentBatches) -> Iterator[Batch]:
    for epoch in count(1):
        yield from batches.epoch(epoch)


def _same(batches: ResidentBatches) -> Iterator[Batch]:
    batch = next(batches.epoch(1))
    while True:
        yield batch
