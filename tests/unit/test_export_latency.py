"""The statistics of latency: constants of MLPerf, properties, and flags that fire when they should."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from smskd_export.latency import dropped_tail, percentile_bound, summarise


@pytest.mark.parametrize(
    ("p", "fewest"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)]
)
def test_fewest_samples_of_a_bound(p, fewest):
    assert dropped_tail(fewest - 1, p) == 0
    assert dropped_tail(fewest, p) == 1
    assert percentile_bound(np.arange(fewest - 1), p) is None
    assert percentile_bound(np.arange(fewest), p) == fewest - 1  # t = 1 drops nothing


@pytest.mark.parametrize(
    ("q", "t90", "t99"),
    [(64, 1, 0), (662, 48, 1), (1024, 80, 3), (5000, 450, 33), (24576, 2348, 209)],
)
def test_table_of_dropped_tails(q, t90, t99):
    assert (dropped_tail(q, 0.9), dropped_tail(q, 0.99)) == (t90, t99)
    assert percentile_bound(np.arange(q), 0.9) == q - t90


@given(q=st.integers(1, 400), p=st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_dropped_tail_is_the_definition_in_exact_sums(q, p):
    def cdf(t):
        return sum(math.comb(q, k) * (1 - p) ** k * p ** (q - k) for k in range(t + 1))

    t = dropped_tail(q, p)
    assert t == 0 or cdf(t) <= 0.01 + 1e-9
    assert cdf(t + 1) > 0.01 - 1e-9


@given(st.lists(st.integers(1, 10**9), min_size=64, max_size=300))
def test_bound_is_never_below_the_plain_percentile(samples):
    ordered = np.sort(np.array(samples, dtype=np.int64))
    plain = np.quantile(ordered, 0.9, method="inverted_cdf")
    assert plain <= percentile_bound(ordered, 0.9) <= ordered[-1]


def test_bound_holds_in_at_least_99_of_100_repetitions():
    rng = np.random.default_rng(0)
    draws = np.sort(rng.exponential(1e6, size=(2000, 200)).astype(np.int64), axis=1)
    true_p90 = 1e6 * math.log(10)
    misses = sum(percentile_bound(row, 0.9) < true_p90 for row in draws)
    assert misses <= 30  # 1 % of 2000 is 20; three standard deviations above it is 33


@pytest.mark.parametrize(("p", "confidence"), [(0, 0.99), (1, 0.99), (0.9, 0), (0.9, 1)])
def test_impossible_percentile(p, confidence):
    with pytest.raises(ValueError, match="strictly between"):
        percentile_bound(np.arange(100), p, confidence)


def test_summary_of_known_samples():
    samples = np.arange(1, 1001)[::-1] * 1000
    got = summarise(samples, [400, 600])
    assert (got.n, got.min_ns, got.max_ns, got.mean_ns) == (1000, 1000, 1_000_000, 500_500)
    assert (got.p50_ns, got.p90_ns, got.p99_ns) == (500_000, 900_000, 990_000)
    assert got.p90_bound_ns == (1001 - dropped_tail(1000, 0.9)) * 1000
    assert got.window_medians_ns == (800_500, 300_500)
    assert got.cv == pytest.approx(samples.std() / samples.mean())


def test_slow_samples_are_kept():
    samples = np.full(1000, 1000)
    samples[[3, 500]] = 90_000_000
    got = summarise(samples, [1000])
    assert got.max_ns == 90_000_000
    assert got.mean_ns == samples.mean()


def codes(samples, windows):
    return [flag.code for flag in summarise(np.asarray(samples), windows).flags]


def test_steady_run_has_no_flag():
    assert codes([1000, 1010] * 500, [500, 500]) == []


def test_each_flag_fires_for_its_reason():
    assert codes([1000] * 661, [661]) == ["too_few_samples"]
    assert codes([1000] * 662, [662]) == []
    assert codes([1000] * 990 + [2000] * 10, [1000]) == ["cv_gt_2p5"]
    assert codes([1000] * 600 + [1040] * 600, [600, 600]) == []
    assert codes([1000] * 9500 + [1060] * 500, [9500, 500]) == ["window_drift"]


def test_flags_speak_in_words():
    flags = summarise(np.array([1, 900]), [1, 1]).flags
    assert len(flags) == 3
    assert all(flag.message and flag.remedy for flag in flags)


@pytest.mark.parametrize(("samples", "windows"), [([], []), ([1, 2], [1]), ([1, 2], [2, 0])])
def test_windows_must_hold_the_samples(samples, windows):
    with pytest.raises(ValueError, match="do not fill windows"):
        summarise(np.array(samples, dtype=np.int64), windows)
