"""Stages: prepare one, train it, say how it went; and :func:`distill`, which runs several in a row.

The harness and the library call go through the same three steps, so that what one does the other
does too. Shapes: N samples, C channels, H and W height and width.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smskd.data import Batch, Batches, LoaderBatches, ResidentBatches
from smskd.errors import ConfigError, DataError, IncompatibleError
from smskd.evaluate import Agreement, Evaluation, FixedSet, agreement, evaluate
from smskd.frozen import Live
from smskd.fused import fused
from smskd.meter import Row
from smskd.methods.base import Method, Needs, PairShapes
from smskd.methods.objective import Objective, Part, why_no_reference
from smskd.output_table import OutputTable, TableSettings, drawn, looked_up
from smskd.precision import check_precision
from smskd.reference import Anchor, anchor_roles
from smskd.seeding import derive, seeded
from smskd.settings import (
    LATER_STAGES,
    Carry,
    Init,
    Optimizer,
    Precision,
    Reference,
    Schedule,
    Training,
)
from smskd.taps import POOLED, Network, Shapes, TappedModel, Taps, probe
from smskd.train import StageRun, train


@dataclass(frozen=True)
class Stage:
    """One stage of a sequence.

    Attributes:
        method: A method, or several that are trained jointly (their losses are summed).
        epochs: Length of the stage.
        reference: How the previous stage's student holds this one; no effect in the first stage.
        schedule: Learning rate; None means the recipe's: from the base rate in the first stage,
            from a tenth of it in later ones.
        method_weight: lambda_kd, scales the distillation terms.
        ce_weight: lambda_c, replaces the method's own weight of the cross-entropy.
        init: "warm" continues from the previous stage; "reinit" goes back to the weights that the
            student had before the first stage.
        carry: Which weights the stage hands on.
    """

    method: Method | Part | Sequence[Method | Part]
    epochs: int
    reference: Reference | None = field(default_factory=Reference)
    schedule: Schedule | None = None
    method_weight: float = 1.0
    ce_weight: float | None = None
    init: Init = "warm"
    carry: Carry = "last"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The methods with their modifiers."""
        given = self.method if isinstance(self.method, Sequence) else [self.method]
        return tuple(m if isinstance(m, Part) else Part(m) for m in given)


@dataclass(frozen=True)
class StageReport:
    """How a stage went.

    Attributes:
        history: One row an epoch.
        test: Last-epoch (or carried) accuracy on the test set; None without one.
        kept: Agreement with the previous stage's student on the test set, whether it was the
            reference or not; None in the first stage or without a test set.
    """

    history: list[Row]
    test: Evaluation | None = None
    kept: Agreement | None = None


def prepare(
    student: Network,
    teachers: Sequence[Network],
    stage: Stage,
    training: Training,
    image: Tensor,
    *,
    previous: nn.Module | None = None,
    number: int = 1,
    first_epoch: int = 0,
    seed: int = 0,
    num_train: int = 0,
    train_labels: Tensor | None = None,
    new_student: Callable[[], nn.Module] | None = None,
) -> StageRun:
    """Build everything one stage needs.

    Args:
        student: Holds the weights the stage starts from.
        teachers: Frozen here if the stage needs them.
        stage: Method and reference.
        training: Settings.
        image: One network-ready image ``(1, C, H, W)`` on the device, to find feature sizes.
        previous: The student of the previous stage, to be the reference; None in stage 1.
        number: Position of the stage, from 1; adapters of different stages start differently.
        first_epoch: Epochs trained in earlier stages.
        seed: Decides the adapters' initial weights.
        num_train: Number of training samples.
        train_labels: Their classes ``(N,)``, if known beforehand.
        new_student: Builds another untrained student, for methods with peers; None copies this one
            and draws its weights anew.

    Raises:
        ConfigError: there is no teacher though one is needed, or a feature has no tap.
        IncompatibleError: the method or the reference cannot work with this pair.
    """
    check_precision(training.precision, image.device)
    reference = _active_reference(stage, previous is not None)
    needs = stage_needs(stage, reference)
    objective = build_objective(
        student, teachers, stage, reference, image, number, seed, num_train, train_labels,
        new_student, training.batch_size,
    )  # fmt: skip
    anchor = None
    if previous is not None and reference is not None:
        anchor = Anchor.freeze(previous, student.taps, reference, image)
    return StageRun(
        student=TappedModel(student.model, student.taps, needs.student_roles),
        teachers=[
            _frozen(t, needs.teacher_roles, image) for t in (teachers if needs.teacher else ())
        ],
        anchor=anchor,
        objective=objective,
        optimizer=_make_optimizer(student.model, objective, training.optimizer),
        training=training,
        first_epoch=first_epoch,
        taught_by=tuple(teachers) if needs.teacher else (),
    )


