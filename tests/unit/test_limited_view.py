"""Limited views: what is seen, that nothing else changes, and that all of it still works."""

import numpy as np
import pytest
import torch
from cases import daily
from matrices import load, plan_of
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions, Worker
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.targets import load_target

from smskd.cost import model_cost, shapes_on_meta
from smskd.errors import UnknownNameError
from smskd.folding import fold, split, why_not
from smskd.fused import fused
from smskd.models import VIEWS, build_model, model_entry, taps_of
from smskd.models.limited_view import centre, grey, low_res
from smskd.taps import FEATURES, POOLED, Network, TappedModel

NAMES = [f"resnet8@{view}" for view in VIEWS]


def seeded(name, seed=0, num_classes=10, in_channels=3):
    torch.manual_seed(seed)
    return build_model(name, num_classes, in_channels)


def naive_grey(images):
    seen = images.clone()
    for c in range(images.shape[1]):
        seen[:, c] = images.mean(1)
    return seen


def naive_low_res(images):
    seen = images.clone()
    for i in range(0, images.shape[2], 2):
        for j in range(0, images.shape[3], 2):
            block = images[:, :, i : i + 2, j : j + 2]
            seen[:, :, i : i + 2, j : j + 2] = block.mean((2, 3), keepdim=True)
    return seen


def naive_centre(images):
    height, width = images.shape[2:]
    seen = torch.zeros_like(images)
    for i in range(height // 4, height - height // 4):
        for j in range(width // 4, width - width // 4):
            seen[:, :, i, j] = images[:, :, i, j]
    return seen


PAIRS = [(grey, naive_grey), (low_res, naive_low_res), (centre, naive_centre)]


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 8, 8), (3, 2, 9, 13), (2, 3, 2, 1)])
@pytest.mark.parametrize(("view", "naive"), PAIRS)
def test_what_is_seen(view, naive, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    seen = view(images)
    assert seen.shape == images.shape
    torch.testing.assert_close(seen, naive(images))
    torch.testing.assert_close(view(seen), seen)  # nothing more is lost by looking twice
    assert torch.equal(view(images.contiguous(memory_format=torch.channels_last)), seen)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("view", "naive"), PAIRS)
def test_views_are_differentiable(view, naive):
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(view, images)


def test_a_centre_hides_even_what_is_not_finite():
    images = torch.full((1, 3, 8, 8), float("inf"))
    images[:, :, 2:6, 2:6] = 1.0
    assert centre(images).isfinite().all()


# ------------------------------------------------------------------------------- behind a network


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_network_on_what_is_seen(name):
    plain, limited = seeded("resnet8"), seeded(name)
    assert all(map(torch.equal, plain.state_dict().values(), limited.state_dict().values()))
    assert list(limited.state_dict()) == [f"net.{key}" for key in plain.state_dict()]
    images, view = torch.randn(4, 3, 16, 16), VIEWS[name.partition("@")[2]]
    for mode in (True, False):  # in training and in use
        assert torch.equal(limited.train(mode)(images), plain.train(mode)(view(images)))
    assert not torch.equal(limited(images), plain(images))


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_read(name):
    plain, limited = seeded("resnet8"), seeded(name)
    images = torch.randn(2, 3, 16, 16)
    with TappedModel(limited, taps_of(name), FEATURES) as tapped:
        out = tapped(images)
    with TappedModel(plain, taps_of("resnet8"), FEATURES) as tapped:
        expected = tapped(VIEWS[name.partition("@")[2]](images))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.pooled, expected.pooled)
    assert torch.equal(out.spatial, expected.spatial)
    for ours, theirs in zip(out.maps + out.preact, expected.maps + expected.preact, strict=True):
        assert torch.equal(ours, theirs)
    assert Network(limited, taps_of(name)).classifier is limited.net.fc


