"""Checks of whole stages: what moves and what stays, that it repeats, resumes and learns."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smskd.contract.assertions import differing, require
from smskd.contract.cases import BATCH, PairCase, labelled_images
from smskd.contract.trial import EPOCHS, PHASES, Trial, trial
from smskd.evaluate import FixedSet, evaluate
from smskd.methods.objective import Part
from smskd.seeding import derive
from smskd.settings import Schedule
from smskd.train import Pause, StageRun, train

STAGE_EPOCHS = 5
"""Long enough that a method of two phases, with an eighth for the first, has both."""

STOPS = ((1, 0), (4, 1))
"""Where a stage is interrupted and taken up again: epochs done, and steps of the next."""

NUM = BATCH + 8

OVERFIT_STEPS = 10

RATE = 0.01
"""The recipe's 0.05 is for longer batches of larger networks."""

State = dict[str, Tensor]


@dataclass
class Record:
    """A stage that was trained to its end.

    Attributes:
        run: The stage.
        before: Parameters and buffers at its start, by network.
        after: The same at its end.
        checkpoints: What was saved at ``STOPS``.
        teachers_trained: Whether a teacher was ever found in training mode.
    """

    run: StageRun
    before: dict[str, State]
    after: dict[str, State] = field(default_factory=dict)
    checkpoints: dict[tuple[int, int], bytes] = field(default_factory=dict)
    teachers_trained: bool = False

    def due(self) -> bool:
        """See :class:`~smskd.train.Pause`: after every step."""
        return True

    def take(self, runs: Sequence[StageRun]) -> None:
        """Save where a stage is to be interrupted."""
        for run in runs:
            if (run.epoch, run.steps) in STOPS:
                self.checkpoints[run.epoch, run.steps] = saved(run)


@lru_cache(maxsize=2)
def whole_stage(part: Part, case: PairCase) -> Record:
    """Train one stage as it is by default; equal checks share it."""
    return _trained(_stage(part, case))


def _stage(part: Part, case: PairCase) -> Trial:
    return trial(part, case, epochs=STAGE_EPOCHS, num=NUM, rate=RATE)


def _trained(tried: Trial, watch: Callable[[StageRun], object] = id) -> Record:
    record = Record(tried.run, _states(tried))

    def after_epoch(run: StageRun) -> None:
        watch(run)
        record.take([run])
        for teacher in tried.teachers:
            record.teachers_trained |= any(module.training for module in teacher.modules())

    _train(tried, after_epoch, record)
    record.after = _states(tried)
    return record


def _train(
    tried: Trial, after_epoch: Callable[[StageRun], None], pause: Pause | None = None
) -> None:
    try:
        train(tried.run, tried.data, after_epoch, pause)
    finally:
        tried.run.close()


def _states(tried: Trial) -> dict[str, State]:
    models: dict[str, nn.Module] = {"student": tried.student, "objective": tried.run.objective}
    models |= {f"teacher {i}": teacher for i, teacher in enumerate(tried.teachers)}
    return {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}


def saved(run: StageRun) -> bytes:
    """A checkpoint of a stage, as it would lie on disk."""
    file = io.BytesIO()
    torch.save(run.state(), file)
    return file.getvalue()


def load(run: StageRun, checkpoint: bytes) -> None:
    """Bring a new stage to where a checkpoint was saved."""
    run.load_state(torch.load(io.BytesIO(checkpoint), weights_only=True))


def teachers_stay(part: Part, case: PairCase) -> None:
    """No weight and no statistic of a teacher moves, and none is ever in training mode."""
    record = whole_stage(part, case)
    require(not record.teachers_trained, "a teacher was put into training mode")
    for name, state in record.before.items():
        if name.startswith("teacher"):
            changed = differing(state, record.after[name])
            require(not changed, f"{name} was changed: {', '.join(changed)}")


