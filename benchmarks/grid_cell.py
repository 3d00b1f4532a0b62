"""One cell of the grid: a method on a pair, trained for the first and the last step of a stage.

A step is prepared and taken as the harness does it: networks in channels-last order, the training
loop's own epoch of one batch. Shapes: B batch, K classes.
"""

from __future__ import annotations

import copy
import traceback
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from smskd_bench.worker import pin_numerics, to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.images import INFO, TrainImages
from benchmarks.ours import plain_view, resident
from benchmarks.pair import SEED, Networks, Pair
from benchmarks.record import ROOT
from smskd.contract.assertions import differing, require, require_finite
from smskd.data import Batch
from smskd.errors import IncompatibleError
from smskd.meter import Meter
from smskd.methods.base import Terms, total
from smskd.methods.objective import Part
from smskd.models import build_model, taps_of
from smskd.seeding import derive
from smskd.settings import Optimizer, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network
from smskd.train import Alone, StageRun, step_terms

STATISTICS_IMAGES = 64
"""From so many come the teacher's statistics; untrained, a deep one has astronomic logits else."""

LOWER, LOWER_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2"), 0.01
"""Students that the standard recipe trains at a lower rate than the others' 0.05."""

EPOCHS = 240
PHASES = (1, EPOCHS)
"""Epochs of which one step is taken; a method of two phases is in another one in each."""

Outcome = Literal["ok", "declared", "failed"]


@dataclass(frozen=True)
class Cell:
    """What became of one method on one pair.

    Attributes:
        outcome: "declared" is a pair that the method itself says it cannot work with.
        reason: Why it is not ok.
        where: For a failure, the line of code that it came from.
    """

    outcome: Outcome
    reason: str = ""
    where: str = ""


class Bench:
    """The networks of one pair, and batches for them.

    Args:
        pair: Names of the networks.
        data: The training set.
        batch_size: B.
        device: Where to train.
    """

    def __init__(
        self, pair: Pair, data: TrainImages, batch_size: int, device: torch.device
    ) -> None:
        self.pair, self.device = pair, device
        self.batches = resident(data, batch_size, device)
        # Views as they are trained on: a deep network of whole noise images alone takes the black
        # border of a shifted one for something enormous.
        settling = next(resident(data, STATISTICS_IMAGES, device).epoch(EPOCHS))
        self._networks = Networks(pair, INFO.num_classes, settling.images.cpu())
        self.teacher = to_device(self._networks.teacher(), str(device))
        self._settled = copy.deepcopy(self.teacher.state_dict())

    def cell(self, part: Part) -> Cell:
        """Take the steps with one method; whatever happens is what the cell says."""
        try:
            return self._tried(part)
        except Exception as error:
            where = _innermost(error)
            self.teacher.load_state_dict(self._settled)  # so that others do not suffer from it
            self.teacher.zero_grad()
            return Cell("failed", f"{type(error).__name__}: {_first_line(error)}", where)

    def _tried(self, part: Part) -> Cell:
        pin_numerics()
        student = to_device(self._networks.student(SEED), str(self.device))
        try:
            run = self._prepared(part, student)
        except IncompatibleError as error:
            return Cell("declared", _first_line(error).partition(" pair: ")[2] or str(error))
        torch.manual_seed(derive(SEED, "train"))
        with closing(run):
            batches = list(islice(self.batches.epoch(1), len(PHASES)))
            reached = [train_one(run, b, e) for b, e in zip(batches, PHASES, strict=True)]
            none = part.method.kind == "none"
            require(none or any(reached), "distillation has no gradient to the student")
            check_statistics(run)
            check_deployed(run, batches[0])
        self._check_teacher()
        return Cell("ok")

    def _prepared(self, part: Part, student: nn.Module) -> StageRun:
        return prepare(
            Network(student, taps_of(self.pair.student)),
            [Network(self.teacher, taps_of(self.pair.teacher))],
            Stage(part, EPOCHS),
            Training(
                EPOCHS,
                Optimizer(lr=LOWER_RATE if self.pair.student in LOWER else Optimizer().lr),
                batch_size=self.batches.batch_size,
            ),
            plain_view(self.batches, torch.zeros(1, dtype=torch.int64, device=self.device)),
            seed=SEED,
            num_train=self.batches.num_samples,
            train_labels=self.batches.labels,
            new_student=self._new_student,
        )

    def _new_student(self) -> nn.Module:
        model = build_model(self.pair.student, INFO.num_classes, INFO.channels, INFO.size)
        return to_device(model, str(self.device))

    def _check_teacher(self) -> None:
        changed = differing(self._settled, self.teacher.state_dict())
        require(not changed, f"the teacher was changed: {', '.join(changed[:3])}")
        require(not any(m.training for m in self.teacher.modules()), "the teacher is training")
        touched = any(p.grad is not None for p in self.teacher.parameters())
        require(not touched, "the teacher has a gradient")


def train_one(run: StageRun, batch: Batch, epoch: int) -> bool:
    """Train an epoch of one batch; whether distillation had a gradient to the student.

    Raises:
        AssertionError: a term or a gradient is not finite, or the student has none.
        DivergedError: a weight is not finite after the step.
    """
    run.epoch = epoch - 1
    rate = run.training.optimizer.lr * run.training.schedule.factor(epoch, EPOCHS)
    Alone(run).begin(rate)
    meter = Meter(epoch)
    # The step of Alone, in two parts, to look at the terms between them.
    task, distill = step_terms(run, batch, epoch, meter)
    require_finite(task, distill, ())
    reached = reaches(distill, run.student.model)
    run.objective.descend(task, distill, run.optimizer)
    parameters = [*run.student.model.parameters(), *run.objective.parameters()]
    require_finite(task, distill, parameters)
    # A method that takes its own steps need not leave its gradients behind.
    trained = reached or any(_moves(p.grad) for p in run.student.model.parameters())
    require(trained, f"no gradient reaches the student in epoch {epoch} of {EPOCHS}")
    run.end_epoch(rate, meter)
    return reached


def reaches(distill: Terms, student: nn.Module) -> bool:
    """Whether distillation alone has a gradient to the student; its graph is kept.

    Raises:
        AssertionError: the gradient is not finite.
    """
    if not distill or not total(distill).requires_grad:
        return False
    parameters = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(total(distill), parameters, retain_graph=True, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    require(finite, "the gradients of distillation are not finite")
    return any(map(_moves, gradients))


def check_statistics(run: StageRun) -> None:
    """Each batch norm of the student counted each step once."""
    for name, module in run.student.model.named_modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            counted = int(module.num_batches_tracked)
            require(
                counted == len(PHASES),
                f"the student's {name} counted {counted} of {len(PHASES)} steps",
            )


def check_deployed(run: StageRun, batch: Batch) -> None:
    """What is evaluated after the stage gives finite logits ``(B, K)``."""
    with torch.no_grad():
        logits = run.deployed().eval()(batch.images)
    expected = (len(batch.labels), INFO.num_classes)
    require(tuple(logits.shape) == expected, f"logits {tuple(logits.shape)}, expected {expected}")
    require(bool(logits.isfinite().all()), "the logits after the stage are not finite")


def _moves(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().max() > 0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _innermost(error: Exception) -> str:
    """Where in this project an error came from, as ``file:line``."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT) and frame.name != require.__name__
    ]  # fmt: skip
    return f"{Path(frames[-1].filename).relative_to(ROOT).as_posix()}:{frames[-1].lineno}"