@pytest.mark.parametrize("name", NAMES)
def test_cost_and_shapes_are_the_networks(name):
    assert model_cost(seeded(name), (3, 32, 32)) == model_cost(seeded("resnet8"), (3, 32, 32))
    assert shapes_on_meta(name, 10, (3, 32, 32)) == shapes_on_meta("resnet8", 10, (3, 32, 32))


def test_views_are_looked_through_one_after_another():
    model = seeded("resnet8@low_res@grey")  # grey first, as it is the outer one
    images, plain = torch.randn(2, 3, 16, 16), seeded("resnet8")
    assert torch.equal(model(images), plain(low_res(grey(images))))
    assert taps_of("resnet8@low_res@grey").classifier == "net.net.fc"


def test_unknown_views_suggest_the_close_one():
    with pytest.raises(UnknownNameError, match="unknown limited view 'gray'") as caught:
        model_entry("resnet8@gray")
    assert "'grey'" in caught.value.hint
    with pytest.raises(UnknownNameError, match="unknown model 'resnet9'"):
        model_entry("resnet9@grey")


# ------------------------------------------------------------------------------- everything else


@pytest.mark.parametrize("name", ["resnet8@low_res", "resnet8@centre"])
def test_views_of_single_channels_are_folded(name):
    networks = [Network(seeded(name, seed), taps_of(name)) for seed in (0, 1)]
    assert why_not(networks, torch.randn(4, 3, 16, 16)) is None
    images = [torch.randn(4, 3, 16, 16) for _ in networks]
    folded = fold([network.model for network in networks])
    with TappedModel(folded, taps_of(name), frozenset({POOLED})) as tapped:
        together = split(tapped(torch.cat(images, dim=1)), 2)
    for network, batch, ours in zip(networks, images, together, strict=True):
        torch.testing.assert_close(ours.logits, network.model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_view_that_mixes_channels_is_not_folded(batch):
    networks = [Network(seeded("resnet8@grey", seed), taps_of("resnet8@grey")) for seed in (0, 1)]
    assert "mixes channels" in why_not(networks, torch.randn(batch, 3, 16, 16))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_networks_behind_a_view_are_fused(name):
    network = Network(seeded(name).eval(), taps_of(name))
    faster = fused(network, frozenset({POOLED}), torch.randn(1, 3, 16, 16))
    assert faster.model is not network.model
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(faster.model(images), network.model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", daily(["jetson", "cpu"]))
@pytest.mark.parametrize("name", daily(NAMES))
def test_exports(name, target, tmp_path):
    model, path = seeded(name).eval(), tmp_path / "model.onnx"
    opset, mean, std = load_target(target).opset, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    export_onnx(model, (3, 8, 8), mean, std, opset=opset, path=path)
    images = torch.rand(1, 3, 8, 8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        expected = model((images - mean) / std).numpy()
    np.testing.assert_allclose(CpuSession(path).run(images.numpy()), expected, atol=1e-4)


def test_a_matrix_names_them(tmp_path):
    pair = {"teacher": "resnet8_half", "student": "resnet8_quarter@low_res"}
    plan = plan_of(
        pairs=[pair], rows=[["scratch"], ["kd"]], dataset={"name": "digits", "train_size": 100},
        recipe={"epochs": [1]}, teacher={"epochs": 1},
    )  # fmt: skip
    plain = plan_of(
        pairs=[pair | {"student": "resnet8_quarter"}], rows=[["scratch"], ["kd"]],
        dataset={"name": "digits", "train_size": 100}, recipe={"epochs": [1]},
        teacher={"epochs": 1},
    )  # fmt: skip
    assert len(plan.nodes.keys() & plain.nodes.keys()) == 1  # the teacher, which sees all
    worker = Worker(Store.open(tmp_path), RunOptions(threads=1))
    for spec in plan.nodes.values():
        worker.run(spec, lambda *_: None)
    assert all(worker.store.is_done(key) for key in plan.nodes)
    assert load(pairs=[pair]).matrix.pairs[0].name == "resnet8_half>resnet8_quarter@low_res"
