"""The contract between the training loop and a distillation method.

A method is a frozen dataclass of hyper-parameters with one loss. The loop knows only this file;
``docs/methods.md`` says how the unusual methods (memory banks, two phases, several teachers, other
views, their own optimiser, extra inference modules) fit it.

Shapes: B batch, K classes, C channels, H and W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smskd.errors import ConfigError
from smskd.settings import STRICT, check_choices
from smskd.taps import Network, Outputs, Shapes, Taps

Terms = dict[str, Tensor]
"""Named loss terms, each a scalar that already carries its weight; their sum is the loss."""

KINDS = ("none", "response", "feature", "relation", "self", "online")
"""What a method learns from: labels only, logits, features, relations, itself, its peers."""


@dataclass(frozen=True)
class Needs:
    """What a method must be given, declared so that nothing else is computed.

    Attributes:
        teacher: Whether the teacher has to be run at all.
        student_roles: What is asked of the student: features ("maps", "preact", "pooled",
            "spatial"), or a module ("classifier", "network") in ``Signals.networks``.
        teacher_roles: The same, of every teacher.
        index: Whether the positions of samples in the training set are read.
    """

    teacher: bool = True
    student_roles: frozenset[str] = frozenset()
    teacher_roles: frozenset[str] = frozenset()
    index: bool = False

    @classmethod
    def features(cls, *roles: str) -> Needs:
        """Need the same of both networks."""
        return cls(True, frozenset(roles), frozenset(roles))

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.teacher or other.teacher,
            self.student_roles | other.student_roles,
            self.teacher_roles | other.teacher_roles,
            self.index or other.index,
        )


@dataclass(frozen=True)
class PairShapes:
    """What is known when a method builds its modules.

    Attributes:
        student: Tap shapes of the student.
        teachers: Tap shapes of each teacher.
        num_train: Number of training samples, for methods that keep one entry a sample.
        train_labels: Classes of all training samples ``(N,)``, for methods that draw negatives;
            None if they are not known beforehand (a loader).
        student_taps: Where the student's features are, for methods that wrap it for inference.
        teacher_networks: The frozen teachers, for methods that reuse a part of one (its classifier,
            its normalisation statistics); empty where only shapes are known.
        new_student: Builds another untrained student, its weights drawn from torch's global
            generator, for peers; None where only shapes are known.
        batch_size: Samples a step, 0 if unknown; an epoch's last batch may be smaller.
        image: ``(C, H, W)`` of an image, empty if unknown.
    """

    student: Shapes
    teachers: tuple[Shapes, ...] = ()
    num_train: int = 0
    train_labels: Tensor | None = None
    student_taps: Taps = field(default_factory=Taps)
    teacher_networks: tuple[Network, ...] = ()
    new_student: Callable[[], nn.Module] | None = None
    batch_size: int = 0
    image: tuple[int, ...] = ()

    @property
    def teacher(self) -> Shapes:
        """The first (usually the only) teacher."""
        return self.teachers[0]


@dataclass(frozen=True)
class Networks:
    """The networks of a step themselves, for methods that ask for the role of a module.

    Attributes:
        images: What the student was shown, ``(B, C, H, W)``.
        student: Runs the student on other images, with gradients. Its batch norms normalise by the
            batch as in training, but only the loop's own pass moves their running statistics.
        teachers: Runs each teacher on other images, without gradients.
        student_classifier: The student's last linear layer, trained; None unless asked for.
        teacher_classifiers: Those of the teachers, frozen; empty unless asked for.
    """

    images: Tensor
    student: Callable[[Tensor], Outputs]
    teachers: tuple[Callable[[Tensor], Outputs], ...] = ()
    student_classifier: nn.Linear | None = None
    teacher_classifiers: tuple[nn.Linear, ...] = ()


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
        networks: The networks themselves; None unless a module's role is asked for.
        weights: Factor on each sample's distillation loss ``(B,)``, set by modifiers; None is 1.
    """

    student: Outputs
    teachers: tuple[Outputs, ...]
    labels: Tensor
    index: Tensor
    epoch: int = 1
    epochs: int = 1
    networks: Networks | None = None
    weights: Tensor | None = None

    @property
    def teacher(self) -> Outputs:
        """The first (usually the only) teacher."""
        return self.teachers[0]

    def mean(self, losses: Tensor) -> Tensor:
        """Mean of the samples' losses ``(B,)``, each times its weight."""
        return losses.mean() if self.weights is None else (self.weights * losses).mean()

    def with_logits(self, student: Tensor, teachers: Sequence[Tensor]) -> Signals:
        """The same signals with other logits, for modifiers."""
        return replace(
            self,
            student=replace(self.student, logits=student),
            teachers=tuple(
                replace(t, logits=z) for t, z in zip(self.teachers, teachers, strict=True)
            ),
        )


