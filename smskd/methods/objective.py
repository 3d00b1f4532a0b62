"""What one stage optimises: one method, or several trained jointly, with their own modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from operator import or_

import torch
from torch import nn

from smskd.errors import ConfigError, IncompatibleError
from smskd.methods.base import Component, Method, Modifier, Needs, PairShapes, Signals, Terms
from smskd.settings import Reference
from smskd.taps import FEATURES, NETWORK


@dataclass(frozen=True)
class Part:
    """One method of a stage and what changes the signals it distils from.

    Attributes:
        method: The method.
        modifiers: Applied in this order.
    """

    method: Method
    modifiers: tuple[Modifier, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        """The method, then its modifiers."""
        return (self.method, *self.modifiers)

    @property
    def needs(self) -> Needs:
        """What method and modifiers must be given together."""
        return reduce(or_, (modifier.needs for modifier in self.modifiers), self.method.needs)


class Objective(nn.Module):
    """The loss of one stage: the sum of its methods' losses.

    The parameters are those of the methods' own modules (adapters), so they train with the student
    and are part of checkpoints.

    Args:
        parts: The methods, at least one.
        shapes: Sizes of the pair of networks.
        method_weight: Factor on every distillation term.
        ce_weight: Weight of the loss on the labels, in place of the methods' own; None keeps those,
            summed.

    Raises:
        ConfigError: no methods, or two that each bring their own optimiser.
        IncompatibleError: a method or modifier cannot work with these networks.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shapes: PairShapes,
        method_weight: float = 1.0,
        ce_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("a stage has no method", "name at least one, e.g. kd")
        self.parts = _with_ce_weight(parts, ce_weight)
        self.method_weight = method_weight
        self._names = _part_names(self.parts)
        self._driver = _driver(self.parts)
        self.check(shapes)
        self.method_modules = nn.ModuleList(part.method.build(shapes) for part in self.parts)
        self.modifier_modules = nn.ModuleList(
            nn.ModuleList(modifier.build(shapes) for modifier in part.modifiers)
            for part in self.parts
        )

    @cached_property
    def needs(self) -> Needs:
        """What any of the methods must be given; read in every step."""
        return reduce(or_, (part.needs for part in self.parts))

    def check(self, shapes: PairShapes) -> None:
        """Refuse a pair of networks that a method cannot work with.

        Raises:
            IncompatibleError: with each such method's reason.
        """
        reasons = why_not(self.parts, shapes)
        if reasons:
            lines = [f"{name} cannot work with this pair: {why}" for name, why in reasons.items()]
            raise IncompatibleError(
                "\n".join(lines), "choose another method, other networks or other taps"
            )

    def forward(self, signals: Signals) -> tuple[Terms, Terms]:
        """The weighted terms of one batch: on the labels, and on the teachers' signals."""
        task: list[Terms] = []
        distill: list[Terms] = []
        for part, module, modifiers in zip(
            self.parts, self.method_modules, self.modifier_modules, strict=True
        ):
            task.append(part.method.task(signals))
            terms = _modified(part, module, modifiers)(signals)
            distill.append({name: self.method_weight * term for name, term in terms.items()})
        return _summed(task), self._labelled(distill)

    def descend(self, task: Terms, distill: Terms, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step, as the method does it that has its own way, else the usual one.

        Raises:
            ConfigError: there are no terms at all.
        """
        self.check_terms(task, distill)
        self._driver.descend(task, distill, optimizer)

    def check_terms(self, task: Terms, distill: Terms) -> None:
        """Refuse to descend on nothing.

        Raises:
            ConfigError: there are no terms at all.
        """
        if not (task or distill):
            raise ConfigError(
                "the stage has nothing to optimise: no distillation, and the labels have weight 0",
                "raise ce_weight or name a distillation method",
            )

    def why_not_shared(self) -> str | None:
        """Why one optimiser step cannot serve this objective and another seed's, or None."""
        return why_not_shared(self.parts)

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer | None:
        """The optimiser that a method brings, or None for the recipe's."""
        return self._driver.make_optimizer(groups)

    def inference_model(self, student: nn.Module) -> nn.Module:
        """What is evaluated and exported: the student in the methods' wrappers, first innermost."""
        for part, module in zip(self.parts, self.method_modules, strict=True):
            student = part.method.inference_model(student, module)
        return student

    def _labelled(self, distill: list[Terms]) -> Terms:
        """Merge the parts' terms; names that occur twice get their method's name in front."""
        seen = Counter(name for terms in distill for name in terms)
        return {
            (name if seen[name] == 1 else f"{part}.{name}"): term
            for part, terms in zip(self._names, distill, strict=True)
            for name, term in terms.items()
        }


def _with_ce_weight(parts: Sequence[Part], ce_weight: float | None) -> tuple[Part, ...]:
    """Give the label loss to the first method alone, unless the methods keep their own weights."""
    if ce_weight is not None:
        weights = [ce_weight, *[0.0] * (len(parts) - 1)]
        parts = [
            replace(part, method=replace(part.method, ce_weight=weight))
            for part, weight in zip(parts, weights, strict=True)
        ]
    return tuple(parts)


def _part_names(parts: Sequence[Part]) -> list[str]:
    """The methods' names, numbered from the second of the same method on: kd, kd2."""
    count: Counter[str] = Counter()
    names = []
    for part in parts:
        name = part.method.name
        count[name] += 1
        names.append(name if count[name] == 1 else f"{name}{count[name]}")
    return names


def _driver(parts: Sequence[Part]) -> Component:
    """Who takes the optimiser's steps: the one with its own way, else the first method."""
    own = [c for part in parts for c in part.components if _has_own_steps(type(c))]
    if len(own) > 1:
        raise ConfigError(
            f"{' and '.join(component.name for component in own)} each bring their own optimiser, "
            "but a stage has one",
            "put them into different stages",
        )
    return own[0] if own else parts[0].method


def _has_own_steps(component: type[Component]) -> bool:
    # The optimiser and the way to step it belong together, so either makes its owner the driver.
    return (
        component.make_optimizer is not Component.make_optimizer
        or component.descend is not Component.descend
    )


def why_not_shared(parts: Sequence[Part]) -> str | None:
    """Why a step of these methods cannot be shared with other runs or processes, or None."""
    driver, needs = _driver(parts), reduce(or_, (part.needs for part in parts))
    if _has_own_steps(type(driver)):
        return f"{driver.name} takes its optimiser's steps itself"
    if needs.student_roles - FEATURES or NETWORK in needs.teacher_roles:
        return "a method reaches into the networks themselves"
    draws = [c.name for part in parts for c in part.components if c.draws_random]
    if draws:
        return f"{' and '.join(draws)} draw random numbers, which are each seed's own"
    return None


def why_not(parts: Sequence[Part], shapes: PairShapes) -> dict[str, str]:
    """Why methods and modifiers cannot work with a pair, by name; empty if all can."""
    found: dict[str, str] = {}
    for name, part in zip(_part_names(parts), parts, strict=True):
        reasons = [_why_not(part.method, shapes)]
        reasons += [_why_not_around(modifier, part.method, shapes) for modifier in part.modifiers]
        for component, reason in zip(part.components, reasons, strict=True):
            if reason is not None:
                found[name if component is part.method else component.name] = reason
    return found


def why_no_reference(before: Sequence[Method], reference: Reference | None) -> str | None:
    """Why the student that these methods trained cannot hold the next stage, or None."""
    if reference is None or reference.weight == 0.0 or reference.space != "logits":
        return None
    if any(method.trains_classifier for method in before):
        return None
    names = " and ".join(method.name for method in before)
    return (
        f"the reference compares logits, but those of a student of {names} are not trained "
        "(expected another method in the stage before, no reference, or one in features space)"
    )


def _why_not(method: Method, shapes: PairShapes) -> str | None:
    """Conditions that hold for every method of a kind, then the method's own."""
    if method.needs.teacher and not shapes.teachers:
        return "it was given no teacher (expected at least 1)"
    if method.needs.index and not shapes.num_train:
        return "it keeps an entry for each training sample; expected their number to be known"
    if method.kind == "response":
        classes = [teacher.num_classes for teacher in shapes.teachers]
        if any(number != shapes.student.num_classes for number in classes):
            return (
                f"the student has {shapes.student.num_classes} classes and the teacher "
                f"{' and '.join(map(str, classes))} (expected the same number)"
            )
    return method.check(shapes)


def _why_not_around(modifier: Modifier, method: Method, shapes: PairShapes) -> str | None:
    if method.kind not in modifier.fits:
        kinds = " or ".join(modifier.fits)
        return (
            f"it cannot change the loss of {method.name}, a {method.kind} method (expected {kinds})"
        )
    return modifier.check(shapes)


def _modified(part: Part, module: nn.Module, modifiers: nn.Module) -> Callable[[Signals], Terms]:
    """The method's loss as its modifiers leave it; the first modifier sees the signals first."""

    def distill(signals: Signals) -> Terms:
        return part.method.distill(signals, module)

    layers = list(zip(part.modifiers, modifiers.children(), strict=True))
    for modifier, own in reversed(layers):
        distill = partial(_around, modifier, own, distill)
    return distill


def _around(
    modifier: Modifier, modules: nn.Module, distill: Callable[[Signals], Terms], signals: Signals
) -> Terms:
    return modifier.around(distill, signals, modules)


def _summed(groups: list[Terms]) -> Terms:
    names = dict.fromkeys(name for terms in groups for name in terms)
    return {name: torch.stack([t[name] for t in groups if name in t]).sum() for name in names}
