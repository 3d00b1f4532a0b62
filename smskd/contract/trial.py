"""One stage of a method on a pair, prepared as training prepares it.

:func:`smskd.stages.prepare` builds the stage, and :mod:`smskd.train` runs the networks and makes
the signals: no check sees signals that training would not give.

Shapes: B batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from smskd.contract.cases import BATCH, PairCase
from smskd.contract.networks import ToyNet
from smskd.data import Batch, ResidentBatches
from smskd.errors import SmskdError
from smskd.meter import Meter
from smskd.methods.base import Signals, Terms
from smskd.methods.objective import Part
from smskd.seeding import derive
from smskd.settings import Optimizer, Precision, Reference, Schedule, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network
from smskd.train import Alone, StageRun, step_terms

EPOCHS = 240
"""Length of a stage of which single steps are looked at."""

PHASES = (1, EPOCHS)
"""Epochs looked at: the first, when methods of two phases initialise, and the last."""

Alter = Callable[[ToyNet, list[ToyNet], ResidentBatches], None]
"""Changes a student, its teachers and the data before a stage is built on them."""


@dataclass
class Trial:
    """One stage of a method on a pair, ready for its first step.

    Attributes:
        run: The stage.
        student: The student's network.
        teachers: The teachers', as they were given to the stage.
        data: What it trains on.
    """

    run: StageRun
    student: ToyNet
    teachers: list[ToyNet]
    data: ResidentBatches

    def batch(self) -> Batch:
        """The first batch."""
        return next(iter(self.data.epoch(1)))

    def terms(self, batch: Batch, epoch: int = 1) -> tuple[Terms, Terms]:
        """Run the networks on a batch and return the (label, distillation) terms."""
        return step_terms(self.run, batch, epoch, Meter(epoch))

    def phases(self, batch: Batch | None = None) -> list[Terms]:
        """All terms of one batch in the first and the last epoch; equal trials draw alike."""
        torch.manual_seed(derive(0, "train"))
        batch = batch or self.batch()
        terms = [self.terms(batch, epoch) for epoch in PHASES]
        return [{**task, **distill} for task, distill in terms]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the student's and the method's own."""
        return [*self.student.parameters(), *self.run.objective.parameters()]

    @contextmanager
    def seen_by_objective(self, look: Callable[[Signals], Signals]) -> Iterator[None]:
        """Let ``look`` see, and replace, the signals of each step in the block."""

        def before(_objective: nn.Module, inputs: tuple[Signals]) -> tuple[Signals]:
            return (look(inputs[0]),)

        handle = self.run.objective.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()


def trial(
    parts: Part | Sequence[Part],
    case: PairCase,
    *,
    alter: Alter | None = None,
    epochs: int = EPOCHS,
    num: int = BATCH,
    batch_size: int = BATCH,
    precision: Precision = "fp32",
    schedule: Schedule | None = None,
    rate: float = 0.05,
    wide: bool = False,
    later: bool = False,
) -> Trial:
    """Prepare one stage; equal arguments give equal stages.

    Args:
        parts: One method with its modifiers, or several for a joint stage.
        case: The pair.
        alter: Changes networks and data first.
        epochs: Length of the stage.
        num: Number of training samples.
        batch_size: Samples a step.
        precision: Arithmetic of the networks.
        schedule: Of the learning rate; None is the recipe's.
        rate: Learning rate.
        wide: Whether networks, data and the method's modules are float64.
        later: Whether this is the second stage, held by a reference.
    """
    student, teachers = case.networks()
    data = case.data(num, batch_size)
    if alter:
        alter(student, teachers, data)
    previous = copy.deepcopy(student) if later else None
    if wide:
        data = ResidentBatches(data.images.double(), data.labels, batch_size)
        for model in (student, *teachers, *([previous] if previous else [])):
            model.double()
    stage = Stage([parts] if isinstance(parts, Part) else parts, epochs, Reference())
    optimizer = Optimizer(lr=rate)
    training = Training(epochs, optimizer, schedule or Schedule(), batch_size, precision)
    run = prepare(
        Network(student, case.student.taps),
        [Network(t, layout.taps) for t, layout in zip(teachers, case.teachers, strict=True)],
        stage, training, data.images[:1], previous=previous, number=1 + later,
        num_train=num, train_labels=data.labels,
    )  # fmt: skip
    if wide:
        run.objective.double()
    Alone(run).begin(rate)
    torch.manual_seed(derive(0, "train"))
    return Trial(run, student, teachers, data)


@lru_cache(maxsize=256)
def refusal(part: Part, case: PairCase) -> str | None:
    """Why a method cannot work with a pair, or None."""
    try:
        trial(part, case).run.close()
    except SmskdError as error:
        return str(error)
    return None