def build_objective(
    student: Network,
    teachers: Sequence[Network],
    stage: Stage,
    reference: Reference | None,
    image: Tensor,
    number: int = 1,
    seed: int = 0,
    num_train: int = 0,
    train_labels: Tensor | None = None,
    new_student: Callable[[], nn.Module] | None = None,
    batch_size: int = 0,
) -> Objective:
    """Find the sizes of the networks' features and build the loss; arguments as in `prepare`.

    Raises:
        ConfigError: there is no teacher though one is needed, or a feature has no tap.
        IncompatibleError: the method or the reference cannot work with this pair.
    """
    needs = stage_needs(stage, reference)
    if needs.teacher and not teachers:
        raise ConfigError(
            f"stage {number} needs a teacher",
            "pass one, or use the method 'scratch' and constant reference weights",
        )
    teachers = teachers if needs.teacher else ()
    shapes = PairShapes(
        student=_probe("student", student, needs.student_roles, image),
        teachers=tuple(_probe("teacher", t, needs.teacher_roles, image) for t in teachers),
        num_train=num_train,
        train_labels=train_labels,
        student_taps=student.taps,
        teacher_networks=tuple(teachers),
        new_student=new_student or partial(untrained_copy, student.model),
        batch_size=batch_size,
        image=tuple(image.shape[1:]),
    )
    classes = shapes.student.num_classes
    if reference and reference.needs_teacher and shapes.teacher.num_classes != classes:
        raise IncompatibleError(
            f"reference weights {reference.weighting.map!r} need a teacher of the student's "
            f"{classes} classes, but it has {shapes.teacher.num_classes}",
            "set the weight map to 'constant'",
        )
    with seeded(derive(seed, "adapters", number)):
        objective = Objective(stage.parts, shapes, stage.method_weight, stage.ce_weight)
    return objective.to(image.device)


def untrained_copy(model: nn.Module) -> nn.Module:
    """Another network of the same form; its layers draw their weights as torch's layers do.

    Raises:
        ConfigError: a layer with weights cannot draw new ones.
    """
    copied = copy.deepcopy(model).train().requires_grad_(True)
    for module in copied.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ConfigError(
                f"a {type(module).__name__} cannot draw new weights, which a peer needs",
                "pass new_student=..., which builds an untrained student",
            )
    return copied


def stage_needs(stage: Stage, reference: Reference | None) -> Needs:
    """What the methods of a stage and its reference need together."""
    needs = Needs(teacher=reference is not None and reference.needs_teacher)
    for part in stage.parts:
        needs |= part.needs
    roles = anchor_roles(reference) if reference else frozenset()
    return replace(needs, student_roles=needs.student_roles | roles)


def finish(
    run: StageRun, test: FixedSet | None, previous: nn.Module | None = None
) -> tuple[nn.Module, StageReport]:
    """Take the hooks off, evaluate on the test set, and compare with the previous student.

    The student is left in evaluation mode. The comparison is made without a reference too: it is
    what tells how much a reference holds.
    """
    run.close()
    run.student.model.eval()
    model = run.deployed()
    if test is None:
        return model, StageReport(run.history)
    result = evaluate(model, test)
    if previous is None:
        return model, StageReport(run.history, result)
    before = evaluate(previous, test)
    kept = agreement(result.predictions, before.predictions, test.labels)
    return model, StageReport(run.history, result, kept)


