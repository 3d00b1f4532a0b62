"""Learning rates land on the recipe's epochs; budgets are split without loss."""

from itertools import pairwise

import pytest

from smskd.errors import ConfigError
from smskd.schedule import equal_budget, stage_epochs
from smskd.settings import LATER_STAGES, Optimizer, Reference, Schedule, Training, Weighting


def factors(schedule, epochs):
    return [schedule.factor(epoch, epochs) for epoch in range(1, epochs + 1)]


def drops(schedule, epochs):
    """The first epoch of every lower rate."""
    rates = factors(schedule, epochs)
    return [n + 2 for n, (a, b) in enumerate(pairwise(rates)) if b != a]


def test_first_stage_drops_after_150_180_and_210_of_240():
    assert drops(Schedule(), 240) == [151, 181, 211]
    assert factors(Schedule(), 240)[::30] == pytest.approx([1] * 5 + [0.1, 0.01, 0.001])


def test_later_stages_start_at_a_tenth_and_drop_after_30_and_60_of_90():
    assert drops(LATER_STAGES, 90) == [31, 61]
    assert [LATER_STAGES.factor(e, 90) for e in (1, 30, 31, 60, 61, 90)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(("epochs", "first_lower"), [(120, [76, 91, 106]), (480, [301, 361, 421])])
def test_milestones_scale_with_the_stage(epochs, first_lower):
    assert drops(Schedule(), epochs) == first_lower


def test_milestone_at_the_end_never_drops():
    assert drops(Schedule(milestones=(1.0,)), 10) == []


def test_gamma_and_start_multiply():
    schedule = Schedule(start=0.5, milestones=(0.5,), gamma=0.2)
    assert factors(schedule, 4) == pytest.approx([0.5, 0.5, 0.1, 0.1])


def test_cosine_falls_from_start_towards_zero():
    rates = factors(Schedule(kind="cosine", start=0.4), 10)
    assert rates[0] == pytest.approx(0.4)
    assert rates[5] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.2 * (1 - 0.9510565162951535))
    assert all(b < a for a, b in pairwise(rates))


def test_constant_stays():
    assert factors(Schedule(kind="constant", start=0.3), 5) == [0.3] * 5


@pytest.mark.parametrize(
    ("total", "stages", "expected"),
    [(240, 2, (120, 120)), (240, 7, (35, 35, 34, 34, 34, 34, 34)), (3, 3, (1, 1, 1)), (5, 1, (5,))],
)
def test_equal_budget(total, stages, expected):
    assert equal_budget(total, stages) == expected
    assert sum(equal_budget(total, stages)) == total


def test_too_small_a_budget_is_refused():
    with pytest.raises(ConfigError, match="2 epochs cannot be split over 3 stages"):
        equal_budget(2, 3)


@pytest.mark.parametrize(
    ("given", "stages", "expected"),
    [((240, 90), 4, (240, 90, 90, 90)), ((240,), 2, (240, 240)), ((3, 2, 1), 2, (3, 2))],
)
def test_stage_epochs(given, stages, expected):
    assert stage_epochs(given, stages) == expected


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Schedule(kind="cosin"), "Schedule: kind is 'cosin'"),
        (lambda: Weighting(map="1-tcp"), "Weighting: map is '1-tcp'"),
        (lambda: Weighting(normalise="mean"), "Weighting: normalise is 'mean'"),
        (lambda: Weighting(denominator="sum"), "Weighting: denominator is 'sum'"),
        (lambda: Reference(space="feature"), "Reference: space is 'feature'"),
        (lambda: Training(1, precision="fp16"), "Training: precision is 'fp16'"),
        (lambda: Training(1, carry="best"), "Training: carry is 'best'"),
        (lambda: Training(1, init="cold"), "Training: init is 'cold'"),
    ],
)
def test_misspelt_choice_is_refused(build, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build()
    assert caught.value.hint.startswith("choose one of")


def test_defaults_are_the_recipes():
    assert Optimizer() == Optimizer(lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=False)
    assert Training(240).batch_size == 64
