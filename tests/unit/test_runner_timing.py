"""Windows, batches and gates of the device runner, without a device."""

import gc

import numpy as np
import pytest
from smskd_export.runner import run


class Clock:
    """A backend and a clock that belong together: an inference takes ``step`` seconds."""

    def __init__(self, step, gpu=False):
        self.now, self.step, self.gpu = 0, round(step * 1e9), gpu
        self.slots, self.collecting = [], set()

    def perf_counter_ns(self):
        return self.now

    def time_one(self, slot):
        self.slots.append(slot)
        self.collecting.add(gc.isenabled())
        self.now += self.step
        nanoseconds = self.step + len(self.slots)
        return (nanoseconds, 7, 3) if self.gpu else (nanoseconds, None, None)


def window(monkeypatch, clock, *arguments):
    monkeypatch.setattr(run.time, "perf_counter_ns", clock.perf_counter_ns)
    return run.time_window(clock, *arguments)


def test_minimum_count_rules_when_time_is_short(monkeypatch):
    times = window(monkeypatch, Clock(1e-3), 4, 0.0, 30)
    assert len(times.host) == 30
    assert (times.gpu, times.enqueue) == ([], [])


def test_minimum_time_rules_when_inferences_are_fast(monkeypatch):
    assert len(window(monkeypatch, Clock(1e-3), 4, 0.2, 30).host) == pytest.approx(200, abs=1)


def test_every_inference_is_a_sample_in_order(monkeypatch):
    clock = Clock(0.01, gpu=True)
    times = window(monkeypatch, clock, 3, 0.05, 8)
    assert times.host == [10_000_000 + n for n in range(1, 9)]
    assert (times.gpu, times.enqueue) == ([7] * 8, [3] * 8)
    assert clock.slots == [0, 1, 2, 0, 1, 2, 0, 1]
    assert times.span == [0, 80_000_000]


def test_inputs_go_on_where_the_last_window_ended(monkeypatch):
    clock = Clock(0.01)
    window(monkeypatch, clock, 5, 0.0, 4, 3)
    assert clock.slots == [3, 4, 0, 1]


def test_the_collector_rests_while_timing(monkeypatch):
    clock = Clock(0.01)
    window(monkeypatch, clock, 1, 0.0, 3)
    assert clock.collecting == {False}
    assert gc.isenabled()


def test_timer_overhead_is_small_and_not_negative():
    assert 0 <= run.timer_overhead() < 100_000


@pytest.mark.parametrize(("n", "batch"), [(5, 1), (5, 3), (2, 5), (7, 7)])
def test_a_pool_gives_every_start_a_whole_batch(n, batch):
    images = np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)
    pool = run.rolling(images, batch)
    assert pool.flags.c_contiguous
    for start in range(n):
        part = pool[start : start + batch]
        assert part.flags.c_contiguous
        assert part[:, 0, 0, 0].tolist() == [(start + k) % n for k in range(batch)]


def test_batches_cover_all_images_and_fill_the_last_one():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 1, 2, 2), 51, np.uint8)
    parts = list(run.in_batches(images, 2))
    assert [count for count, _ in parts] == [2, 2, 1]
    assert {part.shape for _, part in parts} == {(2, 1, 2, 2)}
    assert all(part.dtype == np.float32 for _, part in parts)
    values = [float(v) for count, part in parts for v in part[:count, 0, 0, 0]]
    assert values == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert parts[-1][1][1, 0, 0, 0] == pytest.approx(0.8)


def test_images_are_scaled_as_pytorch_scales_them():
    import torch

    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    here = np.concatenate([part for _, part in run.in_batches(images, 16)])
    there = torch.from_numpy(images).float().div(255).numpy()
    assert (here == there).all()


class Fixed:
    """A backend that gives prepared logits, in order."""

    def __init__(self, logits):
        self.logits, self.at = logits, 0

    def run(self, images):
        part = self.logits[self.at : self.at + len(images)]
        self.at += len(images)
        filler = np.repeat(self.logits[-1:], len(images) - len(part), axis=0)
        return np.concatenate([part, filler])


def parity(logits, wanted, batch=2):
    inputs = np.zeros((len(wanted), 1, 2, 2), np.float32)
    return run.check_parity(Fixed(logits), inputs, wanted, batch)


LOGITS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 0, 0], [0, 5, 0]], np.float32)


def test_parity_of_equal_logits():
    found = parity(LOGITS, LOGITS)
    assert (found["n"], found["max_abs_diff"], found["agreement"]) == (5, 0, 100)
    assert found["min_cosine"] == pytest.approx(1)


def test_parity_counts_what_differs():
    other = LOGITS.copy()
    other[1] = [2, 0, 0]
    found = parity(other, LOGITS)
    assert found["max_abs_diff"] == 2
    assert found["mean_abs_diff"] == pytest.approx(4 / 15)
    assert found["agreement"] == 80
    assert found["min_cosine"] == pytest.approx(0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_parity_of_logits_that_are_no_numbers_can_be_written_as_json(poison):
    other = LOGITS.copy()
    other[2, 1] = poison
    found = parity(other, LOGITS)
    assert found["max_abs_diff"] == 1e308
    with pytest.raises(run.RowError, match="not finite"):
        run.parity_gate(found, {"max_abs_diff": None, "min_agreement": 0.0})


def test_parity_of_another_number_of_classes():
    with pytest.raises(run.RowError, match=r"\(5, 2\) logits"):
        parity(LOGITS[:, :2], LOGITS)


@pytest.mark.parametrize(
    ("diff", "agreement", "passes"),
    [(0.1, 90.0, True), (0.11, 90.0, False), (0.1, 89.9, False), (0.0, 100.0, True)],
)
def test_the_parity_gate_holds_exactly_at_its_limits(diff, agreement, passes):
    found = {"max_abs_diff": diff, "agreement": agreement}
    limits = {"max_abs_diff": 0.1, "min_agreement": 90.0}
    if passes:
        run.parity_gate(found, limits)
    else:
        with pytest.raises(run.RowError) as caught:
            run.parity_gate(found, limits)
        assert caught.value.status == "gate_failed"


def test_accuracy_without_enough_classes_for_a_top5():
    labels, torch_classes = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 2, 0, 0], np.int32)
    found = run.accuracy_record(LOGITS, labels, torch_classes, "f.npy")
    assert found == {
        "n": 5, "top1": 80.0, "top5": None, "agreement": pytest.approx(80.0), "classes_file": "f.npy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "oldest", "newest", "fits"),
    [
        ("10.3.0.26", "10.3", "10", True), ("10.13.3", "10.3", "10", True),
        ("11.0.0", "10.3", "10", False), ("11.4.1", "10.3", "11", True),
        ("8.6.2.3", "8.5", "8.6", True), ("10.0", "8.5", "8.6", False),
        ("8.4.3", "8.5", "", False), ("10.13", "10.3", "", True), ("1.19.2", "1.17", "", True),
        ("1.9.0", "1.17", "", False), ("1.17.0+cu12", "1.17", "1.17", True), ("9", "", "", True),
    ],
)  # fmt: skip
def test_versions_are_numbers_not_text(version, oldest, newest, fits):
    assert run.version_fits(version, oldest, newest) is fits


def test_the_bundle_offers_what_may_be_waived():
    assert "runtime_missing" not in run.WAIVABLE
    assert not {"bundle", "bundle_id", "test_set", "busy", "out"} & set(run.WAIVABLE)
