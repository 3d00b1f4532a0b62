"""The training loop: one for every method, stage and network.

What differs between methods is behind :class:`~smskd.methods.objective.Objective`; what differs
between machines is behind :class:`~smskd.data.Batches`; whether a teacher is run or looked up is
behind :class:`~smskd.frozen.Frozen`; and whether one stage run is trained or several seeds at once
is behind :class:`Group`. Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smskd.data import Batch, Batches
from smskd.errors import DivergedError
from smskd.frozen import Frozen, Live
from smskd.meter import Meter, Row
from smskd.methods.base import Networks, Signals, Terms
from smskd.methods.objective import Objective
from smskd.modes import fixed_statistics
from smskd.precision import autocast, tensor_cores
from smskd.reference import Anchor
from smskd.seeding import restore_rng, rng_state
from smskd.settings import Precision, Training
from smskd.taps import CLASSIFIER, FEATURES, Network, Outputs, TappedModel


@dataclass
class StageRun:
    """One stage in training: what is fixed, and what a checkpoint must hold.

    Attributes:
        student: Trained in place.
        teachers: Frozen; empty if neither method nor reference asks for one.
        anchor: The frozen reference, or None (stage 1, or weight 0).
        objective: The method's loss with its own trainable modules.
        optimizer: Over the student and the objective's modules.
        training: Settings of the stage.
        first_epoch: Epochs trained in earlier stages, so that no stage sees their draws again.
        taught_by: The teachers' networks, whether they are run or looked up.
        epoch: Epochs of this stage that are done.
        history: One row an epoch.
        steps: Batches of the next epoch that are done; not 0 only where it was paused within one.
        meter: Sums over those batches.
    """

    student: TappedModel
    teachers: Sequence[Frozen]
    anchor: Anchor | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    training: Training
    first_epoch: int = 0
    taught_by: Sequence[Network] = ()
    epoch: int = 0
    history: list[Row] = field(default_factory=list)
    steps: int = 0
    meter: Meter | None = None

    @property
    def reaches_networks(self) -> bool:
        """Whether a method asks for the networks themselves."""
        needs = self.objective.needs
        return bool((needs.student_roles | needs.teacher_roles) - FEATURES)

    def networks(self, images: Tensor) -> Networks:
        """The networks for methods that run them on other images or read their classifiers."""
        precision, needs = self.training.precision, self.objective.needs
        live = [teacher for teacher in self.teachers if isinstance(teacher, Live)]
        student = Network(self.student.model, self.student.taps)
        return Networks(
            images,
            student=partial(run_again, self.student, precision),
            teachers=tuple(partial(run_frozen, t.network, precision) for t in live),
            student_classifier=student.classifier if CLASSIFIER in needs.student_roles else None,
            teacher_classifiers=tuple(n.classifier for n in self.taught_by)
            if CLASSIFIER in needs.teacher_roles
            else (),
        )

    def deployed(self) -> nn.Module:
        """What is evaluated: the student, in its method's wrapper if it has one."""
        return self.objective.inference_model(self.student.model)

    def end_epoch(self, rate: float, meter: Meter) -> None:
        """Log an epoch that went well.

        Raises:
            DivergedError: a loss term or a weight is no longer finite.
        """
        row = meter.row()
        _check_weights(self.student.model, meter.epoch)
        self.history.append({"epoch": meter.epoch, "lr": rate, **row})
        self.epoch, self.steps, self.meter = meter.epoch, 0, None

    def state(self) -> dict[str, Any]:
        """All that it takes to go on from here, for a checkpoint; tensors are not copied."""
        return {
            "student": self.student.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "steps": self.steps,
            "meter": self.meter.state() if self.meter else None,
            "rng": rng_state(),
        }

    def load_state(self, state: dict[str, Any], sharing: int = 1) -> None:
        """Bring a new stage run to where :meth:`state` was taken, torch's generators too.

        Args:
            state: What was taken.
            sharing: How many stage runs will share the time.
        """
        self.student.model.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.steps, sums = state.get("steps", 0), state.get("meter")
        if sums is not None:
            device = next(self.student.model.parameters()).device
            self.meter = Meter.from_state(sums, self.epoch + 1, sharing, device)
        restore_rng(state["rng"])

    def close(self) -> None:
        """Take the hooks off the student and the teachers."""
        self.student.close()
        for teacher in self.teachers:
            teacher.close()


class Group(Protocol):
    """Stage runs that are trained at the same time, all at the same epoch."""

    @property
    def runs(self) -> Sequence[StageRun]:
        """One stage run, or the same one for several seeds."""

    def begin(self, rate: float) -> None:
        """Get ready for an epoch at this learning rate."""

    def step(self, batches: Sequence[Batch], epoch: int, meters: Sequence[Meter]) -> None:
        """Take one optimiser step with one batch a run."""

    def settle(self) -> None:
        """Put what an epoch trained into the runs, where it is evaluated and saved."""


