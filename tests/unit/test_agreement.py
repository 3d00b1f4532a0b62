"""When a result that was trained again is the recorded one: bits, else accuracy by two rules."""

import copy

import pytest
import torch
from scipy.stats import t as student_t
from smskd_bench.agreement import T_QUANTILES, Outputs, compare, prediction_interval

LABELS = torch.arange(1000) % 10
HISTORY = [{"epoch": 1, "loss": 2.0, "seconds": 1.5, "images_per_s": 10.0}]


def outputs(wrong, sha="a", **changes):
    """A result that is wrong on the images ``wrong``."""
    predictions = LABELS.clone()
    predictions[list(wrong)] = (predictions[list(wrong)] + 1) % 10
    top1 = 100.0 - len(wrong) / 10
    record = {"test": {"top1": top1, "loss": 0.5}, "kept": None, "history": copy.deepcopy(HISTORY)}
    return Outputs(record | changes, {"student.safetensors": sha}, predictions)


def test_same_bits_whatever_the_time_it_took():
    again = outputs(range(10))
    again.record["history"][0]["seconds"] = 99.0
    assert compare(outputs(range(10)), again, LABELS, [99.0]).verdict == "same bits"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", [HISTORY[0] | {"loss": 2.1}]),
        ("history", []),
        ("kept", {"kept": 99.0}),
        ("test", {"top1": 99.0, "loss": 0.4}),
    ],
    ids=["a loss", "a row", "kept", "test loss"],
)
def test_numbers_that_are_not_those_of_the_same_bits(name, value):
    found = compare(outputs(range(10), **{name: value}), outputs(range(10)), LABELS, [])
    assert found.verdict == "differs"
    assert name in found.lines[0]


@pytest.mark.parametrize("told", [99.5, None, "much"])
def test_an_accuracy_that_is_not_that_of_the_predictions(told):
    edited = outputs(range(10), test={"top1": told})
    found = compare(edited, outputs(range(10)), LABELS, [99.5])
    assert found.verdict == "differs"
    assert "its own predictions are right in 99.0000 %" in found.lines[0]


def test_predictions_of_another_test_set():
    found = compare(outputs([]), outputs([]), LABELS[:10], [])
    assert found.verdict == "differs"


def test_other_bits_that_the_test_images_cannot_tell_apart():
    found = compare(outputs(range(10)), outputs(range(5, 18), "b"), LABELS, [99.0])
    assert found.verdict == "other bits, accuracy agrees"
    assert "99.00 % recorded, 98.70 % again" in found.lines[0]
    assert "5 gained, 8 lost" in found.lines[0]
    assert "too few" in found.lines[1]


def test_other_bits_that_they_can_tell_apart():
    found = compare(outputs(range(10)), outputs(range(60), "b"), LABELS, [99.0, 98.9])
    assert found.verdict == "differs"


def test_the_spread_of_the_seeds_may_allow_what_the_images_tell_apart():
    seeds = [99.0, 94.0, 97.0]
    found = compare(outputs(range(10)), outputs(range(60), "b"), LABELS, seeds)
    assert found.verdict == "other bits, accuracy agrees"
    assert "its 3 seeds" in found.lines[1]
    narrow = compare(outputs(range(10)), outputs(range(60), "b"), LABELS, [99.0, 99.1, 98.9])
    assert narrow.verdict == "differs"


def test_the_interval_is_that_of_students_t():
    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        assert quantile == pytest.approx(student_t.ppf(0.975, degrees), abs=1e-4)
    low, high = prediction_interval([1.0, 2.0, 3.0])
    half = student_t.ppf(0.975, 2) * (1 + 1 / 3) ** 0.5
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert prediction_interval([1.0, 2.0]) is None
    low, high = prediction_interval([float(i) for i in range(40)])
    assert high - low > 2 * student_t.ppf(0.975, 39) * 11.6
