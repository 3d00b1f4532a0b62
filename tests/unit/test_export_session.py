"""Timing through ONNX Runtime: exact threads, both minimums of a window, every sample kept."""

import gc
import itertools

import numpy as np
import pytest
import torch
from smskd_export.cpu_session import CpuSession, measure_latency
from smskd_export.onnx_graph import export_onnx
from smskd_export.targets import Protocol, load_target
from torch import nn

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    path = tmp_path_factory.mktemp("session") / "student.onnx"
    export_onnx(net, SHAPE, (0.5,), (0.25,), load_target("cpu"), path)
    return path


class TickingClock:
    """Moves on by ``step_ns`` at every reading, so that counts can be foretold."""

    def __init__(self, step_ns):
        self.readings = itertools.count(0, step_ns)

    def __call__(self):
        return next(self.readings)


class Recording(CpuSession):
    """Remembers the shape and sum of what it was given, and whether gc was on."""

    def __init__(self, path):
        super().__init__(path)
        self.seen, self.gc_was_on = [], set()

    def run(self, images):
        self.seen.append((images.shape, float(images.sum())))
        self.gc_was_on.add(gc.isenabled())
        return super().run(images)


def test_threads_are_exact_and_operators_run_in_order(path):
    for threads in (1, 2):
        options = CpuSession(path, threads)._session.get_session_options()
        assert options.intra_op_num_threads == threads
        assert options.inter_op_num_threads == 1
        assert options.execution_mode.name == "ORT_SEQUENTIAL"
    assert CpuSession(path)._session.get_providers() == ["CPUExecutionProvider"]
    assert CpuSession(path).load_ns > 0


def test_minimum_count_rules_when_time_is_short(path):
    timing = measure_latency(CpuSession(path), SHAPE, Protocol(0, 0, 30, 3), TickingClock(10))
    assert timing.window_sizes == (30, 30, 30)
    assert timing.samples_ns.dtype == np.int64
    assert timing.samples_ns.tolist() == [10] * 90
    assert (timing.first_ns, timing.timer_overhead_ns) == (10, 10)


def test_minimum_time_rules_when_inferences_are_fast(path):
    # One inference reads the clock three times: 3 ms each, so 0.3 s hold about 100.
    clock = TickingClock(1_000_000)
    timing = measure_latency(CpuSession(path), SHAPE, Protocol(0, 0.3, 5, 2), clock)
    assert all(95 <= size <= 105 for size in timing.window_sizes)
    assert sum(timing.window_sizes) == timing.samples_ns.size


def test_inputs_vary_and_the_collector_rests(path):
    session = Recording(path)
    measure_latency(session, SHAPE, Protocol(0, 0, 100, 1), TickingClock(1))
    assert len(session.seen) == 1 + 10 + 100  # the first, the warm-up, the window
    assert {shape for shape, _ in session.seen} == {(1, *SHAPE)}
    assert len({total for _, total in session.seen}) == 64
    assert session.gc_was_on == {False}
    assert gc.isenabled()


def test_real_clock_measures_real_time(path):
    timing = measure_latency(CpuSession(path), SHAPE, Protocol(0.01, 0.02, 20, 2))
    assert timing.samples_ns.min() > 0
    assert min(timing.window_sizes) >= 20
    assert timing.samples_ns.sum() < 10e9
