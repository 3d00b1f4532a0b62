"""The ONNX file: exact opset, one file, known ports, no traces of the machine, same bytes twice."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.parity import torch_logits
from smskd_export.targets import load_target
from torch import nn

from smskd.errors import ExportError

SHAPE, MEAN, STD = (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class SmallResNet(nn.Module):
    """Stem, one strided residual block with a projection, batch norm everywhere, a linear head."""

    def __init__(self, head="avg_pool"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.skip = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)
        self.head = head

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(y + self.skip(x))
        if self.head == "mean":
            return self.fc(x.mean((2, 3)))
        if self.head == "adaptive":
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.fc(F.avg_pool2d(x, x.shape[2]).flatten(1))


def trained_net(head="avg_pool"):
    """A network whose batch norm statistics are not the trivial ones."""
    torch.manual_seed(0)
    net = SmallResNet(head)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, *SHAPE) * 3 - 1)
    return net


def export(net, target, path):
    return export_onnx(net, SHAPE, MEAN, STD, target, path)


@pytest.fixture(scope="module", params=["cpu", "jetson"])
def exported(request, tmp_path_factory):
    """Network, target, path and info of one export for each shipped target."""
    # float64 and training mode on purpose: the export must cope, and leave them so.
    net, target = trained_net().double().train(), load_target(request.param)
    path = tmp_path_factory.mktemp("graph") / "student.onnx"
    return net, target, path, export(net, target, path)


def test_info_describes_the_file(exported):
    _, target, path, info = exported
    data = path.read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.bytes == len(data)
    batch = "batch" if target.dynamic_batch else 1
    assert (info.input_shape, info.output_shape) == ((batch, *SHAPE), (batch, 5))
    assert info.operators["Conv"] == 4
    assert "BatchNormalization" not in info.operators  # folded into the convolutions


def test_file_is_what_the_target_asked_for(exported):
    _, target, path, _ = exported
    proto = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", target.opset)]
    assert proto.ir_version == onnx.helper.find_min_ir_version_for(proto.opset_import)
    assert [v.name for v in proto.graph.input] == ["images"]
    assert [v.name for v in proto.graph.output] == ["logits"]
    assert list(path.parent.iterdir()) == [path]  # weights are inside


def test_file_has_no_trace_of_the_machine(exported):
    _, _, path, _ = exported
    data = path.read_bytes()
    folders = [Path.home(), Path.cwd(), Path(__file__).parent, Path(torch.__file__).parents[1]]
    for text in [*map(str, folders), __file__, "site-packages", "stack_trace", "SmallResNet"]:
        assert text.encode() not in data


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_graph_repeats_pytorch(exported, batch):
    net, target, path, _ = exported
    images = np.random.default_rng(1).integers(0, 256, (batch, *SHAPE), dtype=np.uint8)
    session = CpuSession(path)
    size = batch if target.dynamic_batch else 1
    assert session.batch == (None if target.dynamic_batch else 1)
    scaled = images.astype(np.float32) / 255
    got = np.concatenate([session.run(scaled[i : i + size]) for i in range(0, batch, size)])
    np.testing.assert_allclose(got, torch_logits(net, images, MEAN, STD), atol=1e-5)


def test_second_export_is_silent_and_gives_the_same_bytes(exported, tmp_path, capfd):
    net, target, _, info = exported
    assert export(net, target, tmp_path / "again.onnx").sha256 == info.sha256
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("exported", ["jetson"], indirect=True)
def test_another_process_gives_the_same_bytes(exported, tmp_path):
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('elsewhere', {__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "t = m.load_target('jetson')\n"
        f"print(m.export(m.trained_net(), t, m.Path({str(tmp_path / 'y.onnx')!r})).sha256)"
    )
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == exported[3].sha256, done.stderr


def test_model_of_the_caller_is_untouched(exported):
    net, fresh = exported[0], trained_net().double()
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in net.parameters())
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())


def test_pooling_by_mean_is_refused_below_opset_18(tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(ExportError, match=r"opset 18, but target 'jetson'.* ReduceMean") as caught:
        export(trained_net("mean"), load_target("jetson"), path)
    assert "F.avg_pool2d" in caught.value.hint
    assert not path.exists()


def test_adaptive_pooling_is_fine_from_opset_18(tmp_path):
    target = replace(load_target("cpu"), opset=18)
    info = export(trained_net("adaptive"), target, tmp_path / "x.onnx")
    assert (info.opset, "ReduceMean" in info.operators) == (18, True)


class Returns(nn.Module):
    """A model around one function of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x.flatten(1), x), "must return logits.*not tuple"),
        (lambda x: x, r"must return logits of shape \(2, K\), not \(2, 3, 16, 16\)"),
        (lambda x: x.flatten(1).sum(0, keepdim=True), "must return logits"),
        (lambda x: x @ torch.zeros(7, 7), r"does not run on images of shape \(2, 3, 16, 16\)"),
        (lambda x: x.flatten(1) if x.sum() > 0 else -x.flatten(1), "PyTorch cannot export"),
        (lambda x: torch.special.bessel_j0(x.flatten(1)), "PyTorch cannot export"),
        (lambda x: x.reshape(2, -1), "graph's output is"),
    ],
)
def test_unusable_model_is_refused(tmp_path, function, message):
    with pytest.raises(ExportError, match=message) as caught:
        export(Returns(function), load_target("cpu"), tmp_path / "x.onnx")
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [((0.5,), STD, "mean has 1 values"), (MEAN, (0.1, 0.2, 0.0), "std must be above 0")],
)
def test_wrong_normalisation_is_refused(tmp_path, mean, std, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(trained_net(), SHAPE, mean, std, load_target("cpu"), tmp_path / "x.onnx")


def test_broken_file_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot load broken\.onnx"):
        CpuSession(path)