class Pause(Protocol):
    """May ask for the state of an epoch under way: for a checkpoint within it, or to stop there."""

    def due(self) -> bool:
        """Asked after every step."""

    def take(self, runs: Sequence[StageRun]) -> None:
        """The state that was asked for; what this raises ends the training."""


def train(
    run: StageRun,
    batches: Batches,
    on_epoch: Callable[[StageRun], None],
    pause: Pause | None = None,
) -> None:
    """Train one stage to its end; see :func:`train_group`."""
    train_group(Alone(run), [batches], on_epoch, pause)


def train_group(
    group: Group,
    batches: Sequence[Batches],
    on_epoch: Callable[[StageRun], None],
    pause: Pause | None = None,
) -> None:
    """Train a stage to its end, calling ``on_epoch`` for each run after each epoch.

    Raises:
        DivergedError: a loss term or a weight is no longer finite; ``run.history`` ends with the
            last good epoch, and nothing was handed to ``on_epoch`` since.
        DataError: an epoch has no batches.
    """
    lead = group.runs[0]
    with tensor_cores(lead.training.precision):
        while lead.epoch < lead.training.epochs:
            _train_epoch(group, batches, pause)
            for run in group.runs:
                on_epoch(run)


def _train_epoch(group: Group, batches: Sequence[Batches], pause: Pause | None) -> None:
    """Train the next epoch, or the rest of one that was paused."""
    lead = group.runs[0]
    epoch, done = lead.epoch + 1, lead.steps
    rate = lead.training.optimizer.lr * lead.training.schedule.factor(epoch, lead.training.epochs)
    group.begin(rate)
    meters = [run.meter or Meter(epoch, sharing=len(group.runs)) for run in group.runs]
    steps = zip(*(data.epoch(lead.first_epoch + epoch) for data in batches), strict=True)
    for number, step in enumerate(islice(steps, done, None), done + 1):
        group.step(step, epoch, meters)
        if pause is not None and pause.due():
            group.settle()
            for run, meter in zip(group.runs, meters, strict=True):
                run.steps, run.meter = number, meter
            pause.take(group.runs)
    group.settle()
    for run, meter in zip(group.runs, meters, strict=True):
        run.end_epoch(rate, meter)


class Alone:
    """A group of one stage run."""

    def __init__(self, run: StageRun) -> None:
        self.runs = (run,)

    def begin(self, rate: float) -> None:
        """Set the rate and the training mode."""
        (run,) = self.runs
        set_rate(run.optimizer, rate)
        run.student.model.train()
        run.objective.train()

    def step(self, batches: Sequence[Batch], epoch: int, meters: Sequence[Meter]) -> None:
        """Run the networks on the batch and descend."""
        (run,), (batch,), (meter,) = self.runs, batches, meters
        task, distill = step_terms(run, batch, epoch, meter)
        run.objective.descend(task, distill, run.optimizer)

    def settle(self) -> None:
        """Nothing to do: the run's own student was trained."""


def step_terms(run: StageRun, batch: Batch, epoch: int, meter: Meter) -> tuple[Terms, Terms]:
    """Run the networks on one batch and return the (label, distillation) loss terms."""
    with autocast(run.training.precision, batch.images.device):
        student = run.student(batch.images)
        with torch.no_grad():
            teachers = tuple(teacher(batch) for teacher in run.teachers)
            said = run.anchor.network(batch) if run.anchor else None
    networks = run.networks(batch.images) if run.reaches_networks else None
    signals = Signals(
        student, teachers, batch.labels, batch.index, epoch, run.training.epochs, networks
    )
    return loss_terms(run, signals, said, meter)


def loss_terms(
    run: StageRun, signals: Signals, said: Outputs | None, meter: Meter
) -> tuple[Terms, Terms]:
    """The (label, distillation) loss terms of one batch; ``said`` is the reference's output."""
    task, distill = run.objective(signals)
    if run.anchor and said:
        held, weights = run.anchor.terms(signals, said)
        distill = {**distill, **held}
        meter.add_weights(weights)
    meter.add(signals, {**task, **distill})
    return task, distill


def run_again(student: TappedModel, precision: Precision, images: Tensor) -> Outputs:
    """Run the student on more images of a step; its running statistics do not move."""
    with autocast(precision, images.device), fixed_statistics(student.model):
        return student.run(images)


def run_frozen(network: TappedModel, precision: Precision, images: Tensor) -> Outputs:
    """Run a frozen network on other images."""
    with autocast(precision, images.device), torch.no_grad():
        return network.run(images)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _check_weights(model: nn.Module, epoch: int) -> None:
    """The last step of an epoch can break the weights without any loss showing it."""
    finite = [t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point()]
    if not torch.stack(finite).all():
        raise DivergedError(
            f"the student's weights are no longer finite after epoch {epoch}",
            "lower the learning rate or the weights of the loss terms",
        )
