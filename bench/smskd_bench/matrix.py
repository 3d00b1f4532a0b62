"""The form of a matrix file, as frozen dataclasses; ``docs/matrix.md`` explains every entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from smskd.settings import (
    LATER_STAGES,
    STRICT,
    Carry,
    Init,
    Optimizer,
    Precision,
    Reference,
    Schedule,
)


@dataclass(frozen=True)
class DatasetSection:
    """Which data, and how much of it.

    Attributes:
        name: A name from ``smskd-bench list datasets``.
        train_size: Training images kept (a class-balanced, seeded choice); None keeps all.
        dev_size: Training images set aside for selection, disjoint from training and test.
        split_seed: Decides both choices.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    name: str
    train_size: int | None = None
    dev_size: int = 0
    split_seed: int = 0


@dataclass(frozen=True)
class PairSection:
    """A teacher-student pair; ``lr`` replaces the recipe's base rate for the student.

    Several teachers teach together; the first is the one whose confidence weights the reference.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    teacher: tuple[str, ...]
    student: str
    lr: float | None = None

    @property
    def name(self) -> str:
        """``teacher>student``, as the literature writes it, or ``one+other>student``."""
        return f"{'+'.join(self.teacher)}>{self.student}"


@dataclass(frozen=True)
class EpochsSection:
    """Epochs of each stage: a list whose last entry repeats, or one total split equally."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    per_stage: tuple[int, ...] | None = None
    total: int | None = None


@dataclass(frozen=True)
class RecipeSection:
    """How students are trained."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    epochs: EpochsSection = field(default_factory=lambda: EpochsSection(per_stage=(240, 90)))
    optimizer: Optimizer = field(default_factory=Optimizer)
    batch_size: int = 64
    precision: Precision = "fp32"
    first_stage: Schedule = field(default_factory=Schedule)
    later_stages: Schedule = LATER_STAGES
    carry: Carry = "last"
    init: Init = "warm"


@dataclass(frozen=True)
class TeacherSection:
    """How teachers are trained: from scratch, under the recipe but for what is said here.

    Attributes:
        epochs: Length of training.
        seed: One teacher for all seeds of the students; None trains one for each seed.
        lr: Base learning rate; None takes the recipe's.
        schedule: None takes the recipe's for a first stage.
        weights: Per model name, a safetensors file to take instead of training.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    epochs: int = 240
    seed: int | None = 0
    lr: float | None = None
    schedule: Schedule | None = None
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSection:
    """A named variant of a registered method."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    modifiers: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class StageSection:
    """One stage of a row; None means what the row, then the recipe, says.

    ``teacher`` names the assistants that teach it; None, or ``pair``, is the pair's teacher.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    method: tuple[str, ...]
    teacher: tuple[str, ...] | None = None
    epochs: int | None = None
    schedule: Schedule | None = None
    init: Init | None = None
    carry: Carry | None = None
    method_weight: float = 1.0
    ce_weight: float | None = None
    reference: dict[str, Any] | None = None


@dataclass(frozen=True)
class RowSection:
    """One row of the table: a sequence of stages, trained for every pair and seed.

    Attributes:
        stages: In order.
        name: Shown in the table; made from the stages if not given.
        epochs: Replaces the recipe's.
        reference: Replaces entries of the matrix's reference.
        controls: Names of the rows this one has to beat.
        only: Pairs this row is trained for; empty means all.
        note: Free text.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    stages: tuple[StageSection, ...]
    name: str = ""
    epochs: EpochsSection | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class AssistantSection:
    """A network that is trained to teach: the middle of a chain, a generation, a wider copy.

    It is trained once for each pair and seed that uses it, under the recipe.

    Attributes:
        model: A name from ``smskd-bench list models``, or ``student``: the pair's own.
        stages: As in a row; their teachers are the pair's, or other assistants.
        epochs: Replaces the recipe's.
        lr: Base learning rate; None takes the pair's for ``student``, else the recipe's.
        seed_shift: Added to the seed, so that a generation begins with other weights.
        reference: Replaces entries of the matrix's reference.
        note: Free text.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    model: str
    stages: tuple[StageSection, ...]
    epochs: EpochsSection | None = None
    lr: float | None = None
    seed_shift: int = 0
    reference: dict[str, Any] = field(default_factory=dict)
    note: str = ""


PAIR, STUDENT = "pair", "student"
"""What stands for the pair's teacher in a stage, and for its student in an assistant."""


@dataclass(frozen=True)
class Matrix:
    """A whole matrix file."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    name: str
    dataset: DatasetSection
    pairs: tuple[PairSection, ...]
    seeds: tuple[int, ...]
    rows: tuple[RowSection, ...]
    schema: Literal[1] = 1
    protocol: int = 1
    description: str = ""
    recipe: RecipeSection = field(default_factory=RecipeSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    reference: Reference = field(default_factory=Reference)
    methods: dict[str, MethodSection] = field(default_factory=dict)
    assistants: dict[str, AssistantSection] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    evaluate_every: int = 0
