"""The contract suite of the library (``smskd.contract``) on every method and modifier there is."""

import pytest

from smskd.contract import CASES, CHECKS, CLASS_CHECKS, LONG, main_case
from smskd.contract.settings import variants
from smskd.errors import DivergedError
from smskd.methods import METHODS, MODIFIERS
from smskd.methods.kd import KD
from smskd.methods.objective import Part

PARTS = {name: Part(cls()) for name, cls in METHODS.items()}
PARTS |= {f"kd+{name}": Part(KD(), (cls(),)) for name, cls in MODIFIERS.items()}

MODIFIED = {
    f"{name}+{modifier}": Part(cls(), (MODIFIERS[modifier](),))
    for name, cls in METHODS.items()
    for modifier in MODIFIERS
    if cls.kind in MODIFIERS[modifier].fits and f"{name}+{modifier}" not in PARTS
}
VARIANTS = {
    f"{name}({choice})": part
    for name, whole in PARTS.items()
    for choice, part in variants(whole).items()
}
"""Every other choice of a setting that is a choice."""


def parametrised(parts, cases, checks, marks=()):
    """A parameter set for each combination, methods outermost: equal stages are trained once."""
    return [
        pytest.param(part, case, check, id=f"{name}-{check}-{case or 'main case'}", marks=marks)
        for name, part in parts.items()
        for check in checks
        for case in cases
    ]


def run(part, case, check):
    CHECKS[check](part, CASES[case] if case else main_case(part))


@pytest.mark.parametrize("registry", [METHODS, MODIFIERS], ids=["methods", "modifiers"])
def test_registry_keys_are_the_names(registry):
    assert {name: cls.name for name, cls in registry.items()} == {name: name for name in registry}


@pytest.mark.parametrize("check", CLASS_CHECKS)
@pytest.mark.parametrize("cls", [*METHODS.values(), *MODIFIERS.values()], ids=lambda cls: cls.name)
def test_class(cls, check):
    CLASS_CHECKS[check](cls)


EXEMPTIONS = [
    pytest.param(part, check, id=f"{name}-{check}")
    for name, part in PARTS.items()
    for check in part.components[-1].exempt
]


@pytest.mark.parametrize(("part", "check"), EXEMPTIONS)
def test_exemptions_are_needed(part, check):
    assert any(breaks(CHECKS[check].__wrapped__, part, case) for case in CASES.values())


def breaks(check, part, case):
    try:
        check(part, case)
    except AssertionError:
        return True
    return False


ON_ONE_PAIR = sorted(LONG | {"says_why_it_cannot"})
"""Checks that take long, or say nearly the same of every pair: daily on the main case at most."""
NOT_DAILY = {"no_setting_is_dead", "odd_pairs"}
"""Many trainings each, and only a change of the method itself can fail them."""
DAILY = parametrised(PARTS, CASES, [check for check in CHECKS if check not in ON_ONE_PAIR])
DAILY += parametrised(PARTS, [None], [check for check in ON_ONE_PAIR if check not in NOT_DAILY])


@pytest.mark.parametrize(("part", "case", "check"), DAILY)
def test_method(part, case, check):
    run(part, case, check)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "case", "check"), parametrised(PARTS, CASES, ON_ONE_PAIR))
def test_method_on_every_pair(part, case, check):
    run(part, case, check)


@pytest.mark.parametrize(
    ("part", "case", "check"),
    parametrised(MODIFIED, [None], ["goes_into_a_later_joint_stage"])
    + parametrised(VARIANTS, [None], ["loss_is_finite"])
    + parametrised(VARIANTS, [None], ["odd_networks"], marks=pytest.mark.slow),
)
def test_combination(part, case, check):
    run(part, case, check)


# What other code does (compat) need not keep the contract, only run. Weights may be meant for another
# choice, or for no modifier; what a class asks for need not be read in every variant.
IN_EVERYTHING = MODIFIED | {n: part for n, part in VARIANTS.items() if "(compat=" not in n}
OF_DEFAULTS = {"needs_are_read", "loss_falls", "learns"}
OF_ALL = [check for check in CHECKS if check not in OF_DEFAULTS]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "case", "check"), parametrised(IN_EVERYTHING, [None], OF_ALL))
def test_combination_in_everything(part, case, check):
    try:
        run(part, case, check)
    except DivergedError as error:
        pytest.skip(f"weights for another choice: {error}")