class Component(ABC):
    """What methods and modifiers have in common."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when a change of the code changes results; part of the key of a stage run."""
    draws_random: ClassVar[bool] = False
    """Whether the loss draws from torch's generators; seeds are then not trained as one network."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Checks of :mod:`smskd.contract` that cannot hold, by name, each with its reason."""
    silent: ClassVar[frozenset[str]] = frozenset()
    """Settings that :mod:`smskd.contract` cannot see working on its small pairs (a large cap)."""
    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    def __post_init__(self) -> None:
        check_choices(self)
        _check_ranges(self)

    def check(self, shapes: PairShapes) -> str | None:
        """Why this cannot work with this pair, or None."""
        return None

    def build(self, shapes: PairShapes) -> nn.Module:
        """Modules of its own: trained with the student, new in each stage, dropped after.

        Buffers of the module are part of checkpoints, so state (a memory bank) belongs there.
        """
        return nn.Module()

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer | None:
        """An optimiser of its own (DOT), or None for the recipe's.

        Args:
            groups: One group: "params", and the recipe's lr, momentum, weight_decay, nesterov.
        """
        return None

    def descend(self, task: Terms, distill: Terms, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step; who treats the two gradients differently overrides it."""
        optimizer.zero_grad(set_to_none=True)
        total(task, distill).backward()
        optimizer.step()


@dataclass(frozen=True)
class Method(Component):
    """One distillation method: hyper-parameters as fields, the loss as a method.

    Attributes:
        ce_weight: Weight of the cross-entropy on the labels.
    """

    kind: ClassVar[str]
    """One of :data:`KINDS`."""
    paper: ClassVar[str] = ""
    """Short name of the paper, e.g. ``Hinton 2015, arXiv 1503.02531``."""
    needs: ClassVar[Needs] = Needs()
    trains_classifier: ClassVar[bool] = True
    """Whether the student's own logits learn; SimKD's do not, so they can hold no later stage."""

    ce_weight: float = 1.0

    def task(self, signals: Signals) -> Terms:
        """The loss on the labels."""
        if self.ce_weight == 0.0:
            return {}
        ce = F.cross_entropy(signals.student.logits, signals.labels)
        return {"ce": self.ce_weight * ce}

    @abstractmethod
    def distill(self, signals: Signals, modules: nn.Module) -> Terms:
        """The loss on the teachers' signals; ``modules`` is what :meth:`build` returned."""

    def inference_model(self, student: nn.Module, modules: nn.Module) -> nn.Module:
        """What is evaluated and exported; methods that keep modules (SimKD) wrap the student."""
        return student


@dataclass(frozen=True)
class Modifier(Component):
    """Changes what a method's ``distill`` sees, or what becomes of its loss.

    The label loss sees the original signals. Override :meth:`modify` to change the signals,
    :meth:`around` to do more.
    """

    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(teacher=False)
    fits: ClassVar[tuple[str, ...]] = KINDS
    """Kinds of methods whose loss it can change."""

    def modify(self, signals: Signals, modules: nn.Module) -> Signals:
        """The signals to distil from."""
        return signals

    def around(
        self, distill: Callable[[Signals], Terms], signals: Signals, modules: nn.Module
    ) -> Terms:
        """The terms of the modified method; ``distill`` gives those of the method itself."""
        return distill(self.modify(signals, modules))


def _check_ranges(settings: Component) -> None:
    """Refuse what no method can mean: negative weights, temperatures that are not above 0."""
    for name in (entry.name for entry in fields(settings)):  # type: ignore[arg-type]
        value = getattr(settings, name)
        if not isinstance(value, int | float):
            continue
        if "temperature" in name and value <= 0:
            raise ConfigError(f"{settings.name}: {name} must be above 0, but it is {value}")
        if "weight" in name and value < 0:
            raise ConfigError(f"{settings.name}: {name} must be 0 or more, but it is {value}")


def total(*terms: Terms) -> Tensor:
    """Sum of all loss terms, a scalar."""
    return torch.stack([value for group in terms for value in group.values()]).sum()
