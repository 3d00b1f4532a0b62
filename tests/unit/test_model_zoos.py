"""Networks of torchvision and timm by name: the same as theirs, readable, trainable, and optional."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from command import PATHS
from matrices import plan_of
from smskd_bench.cost import network_cost
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions, Worker

from smskd.cost import model_cost, shapes_on_meta
from smskd.errors import ConfigError, UnknownNameError
from smskd.folding import why_not
from smskd.models import MODELS, build_model, model_entry, outline, taps_of
from smskd.models.auto_taps import auto_taps
from smskd.taps import MAPS, POOLED, PREACT, SPATIAL, Network, TappedModel, Taps
from smskd.torchvision_bridge import import_torchvision

try:
    MODELS_OF_TORCHVISION = import_torchvision().models
except ConfigError:
    MODELS_OF_TORCHVISION = None
try:
    import timm
except ImportError:
    timm = None

needs_torchvision = pytest.mark.skipif(
    MODELS_OF_TORCHVISION is None, reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")
HETERO = [name for name, entry in MODELS.items() if entry.extra]

RESNET = Taps(
    maps=("relu", "layer1", "layer2", "layer3", "layer4"),
    preact=("relu:input", *(f"layer{i}.1.relu:input" for i in (1, 2, 3, 4))),
    pooled="fc:input",
    classifier="fc",
    spatial="layer4",
)
VGG = Taps(
    maps=tuple(f"features.{i}" for i in (2, 6, 13, 20, 27)),
    preact=tuple(f"features.{i}:input" for i in (2, 6, 13, 20, 27)),
    pooled="classifier.6:input",
    classifier="classifier.6",
)
TORCHVISION = {
    "resnet18": RESNET,
    "mobilenet_v2": Taps(
        maps=("features.1", "features.3", "features.6", "features.13", "features"),
        pooled="classifier.1:input", classifier="classifier.1", spatial="features",
    ),
    "vgg11_bn": VGG,
    "shufflenet_v2_x1_0": Taps(
        maps=("conv1", "stage2", "stage3", "conv5"),
        pooled="fc:input", classifier="fc", spatial="conv5",
    ),
    "efficientnet_b0": Taps(
        maps=("features.1", "features.2", "features.3", "features.5", "features"),
        pooled="classifier.1:input", classifier="classifier.1", spatial="features",
    ),
    "convnext_tiny": Taps(
        maps=("features.1", "features.3", "features.5", "features"),
        pooled="classifier.2:input", classifier="classifier.2",
    ),
}  # fmt: skip
TIMM = {
    "vit_tiny_patch16_224": Taps(
        maps=tuple(f"blocks.{i}:tokens" for i in (2, 5, 8, 11)),
        pooled="head:input", classifier="head",
    ),
    "mixer_s16_224": Taps(
        maps=tuple(f"blocks.{i}:tokens" for i in (1, 3, 5, 7)),
        pooled="head:input", classifier="head", spatial="norm:tokens",
    ),
    "swin_tiny_patch4_window7_224": Taps(
        maps=("layers.0:nhwc", "layers.1:nhwc", "layers.2:nhwc", "norm:nhwc"),
        pooled="head.fc:input", classifier="head.fc", spatial="norm:nhwc",
    ),
    "convnext_atto": Taps(
        maps=("stages.0", "stages.1", "stages.2", "stages"),
        pooled="head.fc:input", classifier="head.fc",
    ),
    "mobilenetv3_small_050": Taps(
        maps=("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks"),
        pooled="classifier:input", classifier="classifier",
    ),
}  # fmt: skip
FOREIGN = [
    *(
        pytest.param(f"torchvision:{name}", taps, marks=needs_torchvision)
        for name, taps in TORCHVISION.items()
    ),
    *(pytest.param(f"timm:{name}", taps, marks=needs_timm) for name, taps in TIMM.items()),
]


def seeded(name, num_classes=7, in_channels=3, image_size=64):
    torch.manual_seed(0)
    return build_model(name, num_classes, in_channels, image_size)


def read(model, taps, images):
    """All that the taps give; a change in place of what was read would be refused."""
    have = {MAPS: taps.maps, PREACT: taps.preact, POOLED: taps.pooled, SPATIAL: taps.spatial}
    roles = frozenset(role for role, tap in have.items() if tap)
    with TappedModel(model, taps, roles) as tapped:
        return tapped(images)


def check_features(model, taps, images):
    out = read(model, taps, images)
    sides = [m.shape[2] for m in out.maps]
    assert len(sides) >= 4
    assert sides == sorted(sides, reverse=True)
    assert all(m.shape[2] == m.shape[3] for m in out.maps)
    if taps.spatial:
        torch.testing.assert_close(out.spatial.mean((2, 3)), out.pooled, rtol=1e-4, atol=1e-5)
    if taps.classifier:
        logits = model.get_submodule(taps.classifier)(out.pooled)
        torch.testing.assert_close(logits, out.logits)
    return out


# --------------------------------------------------------------------------- any network by name


@pytest.mark.parametrize(("name", "taps"), FOREIGN)
def test_taps_are_found_and_can_be_read(name, taps):
    assert taps_of(name) == taps
    assert taps_of(name) is taps_of(name)  # found once
    model = seeded(name)
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    model.eval()
    with torch.no_grad():
        out = check_features(model, taps, torch.rand(2, 3, 64, 64))
    assert out.logits.shape == (2, 7)


@pytest.mark.parametrize(("name", "taps"), [FOREIGN[0], FOREIGN[len(TORCHVISION)]])
def test_features_carry_gradients_in_training(name, taps):
    model = seeded(name).train()
    out = read(model, taps, torch.rand(2, 3, 64, 64))
    sum(m.square().mean() for m in out.maps).backward()
    assert next(model.parameters()).grad is not None


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
def test_weights_of_a_seed_are_torchvisions(name):
    ours = seeded(f"torchvision:{name}", 5)
    torch.manual_seed(0)
    theirs = MODELS_OF_TORCHVISION.get_model(name, weights=None, num_classes=5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


@needs_timm
def test_weights_of_a_seed_are_timms():
    ours = seeded("timm:vit_tiny_patch16_224", 5, image_size=32)
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchvision:resnet18", marks=needs_torchvision),
        pytest.param("torchvision:mobilenet_v2", marks=needs_torchvision),
        pytest.param("timm:resnet18", marks=needs_timm),
    ],
)
def test_images_of_other_channels(name, channels):
    model, same = seeded(name, 3, channels), seeded(name, 3, channels)
    assert model.eval()(torch.rand(2, channels, 64, 64)).shape == (2, 3)
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == channels
    assert first.weight.std() > 0.01


@needs_torchvision
def test_networks_that_would_return_more_than_logits():
    model = seeded("torchvision:googlenet").train()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


@needs_torchvision
def test_a_network_that_is_made_for_one_size_is_built_for_the_data():
    model = seeded("torchvision:vit_b_32", image_size=64)
    assert model.image_size == 64


@needs_torchvision
def test_an_image_that_does_not_fit_is_one_message():
    with pytest.raises(ConfigError, match="torchvision:vit_b_16 cannot be built as asked"):
        seeded("torchvision:vit_b_16", image_size=50)


@needs_torchvision
def test_looking_for_taps_moves_no_random_numbers():
    from smskd.models import torchvision_zoo

    torchvision_zoo.taps.cache_clear()
    before = torch.get_rng_state()
    taps_of("torchvision:shufflenet_v2_x0_5")
    outline("torchvision:shufflenet_v2_x0_5", 10)
    assert torch.equal(torch.get_rng_state(), before)


@needs_torchvision
def test_cost_and_shapes_of_a_network_of_another_package():
    shapes = shapes_on_meta("torchvision:resnet18", 100, (3, 32, 32))
    assert shapes.maps == ((64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1))
    assert (shapes.pooled, shapes.spatial) == (512, (512, 1, 1))
    assert network_cost("torchvision:resnet18", "cifar100").parameters == 11_227_812


@needs_torchvision
def test_unknown_networks_of_torchvision_suggest_close_ones():
    with pytest.raises(UnknownNameError, match="torchvision has no network 'resnet19'") as caught:
        model_entry("torchvision:resnet19")
    assert "'resnet18'" in caught.value.hint
    with pytest.raises(UnknownNameError) as caught:
        model_entry("torchvision:fcn_resnet50x")  # a network of another task
    assert len(caught.value.hint) < 120


@needs_timm
@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp", "resnet_18"])
def test_unknown_networks_of_timm_are_refused_before_anything_is_fetched(name):
    with pytest.raises(UnknownNameError, match="timm has no network"):
        model_entry(f"timm:{name}")


def test_unknown_packages_are_unknown_models():
    with pytest.raises(UnknownNameError, match="unknown model 'keras:resnet18'"):
        model_entry("keras:resnet18")


# ---------------------------------------------------------------------- sized for small images


@needs_timm
@pytest.mark.parametrize("name", HETERO)
def test_sizes_written_beside_the_small_networks_are_theirs(name):
    cost = model_cost(seeded(name, 100, 3, 32), (3, 32, 32))
    assert MODELS[name].size == (cost.parameters, cost.macs)


@needs_timm
@pytest.mark.parametrize("name", HETERO)
def test_taps_written_beside_the_small_networks_are_those_found(name):
    found = auto_taps(seeded(name, 10, 3, 32), torch.rand(1, 3, 32, 32))
    if name == "deit_tiny":  # it has two heads; what is pooled is the class token
        found = replace(found, pooled="head:input")
    assert found == taps_of(name)


@needs_timm
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("name", HETERO)
def test_small_networks_take_the_images_of_any_data_set(name, size, channels):
    model = seeded(name, 10, channels, size)
    with torch.no_grad():
        out = check_features(model.eval(), taps_of(name), torch.rand(2, channels, size, size))
    first = 16 if name == "swin_tiny" and size > 8 else 8
    assert out.maps[0].shape[2] in (first, 7, 14)  # 28 pixels have no 8 or 16 whole patches
    assert out.logits.shape == (2, 10)


@needs_timm
def test_small_networks_without_a_size_are_for_32_pixels():
    assert build_model("vit_tiny", 10)(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@needs_timm
@pytest.mark.parametrize("name", HETERO)
def test_small_networks_are_not_folded(name):
    networks = [Network(seeded(name, 10, 3, 32), taps_of(name)) for _ in range(2)]
    assert "cannot be folded" in why_not(networks, torch.rand(1, 3, 32, 32))


@needs_timm
@needs_torchvision
def test_a_matrix_trains_and_tests_them(tmp_path):
    plan = plan_of(
        dataset={"name": "digits", "train_size": 20}, recipe={"epochs": [1]}, teacher={"epochs": 1},
        pairs=[{"teacher": "torchvision:shufflenet_v2_x0_5", "student": "swin_tiny"}],
        rows=[["rkd"]],
    )  # fmt: skip
    worker = Worker(Store.open(tmp_path), RunOptions(threads=1))
    for spec in plan.nodes.values():
        worker.run(spec, lambda *_: None)
    results = [worker.store.result(key) for key in plan.nodes]
    assert {r["spec"]["model"] for r in results} == {"torchvision:shufflenet_v2_x0_5", "swin_tiny"}
    assert all(0 <= r["test"]["top1"] <= 100 for r in results)


# ------------------------------------------------------------------------------ optional packages

HIDDEN = """
    import sys
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {hidden!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Hide())
    from smskd.errors import ConfigError
    from smskd.models import build_model, model_entry, taps_of
    for name in {names!r}:
        try:
            model_entry(name)
            build_model(name, 10)
        except ConfigError as error:
            print(error)
    print(taps_of("vit_tiny").classifier)
