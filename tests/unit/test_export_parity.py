"""The parity gate passes the graph of a model and stops anything else, on real ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.parity import check_parity
from smskd_export.targets import ParityThresholds, load_target
from torch import nn

from smskd.errors import DataError, ExportError

SHAPE, MEAN, STD = (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LIMITS = ParityThresholds(max_abs_diff=1e-4, min_agreement=99.0)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module", params=["cpu", "jetson"])
def graph(request, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "student.onnx"
    export_onnx(net, SHAPE, MEAN, STD, load_target(request.param), path)
    return path


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (301, *SHAPE), dtype=np.uint8), rng.integers(0, 4, 301)


def check(net, graph, data, mean=MEAN, limits=LIMITS):
    return check_parity(net, CpuSession(graph), *data, mean, STD, limits)


def test_graph_of_the_model_passes(net, graph, data):
    parity = check(net, graph, data)
    assert parity.passed
    assert parity.n == 301
    assert parity.agreement == 100
    assert parity.torch_top1 == parity.onnx_top1
    assert 0 <= parity.mean_abs_diff <= parity.max_abs_diff < 1e-5
    assert parity.min_cosine == pytest.approx(1, abs=1e-9)
    parity.require()


def test_accuracy_is_that_of_the_model(net, graph, data):
    images, labels = data
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        predicted = net((torch.from_numpy(images) / 255 - mean) / std).argmax(1)
    expected = 100 * (predicted == torch.from_numpy(labels)).double().mean().item()
    assert check(net, graph, data).torch_top1 == pytest.approx(expected)


def tampered(graph, tmp_path, change):
    """Copy of a graph with ``change`` applied to its last weight matrix ``(K, D)``."""
    proto = onnx.load(graph)
    tensor = next(t for t in proto.graph.initializer if list(t.dims) == [4, 288])
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    path = tmp_path / "tampered.onnx"
    onnx.save(proto, path)
    return path


def test_swapped_classes_fail(net, graph, data, tmp_path):
    parity = check(net, tampered(graph, tmp_path, lambda w: w[[1, 0, 2, 3]].copy()), data)
    assert not parity.passed
    assert parity.agreement < 90
    assert "a logit differs by" in parity.reason
    assert "same class for" in parity.reason
    with pytest.raises(ExportError, match="does not repeat the PyTorch model: a logit differs"):
        parity.require()


def test_small_change_of_one_weight_fails_though_classes_agree(net, graph, data, tmp_path):
    def nudge(weights):
        weights = weights.copy()
        weights[2, 5] += 1e-3
        return weights

    parity = check(net, tampered(graph, tmp_path, nudge), data)
    assert not parity.passed
    assert parity.agreement > 99
    assert "same class" not in parity.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(net, graph, data, tmp_path, bad):
    parity = check(net, tampered(graph, tmp_path, lambda w: np.full_like(w, bad)), data)
    assert not parity.passed
    assert "not finite" in parity.reason


def test_other_normalisation_fails(net, graph, data):
    assert not check(net, graph, data, mean=(0.4, 0.4, 0.3)).passed


class WrongForOneImage(CpuSession):
    """Right at every batch size but 1, as a kernel for small shapes can be."""

    def run(self, images):
        return super().run(images) + (0.5 if len(images) == 1 else 0)


def test_failure_in_single_image_runs_only_is_seen(net, graph, data):
    data = tuple(part[:300] for part in data)  # leaves a rest of 44, not 1, at batch 64
    parity = check_parity(net, WrongForOneImage(graph), *data, MEAN, STD, LIMITS)
    assert "a logit differs by 0.5" in parity.reason
    assert not parity.passed


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, *SHAPE), np.float32), np.zeros(2, int), "must be uint8"),
        (np.zeros((0, *SHAPE), np.uint8), np.zeros(0, int), "must be uint8 of shape"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), "must be uint8 of shape"),
        (np.zeros((2, *SHAPE), np.uint8), np.zeros(3, int), "2 test images need as many labels"),
    ],
)
def test_wrong_test_set_is_refused(net, graph, images, labels, message):
    with pytest.raises(DataError, match=message):
        check(net, graph, (images, labels))
