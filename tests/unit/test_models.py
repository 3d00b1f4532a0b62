import csv
import hashlib
import platform
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import daily
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smskd.cost import model_cost, shapes_on_meta
from smskd.errors import ConfigError, UnknownNameError
from smskd.models import MODELS, build_model, model_entry, taps_of
from smskd.taps import MAPS, POOLED, PREACT, SPATIAL, TappedModel

ROLES = frozenset({MAPS, PREACT, POOLED})
GOLDEN = Path(__file__).parents[1] / "golden" / "peer_params.csv"
ROWS = list(csv.DictReader(GOLDEN.read_text().splitlines()))
SMALL = ("resnet8_quarter", "resnet8", "wrn_16_1")
OURS = [name for name, entry in MODELS.items() if not entry.extra]
NARROW = {"resnet8_quarter", "resnet8_half", "resnet14_half"}
"""No published code has them."""


def row_id(row):
    return row["model"]


def sizes(text):
    return tuple(tuple(int(n) for n in shape.split("x")) for shape in text.split())


def seeded(name, num_classes=100, in_channels=3):
    torch.manual_seed(0)
    return build_model(name, num_classes, in_channels)


def short_sha(data):
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_network_equals_the_published_one(row):
    model = seeded(row["model"])
    state = model.state_dict()
    keys = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert short_sha(keys.encode()) == row["state_keys_sha"]
    assert len(state) == int(row["state_keys"])
    assert sum(b.numel() for b in model.buffers()) == int(row["buffers"])
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1234))
    with torch.no_grad():
        logits = model(images)
    expected = torch.tensor([float(z) for z in row["train_logits4_seed0_x1234_b8"].split()])
    torch.testing.assert_close(logits[0, :4], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="torch's vectorised normal_ may round differently on other processors",
)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_seeded_initial_bytes_equal_the_published_ones(row):
    state = seeded(row["model"]).state_dict()
    assert short_sha(b"".join(t.numpy().tobytes() for t in state.values())) == row["init_sha_seed0"]


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_costs_and_tap_shapes_equal_the_published_ones(row):
    with torch.device("meta"):
        model = build_model(row["model"], 100)
    cost = model_cost(model, (3, 32, 32))
    assert (cost.parameters, cost.macs) == (int(row["params"]), int(row["macs"]))
    shapes = shapes_on_meta(row["model"], 100, (3, 32, 32))
    assert shapes.maps == sizes(row["feat_shapes"])
    assert shapes.preact == sizes(row["preact_shapes"])
    assert shapes.pooled == int(row["pooled"])
    assert shapes.num_classes == 100


@pytest.mark.parametrize("image_shape", daily([(2, 9, 13), (1, 8, 8)]))
@pytest.mark.parametrize("name", OURS)
def test_every_model_takes_any_image_of_8_pixels_or_more(name, image_shape):
    shapes = shapes_on_meta(name, 10, image_shape)
    assert shapes.num_classes == 10
    assert len(shapes.maps) == len(shapes.preact) >= 4
    classifier = shapeless(name).get_submodule(taps_of(name).classifier)
    assert (classifier.in_features, classifier.out_features) == (shapes.pooled, 10)
    assert [m[1:] for m in shapes.maps] == [m[1:] for m in shapes.preact]
    assert shapes.spatial[0] == shapes.pooled
    assert shapes.spatial[1:] <= shapes.maps[-1][1:]


@pytest.mark.parametrize("name", OURS)
def test_the_spatial_map_averages_to_the_pooled_feature(name):
    # In training mode: untrained running statistics let features fade to nothing.
    model, images = seeded(name, 10), torch.rand(2, 3, 16, 16)
    roles = frozenset({POOLED, SPATIAL})
    with TappedModel(model, taps_of(name), roles) as tapped, torch.no_grad():
        out = tapped(images)
    assert out.pooled.abs().max() > 0
    torch.testing.assert_close(out.spatial.mean((2, 3)), out.pooled, rtol=1e-5, atol=1e-6)


DOCS = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
LISTED = re.findall(
    r"^\| `([\w]+)` \| ([\d,]+) \| ([\d,.]+) M \| ([\dx, ]+) \| (\d+) \|$", DOCS, re.M
)


def test_the_documentation_lists_every_model():
    assert [name for name, *_ in LISTED] == list(MODELS)


@pytest.mark.parametrize("line", LISTED, ids=lambda line: line[0])
def test_sizes_in_the_documentation(line):
    name, parameters, macs, maps, pooled = line
    if MODELS[name].extra:
        if find_spec("timm") is None:
            pytest.skip("timm is not installed")
        size = MODELS[name].size
    else:
        cost = model_cost(shapeless(name, 100), (3, 32, 32))
        size = cost.parameters, cost.macs
    assert (parameters, macs) == (f"{size[0]:,}", f"{size[1] / 1e6:,.2f}")
    shapes = shapes_on_meta(name, 100, (3, 32, 32))
    assert (shapes.maps, str(shapes.pooled)) == (sizes(maps.replace(",", "")), pooled)


