"""Intervals, tests and verdicts of few seeds: against scipy on the same numbers, and simulated."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference
from smskd_bench.stats import resampling
from smskd_bench.stats.comparing import ALPHA, FEWEST, WORDS, compare, judge
from smskd_bench.stats.holm import holm
from smskd_bench.stats.power import (
    equality_power,
    pooled_std,
    power,
    seeds_for_difference,
    seeds_for_equality,
    smallest_difference,
    upper_std,
)
from smskd_bench.stats.resampling import bootstrap_interval, sign_flip_p
from smskd_bench.stats.sample import Interval, sample

NUMBERS = {
    "three": [0.5, 1.25, -0.75],
    "four": [2.0, 2.5, 2.25, 3.0],
    "five": [-0.1, 0.4, 0.2, 0.3, 0.9],
    "twelve": [0.11, -0.42, 0.73, 0.28, 0.5, -0.16, 0.37, 0.91, 0.05, 0.44, -0.3, 0.62],
}
each = pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)


@each
def test_a_sample_is_that_of_scipy(numbers):
    found = sample(numbers)
    low, high = reference.t.interval(
        0.95, len(numbers) - 1, np.mean(numbers), reference.sem(numbers)
    )
    assert found.mean == pytest.approx(np.mean(numbers))
    assert found.std == pytest.approx(np.std(numbers, ddof=1))
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))
    assert found.interval.holds(found.mean)


def test_one_draw_has_no_spread():
    assert sample([70.0]) == sample([70.0])
    assert (sample([70.0]).std, sample([70.0]).interval) == (None, None)


@pytest.mark.parametrize("numbers", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_sample(numbers):
    with pytest.raises(ValueError, match="no sample"):
        sample(numbers)


@each
def test_p_is_that_of_the_paired_t_test(numbers):
    found = compare(numbers, margin=0.4)
    assert found.p == pytest.approx(reference.ttest_1samp(numbers, 0.0).pvalue)
    lower = reference.ttest_1samp(numbers, -0.4, alternative="greater").pvalue
    upper = reference.ttest_1samp(numbers, 0.4, alternative="less").pvalue
    assert found.p_unequal == pytest.approx(max(lower, upper))


@each
def test_the_sign_flip_p_is_that_of_scipy(numbers):
    found = reference.permutation_test(
        (np.array(numbers),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(numbers) == pytest.approx(found.pvalue)
    assert sign_flip_p(numbers) >= 2 / 2 ** len(numbers)


def test_drawn_signs_agree_with_all_of_them(monkeypatch):
    exact = sign_flip_p(NUMBERS["twelve"])
    monkeypatch.setattr(resampling, "ALL_SIGNS", 0)
    assert sign_flip_p(NUMBERS["twelve"]) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(NUMBERS["twelve"]) == sign_flip_p(NUMBERS["twelve"])


@each
def test_the_bootstrap_is_scipys_percentile_interval_further_out(numbers):
    n = len(numbers)
    tail = reference.norm.cdf(-math.sqrt(n / (n - 1)) * reference.t.ppf(0.975, n - 1))
    found = bootstrap_interval(numbers)
    theirs = reference.bootstrap(
        (numbers,), np.mean, n_resamples=50_000, confidence_level=1 - 2 * tail,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert min(numbers) <= found.low <= found.high <= max(numbers)
    assert found == bootstrap_interval(numbers)


def test_no_bootstrap_of_one():
    assert bootstrap_interval([1.0]) is None


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [], [1.0, 1.0], [0.02] * 3, [0.9, 1e-9, 0.04]]
)
def test_holm_by_its_definition(p_values):
    """A hypothesis is rejected at a level if all smaller p values are below level / (m - rank)."""
    order = sorted(p_values)
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        before = [(len(order) - i) * q for i, q in enumerate(order) if q <= p]
        assert corrected == pytest.approx(min(1.0, max(before)))


def test_holm_as_statsmodels_documents_it():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])


def verdicts(*differences, margin=0.3):
    return [d.verdict for d in judge([compare(d, margin) for d in differences])]


def test_the_four_verdicts():
    found = verdicts([2.0, 2.1, 1.9], [-2.0, -2.1, -1.9], [0.01, -0.01, 0.0], [2.0, -1.0, 0.5])
    assert found == ["better", "worse", "equal", "open"]
    assert set(WORDS) == set(found)


def test_fewer_than_three_seeds_say_nothing():
    for numbers in ([5.0], [5.0, 5.1]):
        (found,) = judge([compare(numbers)])
        assert (found.verdict, found.why) == ("open", f"{len(numbers)} of at least {FEWEST} seeds")
        assert found.p_holm is None


def test_equal_differences_tell_nothing_but_no_difference_does():
    same, none = judge([compare([1.25, 1.25, 1.25]), compare([0.0, 0.0, 0.0])])
    assert (same.verdict, same.p) == ("open", None)
    assert "spread is not known" in same.why
    assert none.verdict == "equal"


def test_within_the_margin_is_equal_even_if_it_is_sure():
    numbers = [0.1, 0.11, 0.09, 0.1, 0.1]
    (found,) = judge([compare(numbers, margin=0.3)])
    assert found.p < 0.001
    assert found.verdict == "equal"
    assert verdicts(numbers, margin=0.01) == ["better"]


def test_the_correction_takes_the_whole_table():
    alone = verdicts([1.0, 1.2, 0.8])
    (first, *_) = judge([compare([1.0, 1.2, 0.8]), *(compare([0.5, -0.9, 0.7]) for _ in range(9))])
    assert alone == ["better"]
    assert first.verdict == "open"
    assert first.p == pytest.approx(compare([1.0, 1.2, 0.8]).p)
    assert first.p_holm == pytest.approx(10 * first.p)
    assert first.family == 10
    assert "alone, but not among 10" in first.why


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_margin(margin):
    with pytest.raises(ValueError, match="margin"):
        compare([1.0, 2.0], margin)


finite = st.floats(-100, 100, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=6))
def test_every_list_of_numbers_gets_a_verdict_that_its_mirror_image_mirrors(numbers):
    (found,) = judge([compare(numbers)])
    (other,) = judge([compare([-x for x in numbers])])
    mirrored = {"better": "worse", "worse": "better", "equal": "equal", "open": "open"}
    assert other.verdict == mirrored[found.verdict]
    assert found.n == len(numbers)
    assert 0 < found.p_exact <= 1


# ------------------------------------------------------------------------------------- simulations


def p_matrix(differences):
    """p values of the paired t test of many comparisons at once, from scipy."""
    return reference.ttest_1samp(differences, 0.0, axis=-1).pvalue


@pytest.mark.parametrize("n", [3, 5])
def test_a_table_without_any_difference_is_silent_in_19_of_20(n):
    """Eight rows against one control: the differences depend on each other, Holm holds all the same."""
    draw = np.random.default_rng(n)
    rows, control = draw.normal(size=(1500, 8, n)), draw.normal(size=(1500, 1, n))
    p_values = p_matrix(rows - control)
    false = np.mean([min(holm(list(table))) <= ALPHA for table in p_values])
    plain = np.mean(p_values.min(axis=1) <= ALPHA)
    assert false <= ALPHA + 0.015
    assert plain > 2 * ALPHA  # why it is corrected at all


@pytest.mark.parametrize("n", [3, 5])
def test_accuracies_in_steps_do_not_make_false_claims(n):
    """Accuracies are counts of test images; ties of a few images must not look sure."""
    draw, images = np.random.default_rng(10 + n), 797
    ours, theirs = (draw.binomial(images, 0.95, size=(600, n)) * 100 / images for _ in range(2))
    found = [judge([compare(list(d))])[0].verdict for d in ours - theirs]
    assert np.mean([v in ("better", "worse") for v in found]) <= ALPHA + 0.025


def unequal_p(differences, margin):
    """p values of two one-sided tests of many comparisons at once, from scipy."""
    sides = ((-margin, "greater"), (margin, "less"))
    return np.max(
        [reference.ttest_1samp(differences, m, axis=-1, alternative=a).pvalue for m, a in sides], 0
    )


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_difference_of_the_margin_is_called_equal_in_1_of_20_at_most(n):
    differences = np.random.default_rng(3).normal(0.3, 0.05, size=(4000, n))
    assert np.mean(unequal_p(differences, 0.3) <= ALPHA) <= ALPHA + 0.012


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.6, 0.85), (5, 0.85, 0.96)])
def test_how_often_the_intervals_hold_the_truth(n, least, most):
    """The t interval does in 95 of 100; the bootstrap of three to five seeds does not, so it decides nothing."""
    draw = np.random.default_rng(100 + n)
    data = draw.normal(1.0, 0.5, size=(600, n))
    t = np.mean([sample(list(d)).interval.holds(1.0) for d in data])
    bootstrap = np.mean([bootstrap_interval(list(d)).holds(1.0) for d in data])
    assert 0.93 <= t <= 0.97
    assert least <= bootstrap <= most


# -------------------------------------------------------------------------------------- the planner


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("effect", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_power_is_that_of_the_noncentral_t(n, effect):
    critical, shift = reference.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    above = reference.nct.sf(critical, n - 1, shift)
    below = reference.nct.cdf(-critical, n - 1, shift)  # NaN where it is nothing
    assert power(n, effect * 0.4, 0.4) == pytest.approx(above + np.nan_to_num(below), abs=1e-6)


@pytest.mark.parametrize(
    ("effect", "wanted", "seeds"), [(0.5, 0.8, 34), (0.8, 0.8, 15), (0.2, 0.8, 199), (0.5, 0.9, 44)]
)
def test_seeds_of_known_tables(effect, wanted, seeds):
    """Paired t test, two-sided 0.05: G*Power 3.1 and statsmodels' TTestPower give these."""
    assert seeds_for_difference(effect, 1.0, wanted=wanted) == seeds


