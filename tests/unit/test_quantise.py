"""Explicit quantisation: both variants keep their rules, compute the right thing, and repeat."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from smskd_export.calibration import choose_images, observe
from smskd_export.cpu_session import CpuSession
from smskd_export.graph_maker import GraphMaker, Student
from smskd_export.modelopt_quantiser import quantise_with_modelopt
from smskd_export.onnx_graph import check_graph, make_graph, write_graph
from smskd_export.quantise import Ranges, check_quantised, quantise, scales_sha256
from smskd_export.reference import scale, session_logits, torch_logits
from smskd_export.targets import Calibration, Precision, load_target
from torch import nn

from smskd.errors import ConfigError, DataError, ExportError

SHAPE, MEAN, STD = (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FEW = Calibration(n=40, seed=3)


class Residual(nn.Module):
    """Convolutions with norms, one plain and one projected sum, pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.same = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, padding=1), nn.BatchNorm2d(16))
        self.skip = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.same(x) + x)
        x = F.relu(self.down(x) + self.skip(x))
        return self.fc(F.avg_pool2d(x, x.shape[2]).flatten(1))


class Attention(nn.Module):
    """A transformer's parts: products of features, sums without a convolution, layer norms."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.qkv, self.out, self.fc = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, 2)
        x = x + self.out((q @ k.transpose(1, 2) / 12**0.5).softmax(2) @ v)
        return self.fc(x.mean(1))


def trained(kind=Residual):
    torch.manual_seed(0)
    net = kind().train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(32, *SHAPE))
    return net.eval()


def pictures(n, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def graph(net, opset=20, half=False, batch=1):
    return onnx.load_from_string(traced(net, opset, half, batch))


@cache
def traced(net, opset, half, batch):
    proto = make_graph(net, SHAPE, MEAN, STD, opset=opset, half=half, batch=batch)
    return proto.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def net():
    return trained()


@pytest.fixture(scope="module")
def plain(net):
    """Graphs by (opset, half, batch)."""
    cases = [(17, False, 1), (20, False, 1), (20, False, 4), (20, True, 1)]
    return {case: graph(net, *case) for case in cases}


@pytest.fixture(scope="module")
def ranges(plain):
    images = choose_images(pictures(100), FEW).pixels
    return {half: Ranges(plain[20, half, 1], images, FEW) for half in (False, True)}


CASES = [(17, False, 1), (20, False, 1), (20, False, 4), (20, True, 1)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantised_graph_is_sound_and_close(plain, ranges, net, case, signed, tmp_path):
    opset, half, batch = case
    before = plain[case].SerializeToString(deterministic=True)
    if half and not signed:
        pytest.skip("no target asks for it")
    done = quantise(plain[case], ranges[half], signed=signed)
    assert plain[case].SerializeToString(deterministic=True) == before
    check_graph(done, opset, (batch, *SHAPE), 5)
    check_quantised(done, signed=signed)
    info = write_graph(done, tmp_path / "q.onnx", "int8")
    assert info.operators["Conv"] == 4
    images = pictures(50, seed=9)
    expected = torch_logits(net, images, MEAN, STD)
    got = session_logits(CpuSession(tmp_path / "q.onnx", as_written=True), images)
    assert 0 < np.abs(got - expected).mean() < 0.1 * expected.std(axis=0).mean()


def tensors(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def makers(proto):
    return {name: node for node in proto.graph.node for name in node.output}


def test_signed_variant_is_what_tensorrt_reads(plain, ranges):
    done = quantise(plain[17, False, 1], ranges[False], signed=True)
    values, made_by = tensors(done), makers(done)
    for node in done.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = values[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
    layers = [node for node in done.graph.node if node.op_type in ("Conv", "Gemm")]
    for node in layers:
        dequantise = made_by[node.input[1]]
        weights = values[made_by[dequantise.input[0]].input[0]]  # kept as floats, then quantised
        scales = values[dequantise.input[1]]
        assert scales.shape == (weights.shape[0],)
        largest = np.abs(weights.reshape(len(weights), -1)).max(1)
        np.testing.assert_allclose(scales, largest / 127, rtol=1e-2)
        assert node.input[2] in values  # the bias is in floating point
    assert len(layers) == 5


def test_of_a_sum_only_what_comes_from_elsewhere_is_quantised(plain, ranges):
    done = quantise(plain[17, False, 1], ranges[False], signed=True)
    made_by = makers(done)
    found = [
        sorted(made_by[name].op_type for name in node.input)
        for node in done.graph.node
        if node.op_type == "Add"
    ]
    assert found == [["Conv", "DequantizeLinear"]] * 2


def test_unsigned_variant_has_integer_activations_from_end_to_end(plain, ranges):
    done = quantise(plain[20, False, 1], ranges[False], signed=False)
    values, made_by = tensors(done), makers(done)
    kinds = Counter(
        values[node.input[2]].dtype.name
        for node in done.graph.node
        if node.op_type == "DequantizeLinear"
    )
    assert kinds.keys() == {"int8", "uint8", "int32"}
    assert "Relu" not in {node.op_type for node in done.graph.node}  # a zero point does its work
    for node in done.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert {made_by[name].op_type for name in node.input} == {"DequantizeLinear"}


def test_half_range_uses_seven_bits_of_the_weights(plain, ranges):
    largest = {}
    for reduced in (False, True):
        done = quantise(plain[20, False, 1], ranges[False], signed=False, reduce_range=reduced)
        int8 = [v for v in tensors(done).values() if v.dtype == np.int8 and v.ndim == 4]
        largest[reduced] = max(np.abs(v.astype(int)).max() for v in int8)
    assert largest == {False: 127, True: 64}


def test_scales_of_half_graphs_are_half(plain, ranges):
    done = quantise(plain[20, True, 1], ranges[True], signed=True)
    scales = {
        tensors(done)[node.input[1]].dtype.name
        for node in done.graph.node
        if node.op_type.endswith("eLinear")
    }
    assert scales == {"float16"}
    old = onnx.ModelProto()
    old.CopyFrom(done)
    old.opset_import[0].version = 17
    with pytest.raises(ExportError, match="not valid ONNX"):  # the reason for residue fp32 there
        check_graph(old, 17, (1, *SHAPE), 5)


def test_batch_sizes_share_their_scales(plain, ranges):
    one, four = (quantise(plain[20, False, batch], ranges[False], signed=False) for batch in (1, 4))
    assert scales_sha256(one) == scales_sha256(four)
    other = quantise(plain[20, False, 1], ranges[False], signed=False, reduce_range=True)
    assert scales_sha256(other) != scales_sha256(one)


def test_attention_keeps_its_products_and_sums(tmp_path):
    net = trained(Attention)
    proto = graph(net)
    images = choose_images(pictures(100), FEW).pixels
    for signed in (True, False):
        done = quantise(proto, Ranges(proto, images, FEW), signed=signed)
        made_by, values = makers(done), tensors(done)
        plain_sums = [
            node
            for node in done.graph.node
            if node.op_type == "Add"
            and all(n in values or made_by[n].op_type != "DequantizeLinear" for n in node.input)
        ]
        # the residual sum, and of TensorRT's graph the biases of both products with weights
        assert len(plain_sums) == (3 if signed else 1)
        products = [node for node in done.graph.node if node.op_type == "MatMul"]
        quantised = [n for n in products if made_by[n.input[1]].op_type == "DequantizeLinear"]
        assert (len(products), len(quantised)) == (4, 2)
        write_graph(done, tmp_path / "q.onnx", "int8")
        expected = torch_logits(net, pictures(50), MEAN, STD)
        got = session_logits(CpuSession(tmp_path / "q.onnx", as_written=True), pictures(50))
        assert np.abs(got - expected).mean() < 0.1 * expected.std(axis=0).mean()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(plain, ranges, tmp_path):
    done = {
        signed: quantise(plain[17, False, 1], ranges[False], signed=signed)
        for signed in (True, False)
    }
    digests = [
        hashlib.sha256(done[s].SerializeToString(deterministic=True)).hexdigest()
        for s in (True, False)
    ]
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('elsewhere', {__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "p = m.graph(m.trained(), 17)\n"
        "r = m.Ranges(m.graph(m.trained()), m.choose_images(m.pictures(100), m.FEW).pixels, m.FEW)\n"
        "for signed in (True, False):\n"
        "    q = m.quantise(p, r, signed=signed)\n"
        "    print(m.hashlib.sha256(q.SerializeToString(deterministic=True)).hexdigest())"
    )
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split() == digests, run.stderr
    assert run.stderr == ""


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_method_calibrates_silently(plain, method, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = replace(FEW, method=method)
    ranges = Ranges(plain[20, False, 1], pictures(40), recipe)
    check_quantised(quantise(plain[20, False, 1], ranges, signed=True), signed=True)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_minmax_ranges_are_those_of_pytorch(plain, net):
    seen = observe(plain[20, False, 4], pictures(10), FEW, ["Conv"])  # 10 images fill 3 batches
    normalised = (scale(pictures(10)) - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    widest = {
        tuple(np.ravel(seen[name].range_value).tolist())
        for name in seen.keys()  # noqa: SIM118 - it is no dictionary
    }
    expected = (normalised.min(), normalised.max())
    assert min(np.abs(np.subtract(found, expected)).max() for found in widest) < 1e-5


def test_calibration_images_are_fixed_by_the_seed():
    train = pictures(100)
    first, again = (choose_images(train, FEW) for _ in range(2))
    assert first.indices == again.indices
    assert len(set(first.indices)) == len(first.indices) == 40
    assert np.array_equal(first.pixels, train[list(first.indices)])
    assert first.sha256 == hashlib.sha256(train[list(first.indices)].tobytes()).hexdigest()
    assert choose_images(train, replace(FEW, seed=4)).indices != first.indices
    assert choose_images(train, replace(FEW, n=20)).indices == first.indices[:20]
    assert sorted(choose_images(train, replace(FEW, n=500)).indices) == list(range(100))


@pytest.mark.parametrize(
    "bad", [np.zeros((3, *SHAPE), np.float32), np.zeros((0, *SHAPE), np.uint8)]
)
def test_training_images_must_be_images(bad):
    with pytest.raises(DataError, match="training images must be uint8"):
        choose_images(bad, FEW)


def set_value(proto, name, change):
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            value = change(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def first(proto, op, test=lambda node: True):
    return next(n for n in proto.graph.node if n.op_type == op and test(n))


def zero_point_of_one(proto):
    set_value(proto, first(proto, "QuantizeLinear").input[2], lambda v: v + 1)


def unsigned_zero_point(proto):
    set_value(proto, first(proto, "QuantizeLinear").input[2], lambda v: v.astype(np.uint8))


def no_zero_point(proto):
    del first(proto, "QuantizeLinear").input[2]


def scale_of_zero(proto):
    set_value(proto, first(proto, "QuantizeLinear").input[1], lambda v: v * 0)


def one_scale_for_all_channels(proto):
    dequantise = makers(proto)[first(proto, "Conv").input[1]]
    for node in (dequantise, makers(proto)[dequantise.input[0]]):
        set_value(proto, node.input[1], lambda v: v.max())
        set_value(proto, node.input[2], lambda v: v.max())


def weights_left_alone(proto):
    conv = first(proto, "Conv")
    conv.input[1] = makers(proto)[makers(proto)[conv.input[1]].input[0]].input[0]


def features_left_alone(proto):
    conv = first(proto, "Conv")
    conv.input[0] = makers(proto)[makers(proto)[conv.input[0]].input[0]].input[0]


def other_axis(proto):
    dequantise = makers(proto)[first(proto, "Conv").input[1]]
    dequantise.attribute[0].i = 2


def quantised_bias(proto):
    conv = first(proto, "Conv")
    conv.input[2] = makers(proto)[conv.input[1]].output[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (zero_point_of_one, "zero point of .* is not zero"),
        (unsigned_zero_point, "zero point of .* missing or of another type"),
        (no_zero_point, "zero point of .* missing"),
        (scale_of_zero, "a scale of .* is 0"),
        (one_scale_for_all_channels, "one scale for all its channels"),
        (weights_left_alone, "weights of Conv .* are not quantised"),
        (features_left_alone, "what goes into Conv .* is not quantised"),
        (other_axis, "scales for its weights"),
        (quantised_bias, "bias of Conv .* is quantised"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_rule_of_the_signed_variant_is_checked(plain, ranges, damage, message):
    done = quantise(plain[20, False, 1], ranges[False], signed=True)
    damage(done)
    with pytest.raises(ExportError, match=message):
        check_quantised(done, signed=True)


def test_unsigned_graph_is_no_signed_one(plain, ranges):
    done = quantise(plain[20, False, 1], ranges[False], signed=False)
    with pytest.raises(ExportError, match="zero point"):
        check_quantised(done, signed=True)


def test_graph_without_layers_is_refused():
    class Sums(nn.Module):
        def forward(self, x):
            return x.sum((2, 3))

    proto = make_graph(Sums(), SHAPE, MEAN, STD, opset=20)
    with pytest.raises(ExportError, match="no layer that can be quantised"):
        quantise(proto, Ranges(proto, pictures(4), FEW), signed=True)


def test_graph_that_does_not_run_is_refused(plain):
    broken = onnx.ModelProto()
    broken.CopyFrom(plain[20, False, 1])
    broken.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    with pytest.raises(ExportError, match="cannot be calibrated"):
        Ranges(broken, pictures(4), FEW)


@pytest.fixture(scope="module")
def student(net):
    return Student(net, SHAPE, 5, MEAN, STD, pictures(60))


def test_maker_traces_each_graph_once(student, monkeypatch):
    traced = []

    def counting(*args, **kwargs):
        traced.append((kwargs["half"], kwargs["batch"]))
        return graph(student.model, **kwargs)

    monkeypatch.setattr("smskd_export.graph_maker.make_graph", counting)
    target = replace(load_target("cuda"), batches=(1, 2), calibration=FEW)
    maker = GraphMaker(student, target)
    for precision in target.precisions:
        for batch in target.batches:
            check_graph(maker.make(precision, batch), target.opset, (batch, *SHAPE), 5)
    assert sorted(traced) == [(False, 1), (False, 2), (True, 1), (True, 2)]


def test_maker_refuses_another_number_of_classes(student):
    target = load_target("cpu")
    with pytest.raises(ExportError, match="5 logits, the dataset has 7 classes"):
        GraphMaker(replace(student, num_classes=7), target).make(target.precisions[0], 1)


def test_missing_model_optimizer_is_said_with_its_command(plain):
    try:
        import modelopt.onnx  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("Model Optimizer is installed")
    signed = Precision("int8", "int8_signed", 90)
    with pytest.raises(ConfigError, match="needs NVIDIA Model Optimizer") as caught:
        quantise_with_modelopt(plain[20, False, 1], signed, FEW, pictures(4))
    assert "pip install 'smskd-bench[modelopt]'" in caught.value.hint


@pytest.mark.parametrize(
    ("precision", "calibration"),
    [
        (Precision("int8", "int8_unsigned", 90), FEW),
        (Precision("int8", "int8_signed", 90), replace(FEW, method="percentile")),
    ],
)
def test_model_optimizer_is_not_asked_for_what_it_cannot_do(plain, precision, calibration):
    with pytest.raises(ConfigError, match="Model Optimizer makes no"):
        quantise_with_modelopt(plain[20, False, 1], precision, calibration, pictures(4))


def test_model_optimizer_quantises(plain):
    pytest.importorskip("modelopt.onnx.quantization")
    for residue in ("fp32", "fp16"):
        signed = Precision("int8", "int8_signed", 90, residue=residue)
        done = quantise_with_modelopt(plain[20, False, 1], signed, FEW, pictures(8))
        check_graph(done, 20, (1, *SHAPE), 5)
