"""Paired statistics: exact p against scipy, the interval against a search that shares no formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from smskd_export.paired import exact_mcnemar, paired_change, score_interval

Z = 1.959963984540054


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_p_is_that_of_scipy(gained, lost):
    if gained + lost == 0:
        assert exact_mcnemar(0, 0) == 1
        return
    expected = binomtest(gained, gained + lost).pvalue
    assert exact_mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(5000, 4800), (0, 2000), (9000, 1000), (4900, 5100)])
def test_p_of_many_images(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue
    # scipy's tail loses digits where p is tiny
    assert exact_mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_p_by_hand():
    # 1 of 5: both tails are (1 + 5) / 32 each
    assert exact_mcnemar(1, 4) == 12 / 32
    assert exact_mcnemar(3, 3) == 1


def score_by_search(gained, lost, n, difference):
    """Score statistic with the likelihood maximised on a grid, twice refined; no closed form."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def log_likelihood(q):  # q: probability of a lost image; gained has q + difference
        p = q + difference
        rest = 1 - p - q
        parts = ((gained, p), (lost, q), (n - gained - lost, rest))
        with np.errstate(divide="ignore", invalid="ignore"):
            return sum(np.where(k > 0, k * np.log(np.maximum(v, 0)), 0.0) for k, v in parts)

    for _ in range(6):
        grid = np.linspace(low, high, 2001)
        best = int(np.argmax(log_likelihood(grid)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 2000)]
    q = (low + high) / 2
    variance = n * (2 * q + difference - difference**2)
    distance = gained - lost - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


@pytest.mark.parametrize(
    ("gained", "lost", "n"),
    [(0, 0, 100), (1, 0, 50), (0, 1, 50), (8, 14, 1000), (60, 20, 10_000), (43, 0, 57), (5, 5, 12)],
)
def test_interval_is_where_a_search_puts_it(gained, lost, n):
    low, high = score_interval(gained, lost, n)
    assert score_by_search(gained, lost, n, low) == pytest.approx(Z, abs=2e-3)
    assert score_by_search(gained, lost, n, high) == pytest.approx(-Z, abs=2e-3)


def test_interval_where_nothing_differs_is_known_in_closed_form():
    low, high = score_interval(0, 0, 100)
    assert high == pytest.approx(Z**2 / (100 + Z**2), rel=1e-9)
    assert low == pytest.approx(-high, rel=1e-9)


@given(st.integers(1, 400), st.data())
@settings(max_examples=200, deadline=None)
def test_interval_holds_the_estimate_and_mirrors(n, data):
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    low, high = score_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = score_interval(lost, gained, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)


def test_interval_narrows_with_more_images():
    widths = [np.ptp(score_interval(4 * k, 6 * k, 100 * k)) for k in (1, 10, 100)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] / widths[2] == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize(("p", "q", "n"), [(0.02, 0.03, 300), (0.001, 0.004, 500), (0.2, 0.25, 60)])
def test_interval_covers_the_truth_95_times_in_100(p, q, n):
    draws = np.random.default_rng(0).multinomial(n, (p, q, 1 - p - q), size=1500)
    covered = [
        low <= p - q <= high
        for low, high in (score_interval(int(g), int(s), n) for g, s, _ in draws)
    ]
    assert 0.93 <= np.mean(covered) <= 0.985


def test_change_of_two_classifiers():
    old = np.array([True] * 70 + [False] * 30)
    new = old.copy()
    new[:3] = False
    new[95:] = True
    got = paired_change(new, old)
    assert (got.n, got.gained, got.lost) == (100, 5, 3)
    assert got.difference == pytest.approx(2.0)
    assert got.p == pytest.approx(binomtest(3, 8).pvalue)
    assert (got.low, got.high) == pytest.approx([100 * v for v in score_interval(5, 3, 100)])


@pytest.mark.parametrize(("new", "old"), [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_what_cannot_be_compared(new, old):
    with pytest.raises(ValueError, match="cannot be compared"):
        paired_change(np.zeros(new, bool), np.zeros(old, bool))
