"""The parity gate passes the graph of a model and stops anything else, on real ONNX Runtime."""

import json
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.parity import check_parity
from smskd_export.reference import session_logits, torch_logits
from smskd_export.targets import Precision
from torch import nn

from smskd.errors import DataError, ExportError

SHAPE, MEAN, STD = (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LIMITS = Precision("fp32", "fp32", min_agreement=99.0, max_abs_diff=1e-4, max_drop=1.0)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module", params=[17, 20])
def graph(request, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "student.onnx"
    export_onnx(net, SHAPE, MEAN, STD, opset=request.param, path=path)
    return path


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (301, *SHAPE), dtype=np.uint8), rng.integers(0, 4, 301)


def check(net, graph, data, mean=MEAN, limits=LIMITS):
    images, labels = data
    reference = torch_logits(net, images, mean, STD)
    return check_parity(reference, session_logits(CpuSession(graph), images), labels, limits)


def test_graph_of_the_model_passes(net, graph, data):
    parity = check(net, graph, data)
    assert parity.passed
    assert (parity.n, parity.change.n) == (301, 301)
    assert parity.agreement == 100
    assert parity.torch_top1 == parity.onnx_top1
    assert (parity.change.difference, parity.change.p) == (0, 1)
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
def test_logits_that_are_not_finite_fail_and_can_be_written(net, graph, data, tmp_path, bad):
    lenient = Precision("int8", "int8_unsigned", min_agreement=0, max_drop=100)
    parity = check(
        net, tampered(graph, tmp_path, lambda w: np.full_like(w, bad)), data, MEAN, lenient
    )
    assert not parity.passed
    assert parity.reason == "some logits are not finite"
    assert (parity.max_abs_diff, parity.mean_abs_diff, parity.min_cosine) == (1e308, 1e308, 0)
    json.dumps(asdict(parity), allow_nan=False)


def test_other_normalisation_fails(net, graph, data):
    assert not check(net, graph, data, mean=(0.4, 0.4, 0.3)).passed


def logits_of(classes, k=4):
    return np.eye(k, dtype=np.float32)[np.asarray(classes)]


def gate(got, labels, reference=None, accuracy=True, **limits):
    limits = {"min_agreement": 0, "max_drop": 100.0, **limits}
    reference = logits_of(labels) if reference is None else reference
    labels = np.asarray(labels)
    return check_parity(
        reference,
        logits_of(got),
        labels,
        Precision("p", "int8_unsigned", **limits),
        accuracy=accuracy,
    )


def test_each_limit_is_its_own():
    labels = [0, 1, 2, 3] * 25
    got = [1, *labels[1:]]
    assert gate(got, labels).passed
    assert gate(got, labels, min_agreement=99.0).passed
    assert "99.00 % of the images (limit 99.5" in gate(got, labels, min_agreement=99.5).reason
    assert gate(got, labels, max_drop=1.0).passed
    assert gate(got, labels, max_drop=0.9).reason == "1.00 points of top-1 are lost (limit 0.9)"
    assert gate(got, labels, max_drop=0.9, accuracy=False).passed
    assert gate(got, labels, max_abs_diff=1.0).passed
    assert "a logit differs by 1 (limit 0.5)" in gate(got, labels, max_abs_diff=0.5).reason


def test_a_gain_is_no_loss_and_pairs_are_counted():
    labels = [0, 1, 2, 3] * 25
    reference = logits_of([3, 3, *labels[2:]])  # two wrong: the first and the second image
    got = gate([0, 1, 0, *labels[3:]], labels, reference, max_drop=0.0)
    assert got.passed
    assert (got.change.gained, got.change.lost) == (2, 1)
    assert got.change.difference == pytest.approx(1.0)
    assert got.onnx_top1 - got.torch_top1 == pytest.approx(got.change.difference)


def test_cosine_of_logits_that_are_zero():
    zero, one = np.zeros((2, 4), np.float32), logits_of([0, 0])
    limits = Precision("p", "fp32", 0, max_drop=100)
    for a, b, cosine in ((zero, zero, 1), (zero, one, 0), (one, zero, 0), (one, -one, -1)):
        assert check_parity(a, b, np.array([0, 0]), limits).min_cosine == cosine


@pytest.mark.parametrize(
    ("reference", "got", "labels"), [((2, 4), (3, 4), 2), ((2, 4), (2, 4), 3), ((0, 4), (0, 4), 0)]
)
def test_what_cannot_be_compared_is_refused(reference, got, labels):
    with pytest.raises(DataError, match="cannot be compared"):
        check_parity(
            np.zeros(reference, np.float32),
            np.zeros(got, np.float32),
            np.zeros(labels, int),
            LIMITS,
        )
