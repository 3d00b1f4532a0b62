"""What every distillation method keeps to, as checks to run on your own.

In a test file::

    import pytest
    from smskd import Part
    from smskd.contract import CASES, CHECKS

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_contract(check, case):
        check(Part(MyMethod()), case)

or, in one call, ``check_method(MyMethod)``. A check raises ``AssertionError`` with a sentence, or
``unittest.SkipTest`` (which pytest and unittest know) where it does not apply: the method refuses
the pair, says in ``exempt`` why a check cannot hold, or the machine lacks something.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from unittest import SkipTest

from smskd.contract.assertions import require
from smskd.contract.cases import CASES, PairCase
from smskd.contract.declaration import (
    documents_its_settings,
    is_a_frozen_dataclass,
    says_what_it_is,
)
from smskd.contract.hard_inputs import batch_sizes, odd_images, odd_networks, odd_pairs
from smskd.contract.invariance import (
    bf16,
    float64_agrees,
    needs_are_read,
    needs_suffice,
    order_of_classes,
    order_of_samples,
    survives_rounding,
)
from smskd.contract.settings import no_setting_is_dead
from smskd.contract.steps import (
    draws_are_declared,
    goes_into_a_later_joint_stage,
    gradients_go_to_what_is_trained,
    loss_is_finite,
    says_why_it_cannot,
    signals_are_left_alone,
)
from smskd.contract.training import (
    adapters_train,
    deploys,
    learns,
    loss_falls,
    one_norm_update_a_step,
    repeats_exactly,
    resumes_exactly,
    teachers_stay,
)
from smskd.contract.trial import refusal
from smskd.methods.base import Component, Method, Modifier
from smskd.methods.objective import Part
from smskd.seeding import seeded

__all__ = [
    "CASES",
    "CHECKS",
    "CLASS_CHECKS",
    "LONG",
    "Check",
    "PairCase",
    "check_method",
    "main_case",
]

Check = Callable[[Part, PairCase], None]
"""Raises AssertionError if a method with its modifiers breaks the contract on a pair."""


def _guarded(check: Check) -> Check:
    """Skip where the method refuses the pair or is exempt; leave random numbers as they were."""

    @wraps(check)
    def run(part: Part, case: PairCase) -> None:
        for component in part.components:
            if reason := component.exempt.get(check.__name__):
                raise SkipTest(f"{component.name} is exempt: {reason}")
        with seeded(0):
            if check is not says_why_it_cannot and (reason := refusal(part, case)):
                raise SkipTest(f"refused: {reason}")
            check(part, case)

    return run


_SHORT = (
    says_why_it_cannot,
    loss_is_finite,
    gradients_go_to_what_is_trained,
    draws_are_declared,
    signals_are_left_alone,
)

_LONG = (
    goes_into_a_later_joint_stage,
    order_of_samples,
    order_of_classes,
    float64_agrees,
    survives_rounding,
    bf16,
    needs_suffice,
    needs_are_read,
    batch_sizes,
    odd_networks,
    odd_images,
    odd_pairs,
    teachers_stay,
    one_norm_update_a_step,
    adapters_train,
    repeats_exactly,
    resumes_exactly,
    deploys,
    loss_falls,
    learns,
    no_setting_is_dead,
)

CHECKS: dict[str, Check] = {check.__name__: _guarded(check) for check in (*_SHORT, *_LONG)}
"""All checks by name; what each demands is its docstring."""


def exempts_itself_with_reasons(cls: type[Component]) -> None:
    """The checks that a class says it cannot keep exist, and each has a reason."""
    unknown = sorted(set(cls.exempt) - set(CHECKS))
    require(not unknown, f"exempt from unknown checks: {', '.join(unknown)}")
    require(all(len(reason) > 10 for reason in cls.exempt.values()), "exempt without a reason")
    known = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
    require(cls.silent <= known, f"silent settings that are none: {sorted(cls.silent - known)}")


CLASS_CHECKS: dict[str, Callable[[type[Component]], None]] = {
    check.__name__: check
    for check in (
        is_a_frozen_dataclass,
        says_what_it_is,
        documents_its_settings,
        exempts_itself_with_reasons,
    )
}
"""Checks of the class of a method or modifier, by name."""

LONG = frozenset(check.__name__ for check in _LONG)
"""Checks that take longer and say much the same on every pair: one pair is enough in daily use."""


def main_case(part: Part, cases: Mapping[str, PairCase] = CASES) -> PairCase:
    """The first pair that a method does not refuse.

    Raises:
        AssertionError: it refuses all of them.
    """
    reasons = {}
    for name, case in cases.items():
        reasons[name] = refusal(part, case)
        if reasons[name] is None:
            return case
    raise AssertionError(f"{part.method.name} refuses every pair: {reasons}")


def check_method(
    method: Method | type[Method],
    modifiers: Sequence[Modifier] = (),
    cases: Mapping[str, PairCase] = CASES,
) -> None:
    """Run every check; long ones on the main pair only.

    Args:
        method: The method, or its class for its default settings.
        modifiers: To be tried with it.
        cases: Pairs to try it on.

    Raises:
        AssertionError: with a line for each check that failed.
    """
    part = Part(method if isinstance(method, Method) else method(), tuple(modifiers))
    failures = [
        f"{component.name}, {name}: {failure}"
        for component in part.components
        for name, check in CLASS_CHECKS.items()
        if (failure := _failure(check, type(component)))
    ]
    main = main_case(part, cases)
    for name, check in CHECKS.items():
        for case in [main] if name in LONG else cases.values():
            if failure := _failure(check, part, case):
                failures.append(f"{name} on {case.name}: {failure}")
    if failures:
        raise AssertionError(
            f"{part.method.name} fails {len(failures)} checks:\n" + "\n".join(failures)
        )


def _failure(check: Callable[..., None], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except SkipTest:
        return None
    except AssertionError as error:
        return str(error) or "an assertion of the method's own"
    except Exception as error:  # a method can fail in any way, and the next check shall still run
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return None
