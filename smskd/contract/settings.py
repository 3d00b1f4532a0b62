"""The check that every setting of a method does something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smskd.contract.assertions import require
from smskd.contract.cases import CASES, PairCase
from smskd.contract.training import STAGE_EPOCHS
from smskd.contract.trial import Trial, trial
from smskd.errors import SmskdError
from smskd.methods.base import Component, Method, Modifier
from smskd.methods.objective import Part
from smskd.train import StageRun, train

TINY = 1e-7
"""A smaller relative change of every loss does not count as one."""


def no_setting_is_dead(part: Part, case: PairCase) -> None:
    """Another value of a setting changes the loss of some epoch on some pair.

    If need be with another choice of the settings that are choices, or with something on that is
    off. Only what does that in no way may be named in `silent`.
    """
    for place, component in enumerate(part.components):
        for entry in fields(component):  # type: ignore[arg-type]
            silent = entry.name in component.silent
            what = f"{component.name}: {entry.name} is {'silent, but' if silent else 'dead:'}"
            for values in _others(component, entry.name):
                alive = _is_alive(part, place, entry.name, values, case)
                sentence = (
                    f"{what} one of {values} changes the loss"
                    if silent
                    else (f"{what} none of {values} changes the loss")
                )
                require(alive != silent, sentence)


def _is_alive(part: Part, place: int, name: str, values: tuple[Any, ...], case: PairCase) -> bool:
    others = list(_with_values(part, place, name, values))
    require(bool(others), f"{part.components[place].name}: no other {name} is allowed")
    cases = [case, *(other for other in CASES.values() if other != case)]
    if any(_differ(part, other, on) for on in cases for other in others):
        return True
    return any(
        _differ(around, other, case)
        for around in _switched(part, place, name)
        for other in _with_values(around, place, name, values)
    )


def _switched(part: Part, place: int, name: str) -> Iterator[Part]:
    """The same with another choice somewhere, or with something on that is off."""
    component = part.components[place]
    for entry in fields(component):  # type: ignore[arg-type]
        value = getattr(component, entry.name)
        off = isinstance(value, float) and value == 0.0
        if entry.name != name and (off or isinstance(value, str | bool)):
            for values in _others(component, entry.name):
                yield from _with_values(part, place, entry.name, values)


def variants(part: Part) -> dict[str, Part]:
    """The same with each other choice of the method's settings that are choices, by its name."""
    found = {}
    for entry in fields(part.method):
        if isinstance(getattr(part.method, entry.name), str | bool):
            for (value,) in _others(part.method, entry.name):
                for other in _with_values(part, 0, entry.name, (value,)):
                    found[f"{entry.name}={value}"] = other
    return found


def _others(component: Component, name: str) -> Iterator[tuple[Any, ...]]:
    """Groups of other values, of each of which one must change something."""
    value = getattr(component, name)
    hint = get_type_hints(type(component))[name]
    if get_origin(hint) is Literal:
        yield from ((choice,) for choice in get_args(hint) if choice != value)
    elif isinstance(value, bool):
        yield (not value,)
    elif value is None or isinstance(value, int | float | tuple):
        yield _near(value)
    else:
        raise AssertionError(f"{component.name}: {name} is a {type(value).__name__}")


def _near(value: float | tuple[Any, ...] | None) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        changed = [(*value[:i], x, *value[i + 1 :]) for i in range(len(value))
                   for x in _near(value[i])]  # fmt: skip
        return (*changed, value[:-1]) if len(value) > 1 else tuple(changed)
    if value is None:
        return (1, 2, 0.5)
    if isinstance(value, int):
        return (value + 1, value - 1, 2 * value, value // 2, 3, 2, 1)
    return (1.5 * value, 0.5 * value, 2.0 * value) if value else (0.5, 1.0)


def _with_values(part: Part, place: int, name: str, values: tuple[Any, ...]) -> Iterator[Part]:
    for value in values:
        components: list[Any] = list(part.components)
        try:
            components[place] = replace(components[place], **{name: value})
        except SmskdError:
            continue
        method, *modifiers = components
        assert isinstance(method, Method)
        yield Part(method, tuple(m for m in modifiers if isinstance(m, Modifier)))


def _differ(part: Part, other: Part, case: PairCase) -> bool:
    """Whether a short stage of the two has another loss in some epoch."""
    known = _losses(part, case)
    if not known:
        return False
    try:
        tried = trial(other, case, epochs=STAGE_EPOCHS)
    except SmskdError:
        return False

    def compare(run: StageRun) -> None:
        loss, before = run.history[-1]["loss"], known[run.epoch - 1]
        if abs(loss - before) > TINY * max(abs(loss), abs(before)):
            raise _Differs

    try:
        _train(tried, compare)
    except _Differs:
        return True
    return False


class _Differs(Exception):
    """Ends a stage early."""


@lru_cache(maxsize=8)
def _losses(part: Part, case: PairCase) -> tuple[float, ...]:
    """The loss of each epoch of a short stage; empty if the pair is refused."""
    try:
        tried = trial(part, case, epochs=STAGE_EPOCHS)
    except SmskdError:
        return ()
    _train(tried, lambda _run: None)
    return tuple(row["loss"] for row in tried.run.history)


def _train(tried: Trial, after_epoch: Callable[[StageRun], None]) -> None:
    try:
        train(tried.run, tried.data, after_epoch)
    finally:
        tried.run.close()