def test_every_network_that_has_a_published_counterpart_is_compared_with_it():
    assert {row["model"] for row in ROWS} == set(OURS) - NARROW
    assert len(ROWS) == 23


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("name", [*SMALL, "MobileNetV2"])
def test_tapping_changes_neither_logits_nor_statistics(name, image_shape):
    plain = seeded(name, 10, image_shape[0])
    tapped = seeded(name, 10, image_shape[0])
    images = torch.rand(4, *image_shape, generator=torch.Generator().manual_seed(5))
    expected = plain(images)
    with TappedModel(tapped, taps_of(name), ROLES) as wrapped:
        out = wrapped(images)
    assert torch.equal(out.logits, expected)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, tapped.state_dict()[key]), key
    counts = [b for key, b in tapped.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(int(count) == 1 for count in counts)


def said(name):
    """A network and what it says, all of it, about two images.

    In training mode: untrained running statistics let features fade to nothing in deep networks.
    """
    model = seeded(name, 10)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with TappedModel(model, taps_of(name), ROLES) as wrapped, torch.no_grad():
        return model, wrapped(images)


@torch.no_grad()
def assert_pooled(name, model, out, last_map):
    torch.testing.assert_close(last_map.mean((2, 3)), out.pooled, rtol=1e-6, atol=1e-6)
    classifier = model.get_submodule(taps_of(name).classifier)
    torch.testing.assert_close(classifier(out.pooled), out.logits)


@pytest.mark.parametrize("name", ["resnet14", "ResNet18", "ResNet50", "vgg8", "ShuffleV1"])
def test_most_taps_are_before_and_after_the_last_relu(name):
    model, out = said(name)
    for before, after in zip(out.preact, out.maps, strict=True):
        assert torch.equal(before.relu(), after)
        assert (before < 0).any()
    assert_pooled(name, model, out, out.maps[-1])


def test_taps_of_wide_resnets_are_before_and_after_the_next_norm():
    model, out = said("wrn_16_1")
    norms = [model.get_submodule(tap) for tap in taps_of("wrn_16_1").preact]
    for norm, before, after in zip(norms, out.maps, out.preact, strict=True):
        assert torch.equal(norm(before), after)
    assert_pooled("wrn_16_1", model, out, out.preact[-1].relu())


def test_taps_of_mobilenet_v2_are_linear_after_the_stem():
    model, out = said("MobileNetV2")
    assert torch.equal(out.preact[0].relu(), out.maps[0])
    for before, after in zip(out.preact[1:], out.maps[1:], strict=True):
        assert torch.equal(before, after)
        assert (after < 0).any()
    assert_pooled("MobileNetV2", model, out, model.conv2(out.maps[-1]))


def test_taps_of_shufflenet_v2_are_before_and_after_relu_and_shuffle():
    model, out = said("ShuffleV2")
    assert torch.equal(out.preact[0].relu(), out.maps[0])
    for before, after in zip(out.preact[1:], out.maps[1:], strict=True):
        assert torch.equal(nn.functional.channel_shuffle(before.relu(), 2), after)
        assert (before < 0).any()
    last_map = model.relu2(model.bn2(model.conv2(out.maps[-1])))
    assert_pooled("ShuffleV2", model, out, last_map)


def test_no_module_overwrites_the_output_of_another():
    assert not any(
        getattr(module, "inplace", False) for name in OURS for module in shapeless(name).modules()
    )


def shapeless(name, num_classes=10):
    with torch.device("meta"):
        return build_model(name, num_classes)


@pytest.mark.parametrize("name", ["resnet8_quarter", "resnet8x4", "wrn_16_2"])
def test_macs_agree_with_torchs_own_counter(name):
    model = shapeless(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert 2 * model_cost(model, (3, 32, 32)).macs == counter.get_total_flops()


def test_cost_counts_groups_and_transposed_convolutions():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 12 * 12, 5),
    )
    macs = 8 * 36 * 2 * 9 + 8 * 36 * 3 * 4 + 6 * 144 * 5
    cost = model_cost(model, (4, 8, 8))
    assert cost.macs == macs
    assert cost.parameters == 8 * 2 * 9 + 8 * 3 * 4 + 6 * 144 * 5 + 5


def test_cost_leaves_a_real_model_alone():
    model = seeded("resnet8", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model_cost(model, (3, 32, 32))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_shapes_draw_no_random_numbers():
    shapes_on_meta.cache_clear()
    before = torch.get_rng_state()
    shapes_on_meta("resnet8", 10, (3, 32, 32))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", daily(["resnet8_quarter", "wrn_16_1"]))
def test_exports_at_opset_17(name, tmp_path):
    model = seeded(name, 10, 1).eval()
    images = torch.rand(2, 1, 8, 8)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            opset_version=17,
            dynamic_shapes=batch,
            verbose=False,
        )
    assert [opset.version for opset in onnx.load(path).opset_import if not opset.domain] == [17]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.cat([images, images, images])
    (logits,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(more).numpy(), atol=1e-5)


def test_narrow_models_differ_in_width_only():
    keys = list(shapeless("resnet8").state_dict())
    # Equal widths of stem and first stage: the same shortcuts, so the same keys.
    assert list(shapeless("resnet8_half").state_dict()) == keys
    assert list(shapeless("resnet8_quarter").state_dict()) == keys
    assert shapes_on_meta("resnet8_quarter", 10, (1, 8, 8)).maps == (
        (4, 8, 8),
        (4, 8, 8),
        (8, 4, 4),
        (16, 2, 2),
    )


def test_unknown_name_suggests_the_close_one():
    with pytest.raises(UnknownNameError, match="unknown model 'resnet2O'") as caught:
        model_entry("resnet2O")
    assert "'resnet20'" in caught.value.hint


@pytest.mark.parametrize(("num_classes", "in_channels"), [(0, 3), (10, 0)])
def test_counts_must_be_positive(num_classes, in_channels):
    with pytest.raises(ConfigError, match="must be 1 or more, got 0"):
        build_model("resnet8", num_classes, in_channels)