def one_norm_update_a_step(part: Part, case: PairCase) -> None:
    """Each batch norm of the student counts each step once; a method's own, once at most."""
    record = whole_stage(part, case)
    steps = STAGE_EPOCHS * -(-NUM // BATCH)
    for name, module in record.run.student.model.named_modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            counted = int(module.num_batches_tracked)
            require(counted == steps, f"the student's {name} counted {counted} of {steps} steps")
    for name, module in record.run.objective.named_modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            counted = int(module.num_batches_tracked)
            require(counted <= steps, f"the method's {name} counted {counted} in {steps} steps")


def adapters_train(part: Part, case: PairCase) -> None:
    """All of the method's own parameters move in the course of a stage."""
    record = whole_stage(part, case)
    for name, parameter in record.run.objective.named_parameters():
        if not parameter.requires_grad:
            continue
        before, after = record.before["objective"][name], record.after["objective"][name]
        require(not torch.equal(before, after), f"the method's {name} did not move in the stage")


def repeats_exactly(part: Part, case: PairCase) -> None:
    """The same stage again ends in the same weights, to the last bit.

    Also if it is evaluated after each epoch.
    """
    once, tried = whole_stage(part, case), _stage(part, case)
    images, labels = labelled_images(BATCH, case.student.classes, seed=2)
    test = FixedSet(images, labels).to(torch.device(case.device))
    again = _trained(tried, lambda run: evaluate(run.deployed(), test))
    _require_same_end(once, again, "trained again")


def deploys(part: Part, case: PairCase) -> None:
    """What is left after the stage gives finite logits of the student's classes for any batch."""
    run = whole_stage(part, case).run
    model = run.deployed().eval()
    images = case.data(BATCH).images
    with torch.no_grad():
        logits, one = model(images), model(images[:1])
    expected = (BATCH, case.student.classes)
    require(tuple(logits.shape) == expected, f"logits {tuple(logits.shape)}, expected {expected}")
    require(bool(logits.isfinite().all()), "the logits are not finite")
    near = torch.allclose(logits[:1], one, rtol=1e-3, atol=1e-4)
    require(near, "in evaluation mode the logits of a sample depend on the others in its batch")


def resumes_exactly(part: Part, case: PairCase) -> None:
    """Interrupted, saved and taken up again, it ends in the same weights, to the last bit."""
    once = whole_stage(part, case)
    require(once.checkpoints.keys() == set(STOPS), "the stage did not come to where it is stopped")
    for (epoch, steps), checkpoint in once.checkpoints.items():
        tried = _stage(part, case)
        torch.manual_seed(derive(0, "another process"))
        load(tried.run, checkpoint)
        _require_same_end(once, _trained(tried), f"taken up {steps} steps after epoch {epoch}")


def _require_same_end(one: Record, other: Record, how: str) -> None:
    for name, state in one.after.items():
        changed = differing(state, other.after[name])
        require(not changed, f"{how}, the {name} ends with another {', '.join(changed[:5])}")
    rows = zip(_losses(one.run), _losses(other.run), strict=True)
    for epoch, (row, again) in enumerate(rows, start=1):
        require(row == again, f"{how}, epoch {epoch} has other losses: {row} and {again}")


def _losses(run: StageRun) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k.startswith("loss")} for row in run.history]


def loss_falls(part: Part, case: PairCase) -> None:
    """On one batch, over and over, the loss of each phase falls."""
    for epoch in PHASES:
        tried = trial(part, case, schedule=Schedule("constant"), rate=RATE)
        batch, losses = tried.batch(), []
        for _ in range(OVERFIT_STEPS):
            task, distill = tried.terms(batch, epoch)
            tried.run.objective.descend(task, distill, tried.run.optimizer)
            losses.append(sum(term.item() for term in (*task.values(), *distill.values())))
        first, last = sum(losses[:3]) / 3, sum(losses[-5:]) / 5
        require(
            last < first,
            f"in epoch {epoch} of {EPOCHS} the loss went from {first:.4g} to {last:.4g} "
            f"in {OVERFIT_STEPS} steps",
        )


def learns(part: Part, case: PairCase) -> None:
    """A whole stage stays finite, and loss or accuracy gets better."""
    first, *later = whole_stage(part, case).run.history
    loss = min(row["loss"] for row in later)
    accuracy = max(row["train_top1"] for row in later)
    require(
        loss < first["loss"] or accuracy > first["train_top1"],
        f"no epoch is better than the first: its loss is {first['loss']:.4g}, the lowest after "
        f"{loss:.4g}; its accuracy {first['train_top1']:.3g}, the highest after {accuracy:.3g}",
    )
