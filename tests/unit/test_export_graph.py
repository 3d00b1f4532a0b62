"""The ONNX file: exact opset, one file, fixed shapes, no traces of the machine, same bytes twice."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from cases import daily
from onnx import TensorProto, helper, numpy_helper
from smskd_export.cpu_session import CpuSession
from smskd_export.frozen_net import fold_norms, frozen_copy
from smskd_export.onnx_graph import check_graph, export_onnx, make_graph, write_graph
from smskd_export.reference import session_logits, torch_logits
from torch import nn

from smskd.errors import ExportError
from smskd.models import build_model

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


def images(n, shape=SHAPE):
    return np.random.default_rng(1).integers(0, 256, (n, *shape), dtype=np.uint8)


def export(net, path, opset=20, **options):
    return export_onnx(net, SHAPE, MEAN, STD, opset=opset, path=path, **options)


CASES = [(17, False, 1), (19, True, 8), (17, True, 1), (20, False, 1), (20, False, 8)]


@pytest.fixture(scope="module", params=daily(CASES, 2), ids=lambda case: "-".join(map(str, case)))
def exported(request, tmp_path_factory):
    """Network, options, path and info of one export."""
    # float64 and training mode on purpose: the export must cope, and leave them so.
    net, (opset, half, batch) = trained_net().double().train(), request.param
    path = tmp_path_factory.mktemp("graph") / "student.onnx"
    options = {"opset": opset, "half": half, "batch": batch}
    return net, options, path, export(net, path, **options)


def test_info_describes_the_file(exported):
    _, options, path, info = exported
    data = path.read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.bytes == len(data)
    batch = options["batch"]
    assert (info.input_shape, info.output_shape) == ((batch, *SHAPE), (batch, 5))
    assert (info.batch, info.opset) == (batch, options["opset"])
    assert info.precision == ("fp16" if options["half"] else "fp32")
    assert info.operators["Conv"] == 4
    assert "BatchNormalization" not in info.operators  # folded into the convolutions


def test_file_is_what_was_asked_for(exported):
    _, options, path, _ = exported
    proto = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", options["opset"])]
    assert proto.ir_version == onnx.helper.find_min_ir_version_for(proto.opset_import)
    for name, ports in (("images", proto.graph.input), ("logits", proto.graph.output)):
        assert [port.name for port in ports] == [name]
        assert ports[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert list(path.parent.iterdir()) == [path]  # weights are inside
    kinds = {w.data_type for w in proto.graph.initializer if len(w.dims) == 4 and w.dims[0] > 1}
    assert kinds == {TensorProto.FLOAT16 if options["half"] else TensorProto.FLOAT}
    check_graph(proto, options["opset"], (options["batch"], *SHAPE), 5)


def test_file_has_no_trace_of_the_machine(exported):
    _, _, path, _ = exported
    data = path.read_bytes()
    folders = [Path.home(), Path.cwd(), Path(__file__).parent, Path(torch.__file__).parents[1]]
    for text in [*map(str, folders), __file__, "site-packages", "stack_trace", "SmallResNet"]:
        assert text.encode() not in data


def test_graph_repeats_pytorch(exported):
    net, options, path, _ = exported
    session = CpuSession(path)
    assert session.batch == options["batch"]
    got, expected = session_logits(session, images(11)), torch_logits(net, images(11), MEAN, STD)
    np.testing.assert_allclose(got, expected, atol=5e-3 if options["half"] else 1e-5)


def test_second_export_is_silent_and_gives_the_same_bytes(exported, tmp_path, capfd):
    net, options, _, info = exported
    assert export(net, tmp_path / "again.onnx", **options).sha256 == info.sha256
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("exported", daily(CASES[:2]), indirect=True)
def test_another_process_gives_the_same_bytes(exported, tmp_path):
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('elsewhere', {__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"path = m.Path({str(tmp_path / 'y.onnx')!r})\n"
        f"print(m.export(m.trained_net(), path, **{exported[1]!r}).sha256)"
    )
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == exported[3].sha256, done.stderr


def test_model_of_the_caller_is_untouched(exported):
    net, fresh = exported[0], trained_net().double()
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in net.parameters())
    assert net.conv1.bias is None
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("head", ["mean", "adaptive"])
@pytest.mark.parametrize("half", daily([False, True]))
def test_pooling_by_mean_is_written_for_opset_17(tmp_path, head, half):
    net, path = trained_net(head), tmp_path / "x.onnx"
    info = export(net, path, opset=17, half=half)
    assert (info.opset, info.operators["ReduceMean"]) == (17, 1)
    got, expected = (
        session_logits(CpuSession(path), images(3)),
        torch_logits(net, images(3), MEAN, STD),
    )
    np.testing.assert_allclose(got, expected, atol=5e-3 if half else 1e-5)


class Returns(nn.Module):
    """A model around one function of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def weighty(x):
    """Something smooth of all pixels, ``(B, 12)``: opset changes must not change it."""
    return torch.cat([x.amax((2, 3)), x.amin((2, 3)), x.prod(3).sum(2), x.norm(dim=3).mean(2)], 1)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (weighty, "ReduceMax"),
        (lambda x: torch.cat(x.chunk(2, 3)[::-1], 3).flatten(1), "Split"),
        (lambda x: torch.cat(x.split([5, 11], 3)[::-1], 3).flatten(1), "Split"),
        (lambda x: F.pad(x, (1, 2, 3, 4), value=0.5).flatten(1), "Pad"),
        (lambda x: F.pad(x, (1, 2, 3, 4), mode="reflect").flatten(1), "Pad"),
        (lambda x: F.layer_norm(x, (16,), eps=1e-3).flatten(1), "Sqrt"),
        (lambda x: F.layer_norm(x, (16, 16), torch.full((16, 16), 3.0)).flatten(1), "Sqrt"),
    ],
)
def test_older_form_of_an_operator_computes_the_same(tmp_path, function, operator):
    net, path = Returns(function), tmp_path / "x.onnx"
    info = export(net, path, opset=17)
    assert operator in info.operators
    assert "LayerNormalization" not in info.operators
    got, expected = (
        session_logits(CpuSession(path), images(3)),
        torch_logits(net, images(3), MEAN, STD),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_is_spelt_out_for_tensorrt_8_5_only(tmp_path):
    torch.manual_seed(0)
    layers = nn.Flatten(2), nn.LayerNorm(256), nn.Flatten(), nn.Linear(768, 5)
    nn.init.normal_(layers[1].weight)
    nn.init.normal_(layers[1].bias)
    net = nn.Sequential(*layers)
    assert export(net, tmp_path / "new.onnx").operators["LayerNormalization"] == 1
    for half, atol in ((False, 1e-5), (True, 5e-3)):
        info = export(net, tmp_path / "old.onnx", opset=17, half=half)
        assert info.operators["ReduceMean"] == 2
        assert "LayerNormalization" not in info.operators
        got = session_logits(CpuSession(tmp_path / "old.onnx"), images(3))
        np.testing.assert_allclose(got, torch_logits(net, images(3), MEAN, STD), atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18",
        "vit_tiny",
        "mixer_tiny",
        "swin_tiny",
        "ShuffleV2",
        "timm:convnext_atto",
    ],
)
def test_networks_of_every_kind_reach_jetpack_5(tmp_path, name, half):
    torch.manual_seed(0)
    net, path, shape = build_model(name, 10, 3, 32).eval(), tmp_path / "x.onnx", (3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.Linear):  # heads that begin at zero would prove nothing
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    info = export_onnx(net, shape, MEAN, STD, half=half, opset=17, path=path)
    assert info.opset == 17
    expected = torch_logits(net, images(4, shape), MEAN, STD)
    got = session_logits(CpuSession(path), images(4, shape))
    scale = np.abs(expected).max()
    assert scale > 0.01
    assert np.abs(got - expected).max() < scale * (0.03 if half else 1e-4)


