"""Frozen networks with folded batch norms: the same outputs, and the original left alone."""

import pytest
import torch
from tiny import TAPS, same_state, snapshot, tiny_net, trained_teacher
from torch import nn

from smskd.fused import fused
from smskd.models import build_model, taps_of
from smskd.taps import MAPS, POOLED, Network, TappedModel

IMAGE = torch.randn(1, 3, 8, 8)


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def settled(name):
    torch.manual_seed(0)
    model = build_model(name, 10)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16))
    return Network(model.eval(), taps_of(name))


@pytest.mark.parametrize("roles", [frozenset(), frozenset({POOLED})], ids=["logits", "pooled"])
@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV2"])
def test_folding_changes_rounding_only(name, roles):
    network = settled(name)
    before, images = snapshot(network.model), torch.randn(6, 3, 16, 16)
    folded = fused(network, roles, images[:1])
    assert norms(folded.model) < norms(network.model)
    with torch.no_grad():
        with TappedModel(network.model, network.taps, roles) as tapped:
            expected = tapped(images)
        with TappedModel(folded.model, folded.taps, roles) as tapped:
            ours = tapped(images)
    scale = expected.logits.abs().max()
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5 * scale)
    if roles:
        torch.testing.assert_close(ours.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
    assert same_state(snapshot(network.model), before)


def test_networks_that_are_asked_for_maps_stay_as_they_are():
    network = Network(trained_teacher().eval(), TAPS)
    assert fused(network, frozenset({MAPS}), IMAGE) is network


class LooksAtItsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, images):
        return self.net(images) if images.mean() > 0 else self.net(-images)


class Twice(nn.Module):
    """One convolution and one norm, each run twice: folding once would be wrong."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        for _ in range(2):
            images = self.norm(self.conv(images))
        return self.head(images.mean((2, 3)))


def test_networks_that_cannot_be_traced_stay_as_they_are():
    network = Network(LooksAtItsData().eval())
    assert fused(network, frozenset(), IMAGE) is network


def test_layers_that_run_twice_are_left_alone():
    network = Network(Twice().eval())
    network.model.norm.running_mean.fill_(0.3)
    folded = fused(network, frozenset(), IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(folded.model(IMAGE), network.model(IMAGE))
    assert norms(folded.model) == 1
