"""Settings of a stage that are not the method's: optimiser, schedule, reference, precision.

All are frozen dataclasses with the defaults of the CRD recipe, which nearly every later paper
copies: SGD 0.05, momentum 0.9, no Nesterov, weight decay 5e-4 on every parameter, batch 64,
240 epochs with decay by 10 after 150, 180 and 210.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import cos, pi
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from smskd.errors import ConfigError

STRICT: dict[str, object] = {"extra": "forbid", "allow_inf_nan": False}
"""Read by pydantic where settings come from a file: an unknown key is an error."""

Precision = Literal["fp32", "tf32", "bf16"]
Carry = Literal["last", "best_on_dev"]
Init = Literal["warm", "reinit"]
WeightMap = Literal["one_minus_tcp", "tcp", "constant", "exp_minus_tcp", "two_minus_tcp"]


@cache
def _choices(form: type) -> dict[str, tuple[object, ...]]:
    hints = get_type_hints(form)
    return {name: get_args(t) for name, t in hints.items() if get_origin(t) is Literal}


def check_choices(settings: object) -> None:
    """Refuse a misspelt choice, which would otherwise silently mean another one.

    Raises:
        ConfigError: a field that has a ``Literal`` type holds something else.
    """
    for name, allowed in _choices(type(settings)).items():  # type: ignore[arg-type]
        if (value := getattr(settings, name)) not in allowed:
            raise ConfigError(
                f"{type(settings).__name__}: {name} is {value!r}",
                f"choose one of {', '.join(map(repr, allowed))}",
            )


@dataclass(frozen=True)
class Schedule:
    """Learning rate over one stage, as a factor of the recipe's base rate.

    Attributes:
        kind: "step" multiplies by ``gamma`` after each milestone; "cosine" falls to 0; "constant".
        start: Factor at the first epoch (1.0 restarts fully, 0.1 continues gently).
        milestones: Fractions of the stage after which the rate drops.
        gamma: Factor of each drop.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    kind: Literal["step", "cosine", "constant"] = "step"
    start: float = 1.0
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)

    def factor(self, epoch: int, epochs: int) -> float:
        """Factor of the base rate in ``epoch`` (from 1) of ``epochs``.

        A milestone at fraction 0.625 of 240 leaves epochs 1 to 150 untouched, as in the CRD code.
        """
        if self.kind == "cosine":
            return self.start * 0.5 * (1.0 + cos(pi * (epoch - 1) / epochs))
        if self.kind == "constant":
            return self.start
        passed = sum(epoch > round(m * epochs) for m in self.milestones)
        return self.start * self.gamma**passed


LATER_STAGES = Schedule(start=0.1, milestones=(1 / 3, 2 / 3))
"""Default of stages after the first: a tenth of the base rate, dropped at 30 and 60 of 90."""


@dataclass(frozen=True)
class Optimizer:
    """SGD as in the CRD recipe; weight decay acts on every parameter, adapters included."""

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False


@dataclass(frozen=True)
class Weighting:
    """Per-sample weight of the reference loss, from the teacher's true-class probability (TCP).

    Attributes:
        map: Weight as a function of TCP; "constant" is 1 for all.
        temperature: Softens the teacher before TCP is read.
        normalise: "none"; "batch_mean" divides by the batch's mean weight, which tests the
            direction of the map apart from its size; "batch_sum" divides by the sum.
        denominator: The weighted sum is divided by the batch size or by the sum of weights.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    map: WeightMap = "one_minus_tcp"
    temperature: float = 1.0
    normalise: Literal["none", "batch_mean", "batch_sum"] = "none"
    denominator: Literal["batch", "weights"] = "batch"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class Reference:
    """How the frozen student of the previous stage holds the next one.

    Attributes:
        weight: lambda_r; 0 switches the reference off.
        temperature: tau_r of the KL; used in logit space only.
        space: "logits" (KL) or "features" (mean squared difference of the last map).
        weighting: Per-sample weights.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    weight: float = 1.0
    temperature: float = 4.0
    space: Literal["logits", "features"] = "logits"
    weighting: Weighting = field(default_factory=Weighting)

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether the sample weights depend on the teacher."""
        return self.weighting.map != "constant"


@dataclass(frozen=True)
class Training:
    """All of one stage that is neither its method nor its networks.

    Attributes:
        epochs: Length of the stage.
        optimizer: SGD settings.
        schedule: Learning rate over the stage.
        batch_size: Samples a step; the last, smaller batch is kept.
        precision: Arithmetic of the networks (:mod:`smskd.precision`); losses stay float32.
        carry: Which weights the stage hands on. "best_on_dev" needs a development split.
        init: "warm" continues from the previous stage; "reinit" starts afresh.
    """

    epochs: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 64
    precision: Precision = "fp32"
    carry: Carry = "last"
    init: Init = "warm"

    def __post_init__(self) -> None:
        check_choices(self)
