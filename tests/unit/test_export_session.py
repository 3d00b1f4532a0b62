"""Running a graph for a check: exact threads, its own batch size, quantised layers as written."""

import numpy as np
import pytest
import torch
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.reference import scale, session_logits, torch_logits
from torch import nn

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module", params=[1, 4])
def path(request, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "student.onnx"
    export_onnx(net, SHAPE, (0.5,), (0.25,), opset=20, batch=request.param, path=path)
    return path


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def test_threads_are_exact_and_operators_run_in_order(path):
    for threads in (1, 2):
        options = CpuSession(path, threads)._session.get_session_options()
        assert options.intra_op_num_threads == threads
        assert options.inter_op_num_threads == 1
        assert options.execution_mode.name == "ORT_SEQUENTIAL"
    assert CpuSession(path)._session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("n", [1, 3, 8, 11])
@pytest.mark.parametrize("as_written", [False, True])
def test_any_number_of_images_goes_through_any_batch_size(net, path, n, as_written):
    got = session_logits(CpuSession(path, as_written=as_written), pictures(n))
    assert got.shape == (n, 3)
    np.testing.assert_allclose(got, torch_logits(net, pictures(n), (0.5,), (0.25,)), atol=1e-5)


def test_logits_of_pytorch_do_not_depend_on_threads(net):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch_logits(net, pictures(600), (0.5,), (0.25,)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


class Remembers(nn.Module):
    """Keeps features of one layer for another, as wrappers of students do."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.kept = nn.Flatten(), nn.Linear(16, 3), None

    def forward(self, x):
        self.kept = self.body(x)
        for _ in range(20):  # time for another thread to come between
            self.body(x).sort()
        return self.head(self.kept)


def test_models_that_remember_get_a_copy_for_each_core():
    torch.manual_seed(0)
    net, images = Remembers(), pictures(2000)
    expected = net((torch.from_numpy(scale(images)) - 0.5) / 0.25).detach().numpy()
    np.testing.assert_allclose(torch_logits(net, images, (0.5,), (0.25,)), expected, atol=1e-5)
