"""Stages: prepare one, train it, say how it went; and :func:`distill`, which runs several in a row.

The harness and the library call go through the same three steps, so that what one does the other
does too. Shapes: N samples, C channels, H and W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from smskd.data import Batches, LoaderBatches, ResidentBatches
from smskd.errors import ConfigError
from smskd.evaluate import Agreement, Evaluation, FixedSet, agreement, evaluate
from smskd.methods.base import Method, Needs, PairShapes
from smskd.methods.objective import Objective, Part
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
from smskd.taps import TappedModel, Taps, probe
from smskd.train import Row, StageRun, train


@dataclass(frozen=True)
class Network:
    """A model with the places of its features."""

    model: nn.Module
    taps: Taps = field(default_factory=Taps)


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
        init: "warm" continues from the previous stage, "reinit" starts from fresh weights.
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
        kept: Agreement with the reference on the test set; None in the first stage.
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

    Raises:
        IncompatibleError: the method cannot work with this pair.
    """
    reference = stage.reference if previous is not None else None
    reference = reference if reference and reference.weight > 0.0 else None
    anchor = Anchor.freeze(previous, student.taps, reference) if previous and reference else None
    needs = stage_needs(stage, anchor)
    if needs.teacher and not teachers:
        raise ConfigError("this stage needs a teacher", "pass one, or use the method 'scratch'")
    teachers = teachers if needs.teacher else ()
    shapes = PairShapes(
        student=probe(student.model, student.taps, needs.student_roles, image),
        teachers=tuple(probe(t.model, t.taps, needs.teacher_roles, image) for t in teachers),
        num_train=num_train,
    )
    with seeded(derive(seed, "adapters", number)):
        objective = Objective(stage.parts, shapes, stage.method_weight, stage.ce_weight)
    objective = objective.to(image.device)
    return StageRun(
        student=TappedModel(student.model, student.taps, needs.student_roles),
        teachers=[_frozen(t, needs.teacher_roles) for t in teachers],
        anchor=anchor,
        objective=objective,
        optimizer=_make_optimizer(student.model, objective, training.optimizer),
        training=training,
        first_epoch=first_epoch,
    )


def stage_needs(stage: Stage, anchor: Anchor | None) -> Needs:
    """What the methods of a stage and its reference need together."""
    needs = Needs(teacher=bool(anchor and anchor.needs_teacher))
    for part in stage.parts:
        needs |= part.method.needs
    roles = anchor_roles(anchor.settings) if anchor else frozenset()
    return replace(needs, student_roles=needs.student_roles | roles)


def finish(run: StageRun, test: FixedSet | None) -> tuple[nn.Module, StageReport]:
    """Take the hooks off, evaluate on the test set, and compare with the reference."""
    run.student.close()
    for teacher in run.teachers:
        teacher.close()
    model = run.objective.inference_model(run.student.model)
    if test is None:
        return model, StageReport(run.history)
    result = evaluate(model, test)
    if run.anchor is None:
        return model, StageReport(run.history, result)
    before = evaluate(run.anchor.network.model, test)
    kept = agreement(result.predictions, before.predictions, test.labels)
    return model, StageReport(run.history, result, kept)


class BestOnDev:
    """Remembers the weights that did best on the development split; ties keep the earlier."""

    def __init__(self, dev: FixedSet) -> None:
        self.dev = dev
        self.top1 = -1.0
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def observe(self, run: StageRun) -> None:
        """Evaluate after an epoch and add ``dev_top1`` to its row."""
        top1 = evaluate(run.student.model, self.dev).top1
        run.history[-1]["dev_top1"] = top1
        if top1 > self.top1:
            self.top1, self.epoch = top1, run.epoch
            self.weights = copy.deepcopy(run.student.model.state_dict())

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into ``model``."""
        model.load_state_dict(self.weights)


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    stages: Sequence[Stage],
    data: Batches | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, ...]],
    *,
    student_taps: Taps | None = None,
    teacher_taps: Taps | None = None,
    test: FixedSet | tuple[Tensor, Tensor] | None = None,
    dev: FixedSet | tuple[Tensor, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    seed: int = 0,
    on_epoch: Callable[[StageRun], None] | None = None,
) -> list[StageReport]:
    """Train ``student`` in place through ``stages`` and report on each.

    Args:
        student: Any network, images in and logits ``(B, K)`` out; on the device to train on.
        teacher: Any network; may be None if no stage needs one. It is frozen.
        stages: In order; each starts where the one before ended, which is also its reference.
        data: ``(images, labels)`` tensors, a ``DataLoader``-like iterable, or a ``Batches``.
        student_taps: Where the student's features are, by module name.
        teacher_taps: Where the teacher's features are.
        test: Evaluated once, at the end of each stage.
        dev: Evaluated each epoch; needed by ``carry="best_on_dev"``.
        optimizer: SGD settings; the learning rate is the base that schedules scale.
        batch_size: Used when ``data`` are tensors.
        precision: "bf16" runs the networks under autocast.
        seed: Decides order, and the initial weights of adapters and of ``init="reinit"``.
        on_epoch: Called after each epoch.

    Raises:
        ConfigError: the stages ask for something that was not given.
        DivergedError: a loss term is no longer finite.
    """
    device = next(student.parameters()).device
    batches = _as_batches(data, device, batch_size, seed)
    fresh = copy.deepcopy(student)
    network = Network(student, student_taps or Taps())
    teachers = [Network(teacher.to(device), teacher_taps or Taps())] if teacher else []
    image = next(iter(batches.epoch(1))).images[:1]
    reports: list[StageReport] = []
    first_epoch = 0
    for number, stage in enumerate(stages, start=1):
        previous = copy.deepcopy(student) if number > 1 else None
        if stage.init == "reinit" and previous is not None:
            student.load_state_dict(fresh.state_dict())
        run = prepare(
            network, teachers, stage, _training(stage, number, optimizer, batch_size, precision),
            image, previous=previous, number=number, first_epoch=first_epoch, seed=seed,
            num_train=batches.num_samples,
        )  # fmt: skip
        best = BestOnDev(_as_fixed(dev)) if dev is not None else None
        if stage.carry == "best_on_dev" and best is None:
            raise ConfigError("carry='best_on_dev' needs a development set", "pass dev=...")
        train(run, batches, _observers(best, on_epoch))
        if best and stage.carry == "best_on_dev":
            best.restore(student)
        reports.append(finish(run, _as_fixed(test) if test is not None else None)[1])
        first_epoch += stage.epochs
    return reports


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
    groups: list[dict[str, object]] = [{"params": trained}]
    return objective.make_optimizer(groups) or torch.optim.SGD(
        trained,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=True,
    )


def _frozen(network: Network, roles: frozenset[str]) -> TappedModel:
    network.model.eval().requires_grad_(False)
    return TappedModel(network.model, network.taps, roles)


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


def _as_fixed(data: FixedSet | tuple[Tensor, Tensor]) -> FixedSet:
    return data if isinstance(data, FixedSet) else FixedSet(*data)