"""


@needs_torchvision
@pytest.mark.slow
def test_a_missing_extra_is_one_message_with_the_command():
    said = without(["timm"], ["vit_tiny", "timm:resnet18"])
    assert said == [
        "a VisionTransformer needs timm, which is not installed",
        "  -> pip install 'smskd-bench[hetero]'",
        "timm:resnet18 needs timm, which is not installed",
        "  -> pip install 'smskd-bench[hetero]'",
        "head",
    ]


def test_a_missing_torchvision_is_one_message_with_the_command():
    said = without(["torchvision", "timm"], ["torchvision:resnet18"])
    assert said[0] == "torchvision is needed here but not installed"
    assert "pip install 'torchvision" in said[1]


def without(hidden, names):
    code = textwrap.dedent(HIDDEN).format(hidden=hidden, names=names)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_zoo_and_its_list_load_no_package_that_is_not_used():
    code = """
        import sys
        from smskd_bench.listing import lines
        from smskd.models import build_model
        build_model("resnet8", 10)
        print(*lines("models"), sep=chr(10))
        print([n for n in ("timm", "torchvision") if n in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
    )  # fmt: skip
    *listed, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert any("vit_tiny" in line and "smskd-bench[hetero]" in line for line in listed)
    for word in ("torchvision:NAME", "timm:NAME", "NAME@grey", "NAME@low_res", "NAME@centre"):
        assert any(word in line for line in listed[-2:]), word