def test_operator_that_cannot_be_written_older_is_refused(tmp_path):
    net = Returns(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear").flatten(1))
    with pytest.raises(ExportError, match=r"wrote opset 18, but .* opset 17; .*: Resize"):
        export(net, tmp_path / "x.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []
    assert export(net, tmp_path / "x.onnx", opset=18).opset == 18


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x.flatten(1), x), "must return logits.*not tuple"),
        (lambda x: x, r"must return logits of shape \(2, K\), not \(2, 3, 16, 16\)"),
        (lambda x: x.flatten(1).sum(0, keepdim=True), "must return logits"),
        (lambda x: x @ torch.zeros(7, 7), r"does not run on images of shape \(2, 3, 16, 16\)"),
        (lambda x: x.flatten(1) if x.sum() > 0 else -x.flatten(1), "PyTorch cannot export"),
        (lambda x: torch.special.bessel_j0(x.flatten(1)), "PyTorch cannot export"),
    ],
)
def test_unusable_model_is_refused(tmp_path, function, message):
    with pytest.raises(ExportError, match=message) as caught:
        export(Returns(function), tmp_path / "x.onnx", batch=2)
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_half_model_that_computes_in_float32_is_refused(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(768, 5)

        def forward(self, x):
            return F.linear(x.flatten(1).float(), self.fc.weight.float(), self.fc.bias.float())

    with pytest.raises(ExportError, match=r"half model computes .* in float32"):
        export(Wide(), tmp_path / "x.onnx", half=True)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [((0.5,), STD, "mean has 1 values"), (MEAN, (0.1, 0.2, 0.0), "std must be above 0")],
)
def test_wrong_normalisation_is_refused(tmp_path, mean, std, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(trained_net(), SHAPE, mean, std, opset=20, path=tmp_path / "x.onnx")


@pytest.fixture(scope="module")
def sound():
    return make_graph(trained_net(), SHAPE, MEAN, STD, opset=20)


def foreign_operator(proto):
    proto.graph.node[-1].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))