class BestOnDev:
    """Remembers the weights that did best on the development split; ties keep the earlier."""

    def __init__(self, dev: FixedSet) -> None:
        self.dev = dev
        self.top1 = -1.0
        self.epoch = 0
        self.weights: dict[str, dict[str, Tensor]] = {}

    def observe(self, run: StageRun) -> None:
        """Evaluate after an epoch and add ``dev_top1`` to its row."""
        top1 = evaluate(run.deployed(), self.dev).top1
        run.history[-1]["dev_top1"] = top1
        if top1 > self.top1:
            self.top1, self.epoch = top1, run.epoch
            student, objective = run.student.model.state_dict(), run.objective.state_dict()
            self.weights = copy.deepcopy({"student": student, "objective": objective})

    def restore(self, run: StageRun) -> None:
        """Put the best weights into the student and the method's modules."""
        run.student.model.load_state_dict(self.weights["student"])
        run.objective.load_state_dict(self.weights["objective"])


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    stages: Sequence[Stage],
    data: Batches | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, ...]],
    *,
    student_taps: Taps | None = None,
    teacher_taps: Taps | Sequence[Taps] | None = None,
    test: FixedSet | tuple[Tensor, Tensor] | None = None,
    dev: FixedSet | tuple[Tensor, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    seed: int = 0,
    tables: Path | None = None,
    on_epoch: Callable[[StageRun], None] | None = None,
    new_student: Callable[[], nn.Module] | None = None,
) -> list[StageReport]:
    """Train ``student`` in place through ``stages`` and report on each.

    Everything that can be refused is refused before the first stage. The student is left in
    evaluation mode, the teacher frozen and in evaluation mode.

    Args:
        student: Any network, images in and logits ``(B, K)`` out; on the device to train on.
        teacher: Any network, or several; may be None if no stage needs one. They are frozen.
        stages: In order; each starts where the one before ended, which is also its reference.
        data: ``(images, labels)`` tensors, a ``DataLoader``-like iterable, or a ``Batches``.
        student_taps: Where the student's features are, by module name.
        teacher_taps: Where the teacher's features are; one for each if there are several.
        test: Evaluated once, at the end of each stage.
        dev: Evaluated each epoch; needed by ``carry="best_on_dev"``.
        optimizer: SGD settings; the learning rate is the base that schedules scale.
        batch_size: Used when ``data`` are tensors.
        precision: Arithmetic of the networks (:mod:`smskd.precision`).
        seed: Decides order and views (if ``data`` are tensors) and the adapters' initial weights.
        tables: Folder in which the teacher's outputs are kept and looked up
            (:mod:`smskd.output_table`); None runs the teacher in every step.
        on_epoch: Called after each epoch.
        new_student: Builds another untrained student, for methods with peers; None copies the
            student and draws its weights anew.

    Raises:
        ConfigError: the stages ask for something that was not given.
        DivergedError: a loss term is no longer finite.
    """
    device = next(student.parameters()).device
    batches = _as_batches(data, device, batch_size, seed)
    test_set, dev_set = _as_fixed(test, device), _as_fixed(dev, device)
    network = Network(student, student_taps or Taps())
    teachers = _as_teachers(student, teacher, teacher_taps, device)
    first = _first_batch(batches)
    image = first.images[:1]
    plan = [_training(s, n, optimizer, batch_size, precision) for n, s in enumerate(stages, 1)]
    _check_stages(network, teachers, stages, first, dev_set, batches, new_student)
    fresh = copy.deepcopy(student.state_dict())
    reports: list[StageReport] = []
    first_epoch = 0
    for number, (stage, training) in enumerate(zip(stages, plan, strict=True), start=1):
        previous = copy.deepcopy(student) if number > 1 else None
        if stage.init == "reinit":
            student.load_state_dict(fresh)
        run = prepare(
            network, teachers, stage, training, image, previous=previous, number=number,
            first_epoch=first_epoch, seed=seed, num_train=batches.num_samples,
            train_labels=getattr(batches, "labels", None), new_student=new_student,
        )  # fmt: skip
        best = BestOnDev(dev_set) if dev_set is not None else None
        with closing(run):
            if tables is not None:
                _look_up_teachers(run, batches, tables)
            train(run, batches, _observers(best, on_epoch))
        if best and stage.carry == "best_on_dev":
            best.restore(run)
        reports.append(finish(run, test_set, previous)[1])
        first_epoch += stage.epochs
    return reports


def _look_up_teachers(run: StageRun, batches: Batches, tables: Path) -> None:
    if not isinstance(batches, ResidentBatches):
        raise ConfigError(
            "tables need training data that know which view of an image they show",
            "pass ResidentBatches, or leave tables out",
        )
    first, last = run.first_epoch + 1, run.first_epoch + run.training.epochs

    def table_of(live: Live) -> OutputTable:
        network, precision = live.network, run.training.precision
        settings = TableSettings(precision=precision, pooled=POOLED in network.roles)
        return OutputTable(tables, Network(network.model, network.taps), batches, settings)

    def wanted() -> NDArray[np.bool_]:
        return drawn(batches, range(first, last + 1))

    run.teachers = [looked_up(t, table_of, wanted, warnings.warn) for t in run.teachers]


