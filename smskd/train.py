"""The training loop: one for every method, stage and network.

What differs between methods is behind :class:`~smskd.methods.objective.Objective`; what differs
between machines is behind :class:`~smskd.data.Batches`. Shapes: B batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smskd.data import Batch, Batches
from smskd.errors import DataError, DivergedError
from smskd.methods.base import Signals, Terms
from smskd.methods.objective import Objective
from smskd.reference import Anchor, true_class_probability
from smskd.settings import Training
from smskd.taps import TappedModel

Row = dict[str, float]
"""What one epoch logs: flat names, plain numbers."""

TCP_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


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
        epoch: Epochs of this stage that are done.
        history: One row an epoch.
    """

    student: TappedModel
    teachers: Sequence[TappedModel]
    anchor: Anchor | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    training: Training
    first_epoch: int = 0
    epoch: int = 0
    history: list[Row] = field(default_factory=list)

    def deployed(self) -> nn.Module:
        """What is evaluated: the student, in its method's wrapper if it has one."""
        return self.objective.inference_model(self.student.model)

    def close(self) -> None:
        """Take the hooks off the student and the teachers."""
        for network in (self.student, *self.teachers):
            network.close()


def train(run: StageRun, batches: Batches, on_epoch: Callable[[StageRun], None]) -> None:
    """Train the stage to its end, calling ``on_epoch`` after each epoch.

    Raises:
        DivergedError: a loss term or a weight is no longer finite; ``run.history`` ends with the
            last good epoch, and nothing was handed to ``on_epoch`` since.
        DataError: an epoch has no batches.
    """
    while run.epoch < run.training.epochs:
        epoch = run.epoch + 1
        rate = run.training.optimizer.lr * run.training.schedule.factor(epoch, run.training.epochs)
        _set_rate(run.optimizer, rate)
        run.student.model.train()
        run.objective.train()
        meter = Meter(epoch)
        for batch in batches.epoch(run.first_epoch + epoch):
            task, distill = step_terms(run, batch, epoch, meter)
            run.objective.descend(task, distill, run.optimizer)
        row = meter.row()
        _check_weights(run.student.model, epoch)
        run.history.append({"epoch": epoch, "lr": rate, **row})
        run.epoch = epoch
        on_epoch(run)


def step_terms(run: StageRun, batch: Batch, epoch: int, meter: Meter) -> tuple[Terms, Terms]:
    """Run the networks on one batch and return the (label, distillation) loss terms."""
    with _precision(run.training, batch.images.device):
        student = run.student(batch.images)
        with torch.no_grad():
            teachers = tuple(teacher(batch.images) for teacher in run.teachers)
            said = run.anchor.network(batch.images) if run.anchor else None
    signals = Signals(student, teachers, batch.labels, batch.index, epoch, run.training.epochs)
    task, distill = run.objective(signals)
    if run.anchor and said:
        held, weights = run.anchor.terms(signals, said)
        distill = {**distill, **held}
        meter.add_weights(weights)
    meter.add(signals, {**task, **distill})
    return task, distill


class Meter:
    """Sums over one epoch, kept on the device so that no step waits for the host."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.started = time.perf_counter()
        self.samples = 0
        self.sums: dict[str, Tensor] = {}
        self.tcp: list[Tensor] = []

    def add(self, signals: Signals, terms: Terms) -> None:
        """Count one batch: loss terms, training accuracy, the teacher's TCP."""
        size = len(signals.labels)
        self.samples += size
        for name, value in terms.items():
            self._sum(f"loss/{name}", value.detach() * size)
        hits = signals.student.logits.detach().argmax(dim=1) == signals.labels
        self._sum("train_top1", hits.sum() * 100.0)
        # A teacher of other classes (features only) has no probability for these labels.
        if signals.teachers and signals.teacher.logits.shape == signals.student.logits.shape:
            self.tcp.append(true_class_probability(signals.teacher.logits, signals.labels))

    def add_weights(self, weights: Tensor) -> None:
        """Count the reference's sample weights ``(B,)``."""
        self._sum("reference/mean_weight", weights.detach().sum())

    def row(self) -> Row:
        """Means over the epoch.

        Raises:
            DivergedError: a loss term's mean is not finite.
            DataError: there was nothing to count.
        """
        if not self.samples:
            raise DataError(
                f"the training data gave no batches in epoch {self.epoch}",
                "pass data that give at least one batch each time",
            )
        means = {name: value.item() / self.samples for name, value in self.sums.items()}
        losses = {name: mean for name, mean in means.items() if name.startswith("loss/")}
        broken = [name.removeprefix("loss/") for name, x in losses.items() if not math.isfinite(x)]
        if broken:
            raise DivergedError(
                f"loss term {' and '.join(broken)} is no longer finite in epoch {self.epoch}",
                "lower the learning rate or the term's weight",
            )
        seconds = time.perf_counter() - self.started
        speed = {"seconds": seconds, "images_per_s": self.samples / seconds}
        return {"loss": sum(losses.values()), **means, **self._tcp_row(), **speed}

    def _tcp_row(self) -> Row:
        if not self.tcp:
            return {}
        tcp = torch.cat(self.tcp)
        quantiles = torch.quantile(tcp, torch.tensor(TCP_QUANTILES, device=tcp.device)).tolist()
        named = {f"tcp/q{q:.2f}": v for q, v in zip(TCP_QUANTILES, quantiles, strict=True)}
        return {"tcp/mean": tcp.mean().item(), **named}

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
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


def _precision(training: Training, device: torch.device) -> torch.autocast:
    enabled = training.precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
