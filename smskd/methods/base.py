"""The contract between the training loop and a distillation method.

A method is a frozen dataclass of hyper-parameters with one loss. The loop knows only this file;
``docs/methods.md`` says how the unusual methods (memory banks, two phases, several teachers, their
own optimiser, extra inference modules) fit it.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import ConfigError
from smskd.settings import STRICT
from smskd.taps import Outputs, Shapes, Taps

Terms = dict[str, Tensor]
"""Named loss terms, each a scalar that already carries its weight; their sum is the loss."""


@dataclass(frozen=True)
class Needs:
    """What a method must be given, declared so that nothing else is computed.

    Attributes:
        teacher: Whether the teacher has to be run at all.
        student_roles: Features read from the student: "maps", "preact", "pooled".
        teacher_roles: Features read from every teacher.
    """

    teacher: bool = True
    student_roles: frozenset[str] = frozenset()
    teacher_roles: frozenset[str] = frozenset()

    @classmethod
    def features(cls, *roles: str) -> Needs:
        """Need the same features of both networks."""
        return cls(True, frozenset(roles), frozenset(roles))

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.teacher or other.teacher,
            self.student_roles | other.student_roles,
            self.teacher_roles | other.teacher_roles,
        )


@dataclass(frozen=True)
class PairShapes:
    """Sizes known when a method builds its modules.

    Attributes:
        student: Tap shapes of the student.
        teachers: Tap shapes of each teacher.
        num_train: Number of training samples, for methods that keep one entry a sample.
        train_labels: Classes of all training samples ``(N,)``, for methods that draw negatives;
            None if they are not known beforehand (a loader).
        student_taps: Where the student's features are, for methods that wrap it for inference.
        teacher_models: The frozen teachers, for methods that reuse a part of one (its classifier,
            its normalisation statistics); empty where only shapes are known.
    """

    student: Shapes
    teachers: tuple[Shapes, ...] = ()
    num_train: int = 0
    train_labels: Tensor | None = None
    student_taps: Taps = field(default_factory=Taps)
    teacher_models: tuple[nn.Module, ...] = ()

    @property
    def teacher(self) -> Shapes:
        """The first (usually the only) teacher."""
        return self.teachers[0]


@dataclass(frozen=True)
class Signals:
    """Everything a method may look at for one batch.

    Attributes:
        student: What the student said, with gradients.
        teachers: What each teacher said, without gradients.
        labels: True classes ``(B,)``.
        index: Position of each sample in the training set ``(B,)``.
        epoch: Epoch within the stage, counted from 1.
        epochs: Length of the stage.
    """

    student: Outputs
    teachers: tuple[Outputs, ...]
    labels: Tensor
    index: Tensor
    epoch: int = 1
    epochs: int = 1

    @property
    def teacher(self) -> Outputs:
        """The first (usually the only) teacher."""
        return self.teachers[0]

    def with_logits(self, student: Tensor, teachers: Sequence[Tensor]) -> Signals:
        """The same signals with other logits, for modifiers."""
        return replace(
            self,
            student=replace(self.student, logits=student),
            teachers=tuple(
                replace(t, logits=z) for t, z in zip(self.teachers, teachers, strict=True)
            ),
        )


@dataclass(frozen=True)
class Method(ABC):
    """One distillation method: hyper-parameters as fields, the loss as a method.

    Attributes:
        ce_weight: Weight of the cross-entropy on the labels.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    """One of: none, response, feature, relation."""
    version: ClassVar[int] = 1
    """Raised when a change of the code changes results; part of the key of a stage run."""
    needs: ClassVar[Needs] = Needs()
    draws_random: ClassVar[bool] = False
    """Whether the loss draws from torch's generators; seeds are then not trained as one network."""
    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    ce_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_ranges(self)

    def check(self, shapes: PairShapes) -> str | None:
        """Why this method cannot work with this pair, or None."""
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """Modules of the method's own: trained with the student, new in each stage, dropped after.

        Buffers of the module are part of checkpoints, so state (a memory bank) belongs there.
        """
        return nn.Module()

    def task(self, signals: Signals) -> Terms:
        """The loss on the labels."""
        if self.ce_weight == 0.0:
            return {}
        ce = F.cross_entropy(signals.student.logits, signals.labels)
        return {"ce": self.ce_weight * ce}

    @abstractmethod
    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The loss on the teachers' signals; ``modules`` is what :meth:`build` returned."""

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer | None:
        """An optimiser of the method's own (DOT), or None for the recipe's.

        Args:
            groups: One group: "params", and the recipe's lr, momentum, weight_decay, nesterov.
        """
        return None

    def descend(self, task: Terms, distill: Terms, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step; methods that treat the two gradients differently override it."""
        optimizer.zero_grad(set_to_none=True)
        total(task, distill).backward()
        optimizer.step()

    def inference_model(self, student: nn.Module, modules: nn.Module) -> nn.Module:
        """What is evaluated and exported; methods that keep modules (SimKD) wrap the student."""
        return student


@dataclass(frozen=True)
class Modifier(ABC):
    """Changes the signals that a method's ``distill`` sees; the label loss sees the originals."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    draws_random: ClassVar[bool] = False
    """As in :class:`Method`."""
    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    def build(self, shapes: PairShapes) -> nn.Module:
        """Modules of the modifier's own (a learned temperature)."""
        return nn.Module()

    @abstractmethod
    def modify(self, signals: Signals, modules: nn.Module) -> Signals:
        """Return the signals to distil from."""


def _check_ranges(settings: Method) -> None:
    """Refuse what no method can mean: negative weights, temperatures that are not above 0."""
    for name in (entry.name for entry in fields(settings)):
        value = getattr(settings, name)
        if "temperature" in name and value <= 0:
            raise ConfigError(f"{settings.name}: {name} must be above 0, but it is {value}")
        if "weight" in name and value < 0:
            raise ConfigError(f"{settings.name}: {name} must be 0 or more, but it is {value}")


def total(*terms: Terms) -> Tensor:
    """Sum of all loss terms, a scalar."""
    return torch.stack([value for group in terms for value in group.values()]).sum()