def _check_stages(
    student: Network,
    teachers: Sequence[Network],
    stages: Sequence[Stage],
    first: Batch,
    dev: FixedSet | None,
    batches: Batches,
    new_student: Callable[[], nn.Module] | None,
) -> None:
    """Refuse now what a later stage would otherwise refuse after hours of training."""
    if not stages:
        raise ConfigError("there are no stages", "give at least one Stage")
    for number, stage in enumerate(stages, start=1):
        if stage.epochs < 1:
            raise ConfigError(f"stage {number} has {stage.epochs} epochs", "give at least 1")
        if stage.carry == "best_on_dev" and dev is None:
            raise ConfigError("carry='best_on_dev' needs a development set", "pass dev=...")
        reference = _active_reference(stage, number > 1)
        before = [part.method for part in stages[number - 2].parts] if number > 1 else []
        if number > 1 and (reason := why_no_reference(before, reference)) is not None:
            raise IncompatibleError(f"stage {number}: {reason}", "give it reference=None")
        objective = build_objective(
            student, teachers, stage, reference, first.images[:1], number,
            num_train=batches.num_samples, train_labels=getattr(batches, "labels", None),
            new_student=new_student, batch_size=len(first.labels),
        )  # fmt: skip
        if objective.needs.index and bool((first.index < 0).any()):
            raise DataError(
                f"stage {number} keeps an entry for each training sample, but the data do not say "
                "which samples a batch holds",
                "pass tensors, or a loader that gives (images, labels, index)",
            )


def _active_reference(stage: Stage, has_previous: bool) -> Reference | None:
    reference = stage.reference
    return reference if has_previous and reference and reference.weight > 0.0 else None


def _probe(who: str, network: Network, roles: frozenset[str], image: Tensor) -> Shapes:
    try:
        return probe(network.model, network.taps, roles, image)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error.message}", error.hint) from error


def _training(
    stage: Stage, number: int, optimizer: Optimizer | None, batch_size: int, precision: Precision
) -> Training:
    schedule = stage.schedule or (Schedule() if number == 1 else LATER_STAGES)
    return Training(
        epochs=stage.epochs,
        optimizer=optimizer or Optimizer(),
        schedule=schedule,
        batch_size=batch_size,
        precision=precision,
        carry=stage.carry,
        init=stage.init,
    )


def _make_optimizer(
    student: nn.Module, objective: Objective, settings: Optimizer
) -> torch.optim.Optimizer:
    parameters = [*student.parameters(), *objective.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    # A method's own optimiser reads the recipe from the group, as it must not bring another one.
    group: dict[str, object] = {
        "params": trained,
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "nesterov": settings.nesterov,
    }
    return objective.make_optimizer([group]) or _fused_sgd(group, trained)


def _fused_sgd(group: dict[str, object], trained: list[nn.Parameter]) -> torch.optim.SGD:
    """SGD in one kernel; every momentum starts at 0, which the first step leaves as its gradient.

    Left to itself, torch's fused SGD cannot take a step in which some parameters have their first
    gradient and others do not: methods of two phases have such steps.
    """
    optimizer = torch.optim.SGD([group], fused=True)
    if group["momentum"]:
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _frozen(network: Network, roles: frozenset[str], image: Tensor) -> Live:
    network.model.eval().requires_grad_(False)
    faster = fused(network, roles, image)
    return Live(TappedModel(faster.model, faster.taps, roles), network.model)


def _observers(
    best: BestOnDev | None, on_epoch: Callable[[StageRun], None] | None
) -> Callable[[StageRun], None]:
    watching: list[Callable[[StageRun], None]] = [best.observe] if best else []
    watching += [on_epoch] if on_epoch else []

    def call_all(run: StageRun) -> None:
        for watch in watching:
            watch(run)

    return call_all


def _as_batches(
    data: Batches | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, ...]],
    device: torch.device,
    batch_size: int,
    seed: int,
) -> Batches:
    if isinstance(data, tuple):
        images, labels = data
        return ResidentBatches(images.to(device), labels.to(device), batch_size, seed)
    if hasattr(data, "epoch"):
        return data  # type: ignore[return-value]
    return LoaderBatches(data, device)


def _as_fixed(
    data: FixedSet | tuple[Tensor, Tensor] | None, device: torch.device
) -> FixedSet | None:
    if data is None:
        return None
    return (data if isinstance(data, FixedSet) else FixedSet(*data)).to(device)


def _as_teachers(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    taps: Taps | Sequence[Taps] | None,
    device: torch.device,
) -> list[Network]:
    models = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else teacher
    places = [taps or Taps()] * len(models) if isinstance(taps, Taps | None) else taps
    if len(places) != len(models):
        raise ConfigError(
            f"{len(models)} teachers but taps for {len(places)}", "give one Taps for each teacher"
        )
    if any(model is student for model in models):
        raise ConfigError(
            "student and teacher are the same object, which cannot be both trained and frozen",
            "pass copy.deepcopy(student) as the teacher",
        )
    return [Network(model.to(device), at) for model, at in zip(models, places, strict=True)]


def _first_batch(batches: Batches) -> Batch:
    for batch in batches.epoch(1):
        return batch
    raise DataError("the training data give no batches", "give at least one batch")