def test_seeds_are_those_of_statsmodels():
    solve = pytest.importorskip("statsmodels.stats.power").TTestPower().solve_power
    for effect in (0.4, 0.7, 1.5):
        wanted = solve(effect_size=effect, alpha=0.05, power=0.8)
        assert seeds_for_difference(effect, 1.0) == math.ceil(wanted)


def test_power_is_what_a_simulation_finds():
    draw = np.random.default_rng(0)
    for n, effect in ((4, 1.5), (8, 1.0)):
        found = np.mean(p_matrix(draw.normal(effect, 1.0, size=(4000, n))) <= 0.05)
        assert power(n, effect, 1.0) == pytest.approx(found, abs=0.025)


def test_the_power_of_equality_is_what_a_simulation_finds():
    draw = np.random.default_rng(1)
    for n, std in ((4, 0.15), (8, 0.25)):
        found = unequal_p(draw.normal(0, std, (4000, n)), 0.3) <= 0.05
        assert equality_power(n, 0.3, std) == pytest.approx(np.mean(found), abs=0.025)


def test_plans_are_the_smallest_that_do():
    n = seeds_for_difference(0.3, 0.4)
    assert power(n, 0.3, 0.4) >= 0.8 > power(n - 1, 0.3, 0.4)
    n = seeds_for_equality(0.3, 0.2)
    assert equality_power(n, 0.3, 0.2) >= 0.8 > equality_power(n - 1, 0.3, 0.2)
    assert seeds_for_difference(100.0, 0.1) == 3
    assert seeds_for_difference(1e-4, 1.0) is None
    assert power(5, smallest_difference(5, 0.4), 0.4) == pytest.approx(0.8, abs=1e-6)
    assert smallest_difference(1, 0.4) is None


def test_a_pooled_spread_and_what_it_is_not_above():
    std, freedom = pooled_std([(3, 0.5), (5, 0.2), (1, 9.0)])
    assert (std, freedom) == (pytest.approx(math.sqrt((2 * 0.25 + 4 * 0.04) / 6)), 6)
    assert pooled_std([(1, 0.0)]) is None
    upper = upper_std(0.5, 2)
    assert upper == pytest.approx(0.5 * math.sqrt(2 / reference.chi2.ppf(0.2, 2)))
    draw = np.random.default_rng(2)
    held = [upper_std(np.std(d, ddof=1), 2) >= 1.0 for d in draw.normal(size=(4000, 3))]
    assert np.mean(held) == pytest.approx(0.8, abs=0.02)


def test_interval_ends_belong_to_it():
    assert Interval(1.0, 2.0).holds(1.0)
    assert not Interval(1.0, 2.0).holds(2.1)