def free_batch(proto):
    for ports in (proto.graph.input, proto.graph.output):
        ports[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def external_weights(proto):
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value="w.bin")
    proto.graph.initializer[0].ClearField("raw_data")


def second_output(proto):
    proto.graph.output.append(
        helper.make_tensor_value_info("relu", TensorProto.FLOAT, (1, 8, 16, 16))
    )


def note(proto):
    proto.graph.node[0].doc_string = "made by me"


def metadata(proto):
    proto.metadata_props.add(key="who", value="me")


def folder_in_a_name(proto):
    proto.graph.node[0].name = f"{Path(torch.__file__).parents[1]}/x.py"


def folder_in_an_attribute(proto):
    proto.graph.node[0].attribute.append(helper.make_attribute("where", f"{Path.cwd()}/x"))
    proto.graph.node[0].op_type = "Sub"


def values_as_shape(proto):
    """Reshape to a shape that is computed: the number of pixels above zero."""
    graph = proto.graph
    graph.node[-1].output[0] = "before"
    graph.initializer.append(numpy_helper.from_array(np.int64([1]), "one"))
    graph.node.extend(
        [
            helper.make_node("NonZero", ["before"], ["where"]),
            helper.make_node("Slice", ["where", "one", "one"], ["none"]),
            helper.make_node("ReduceSum", ["none"], ["zero"], keepdims=0),
            helper.make_node("Cast", ["zero"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["before", "float"], ["logits"]),
        ]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign_operator, "operators outside ONNX: com.example"),
        (free_batch, "graph's input is"),
        (external_weights, "in another file"),
        (second_output, "graph's output is"),
        (note, "holds notes in doc_string: 'made by me'"),
        (metadata, "holds notes in metadata_props"),
        (folder_in_a_name, "names a folder of this machine .* in name"),
        (folder_in_an_attribute, "not valid ONNX"),
        (values_as_shape, "open shape: 'where' of NonZero"),
        (lambda proto: proto.graph.node.pop(), "not valid ONNX"),
        (lambda proto: setattr(proto.opset_import[0], "version", 19), "wrote opset 19"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_check_refuses_what_it_is_for(sound, damage, message):
    proto = onnx.ModelProto()
    proto.CopyFrom(sound)
    check_graph(proto, 20, (1, *SHAPE), 5)
    damage(proto)
    with pytest.raises(ExportError, match=message) as caught:
        check_graph(proto, 20, (1, *SHAPE), 5)
    assert "\n" not in caught.value.message


def test_other_number_of_classes_is_refused(sound):
    with pytest.raises(ExportError, match="graph's output is"):
        check_graph(sound, 20, (1, *SHAPE), 6)


def test_written_graph_is_described(sound, tmp_path):
    info = write_graph(sound, tmp_path / "g.onnx", "mine")
    assert (info.precision, info.path, info.batch) == ("mine", "g.onnx", 1)
    assert sum(info.operators.values()) == len(sound.graph.node)


def test_batch_norms_move_into_their_convolutions():
    net = frozen_copy(trained_net())
    probe = torch.randn(2, *SHAPE)
    before = net(probe)
    fold_norms(net, probe)
    torch.testing.assert_close(net(probe), before, rtol=1e-5, atol=1e-5)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(norm(probe.repeat(1, 16, 1, 1)[:, : norm.num_features]),
                           probe.repeat(1, 16, 1, 1)[:, : norm.num_features])  # fmt: skip


class UsesBetween(nn.Module):
    """What lies between convolution and norm is used again: folding would change the result."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.norm(x) + x).flatten(1)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norms = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ModuleList([nn.BatchNorm2d(3)] * 1),
        )

    def forward(self, x):
        return self.norms[0](self.conv(self.norms[0](self.conv(x)))).flatten(1)


@pytest.mark.parametrize("kind", [UsesBetween, CalledTwice])
def test_norms_that_cannot_be_folded_stay(kind):
    torch.manual_seed(0)
    net = kind().train()
    with torch.no_grad():
        for _ in range(50):
            net(torch.randn(8, *SHAPE) * 2 + 1)
    net = frozen_copy(net)
    probe, state = torch.randn(2, *SHAPE), {k: v.clone() for k, v in net.state_dict().items()}
    before = net(probe)
    fold_norms(net, probe)
    assert torch.equal(net(probe), before)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_broken_file_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot load broken\.onnx"):
        CpuSession(path)
