"""Taps found by a dry run: of networks of every layout, without a trace left on them."""

from dataclasses import replace

import pytest
import torch
from tiny import TAPS, same_state, snapshot, tiny_net
from torch import nn

from smskd.errors import ConfigError
from smskd.models import build_model, taps_of
from smskd.models.auto_taps import auto_taps, not_in_place
from smskd.taps import MAPS, POOLED, PREACT, SPATIAL, TappedModel, Taps


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments)


def read(model, taps, images):
    """All that the taps give, which must be readable."""
    have = {MAPS: taps.maps, PREACT: taps.preact, POOLED: taps.pooled, SPATIAL: taps.spatial}
    roles = frozenset(role for role, tap in have.items() if tap)
    with TappedModel(model.eval(), taps, roles) as tapped, torch.no_grad():
        return tapped(images)


# ------------------------------------------------------------------------------ of our own zoo


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet14", [1, 2, 3]),
        ("vgg8", [0, 1, 2, 4]),
        ("ResNet18", [1, 2, 3, 4]),
        ("ResNet50", [1, 2, 3, 4]),
        ("resnet8@grey", [1, 2, 3]),
    ],
)
def test_what_is_found_in_the_zoo_is_what_is_written_there(name, stages):
    # Of maps of one resolution, such as a stem and the stage behind it, only the last is found.
    written = taps_of(name)
    maps = tuple(written.maps[i] for i in stages)
    preact = tuple(written.preact[i] for i in stages)
    found = auto_taps(seeded(build_model, name, 10), noise(1, 3, 32, 32))
    assert found == replace(written, maps=maps, preact=preact)


@pytest.mark.parametrize("name", ["wrn_16_1", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_maps_have_the_resolutions_of_those_written_in_the_zoo(name):
    model, images = seeded(build_model, name, 10), noise(2, 3, 32, 32)
    found, written = auto_taps(model, images), taps_of(name)
    sizes = [[tuple(m.shape[2:]) for m in read(model, t, images).maps] for t in (found, written)]
    assert sizes[0] == sorted(set(sizes[1]), reverse=True)  # one a resolution
    assert (found.pooled, found.classifier, found.spatial) == (
        written.pooled,
        written.classifier,
        written.spatial,
    )


# ------------------------------------------------------------------------------- of users' own


class ChannelsLast(nn.Module):
    """Maps (B, H, W, C), as windowed transformers have them."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 6, 2, 2)
        self.first = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.second = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, images):
        x = self.first(self.cut(images).permute(0, 2, 3, 1))
        x = self.second(x[:, ::2, ::2])
        return self.fc(x.mean((1, 2)))


class Tokens(nn.Module):
    """Blocks of one resolution behind a class token."""

    def __init__(self, depth=6, class_token=True):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8)) if class_token else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = self.cut(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class TwoHeads(nn.Module):
    """Logits that no single layer gives."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, images):
        x = self.conv(images).mean((2, 3))
        return (self.a(x) + self.b(x)) / 2


class Residual(nn.Module):
    """A network whose blocks go down inside, as most do: what is inside is no stage's end."""

    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)
        )
        self.down1 = Down(8, inplace)
        self.down2 = Down(16, inplace)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(32, 5)

    def forward(self, images):
        x = self.down2(self.down1(self.stem(images)))
        return self.fc(self.drop(self.pool(x).flatten(1)))


class Down(nn.Module):
    def __init__(self, width, inplace):
        super().__init__()
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 2 * width, 1))
        self.halve = nn.Conv2d(2 * width, 2 * width, 3, 2, padding=1)
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        x = self.act(self.widen(x))
        return self.act(self.halve(x * self.squeeze(x).sigmoid()))


def test_of_the_tiny_network():
    found = auto_taps(tiny_net(), noise(1, 3, 8, 8))
    assert found == Taps(
        maps=("stem", "body"), preact=("stem.1:input", "body.2:input"), pooled="head:input",
        classifier="head", spatial="body",
    )  # fmt: skip
    assert (found.maps, found.pooled, found.classifier) == (TAPS.maps, TAPS.pooled, TAPS.classifier)


def test_stages_end_before_the_block_that_goes_down():
    assert auto_taps(seeded(Residual), noise(1, 3, 16, 16)) == Taps(
        maps=("stem", "down1", "down2"),
        preact=("stem.2:input", "down1.act:input", "down2.act:input"),
        pooled="fc:input",
        classifier="fc",
        spatial="down2",
    )


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (30, 22)])
def test_images_need_not_be_square(shape):
    assert auto_taps(seeded(Residual), noise(1, 3, *shape)).maps == ("stem", "down1", "down2")


def test_what_activations_overwrite_is_not_tapped():
    model, images = seeded(Residual, True), noise(2, 3, 16, 16)
    found = auto_taps(model, images)
    assert found.preact == ()
    assert len(read(model, found, images).maps) == 3
    assert auto_taps(not_in_place(model), images) == auto_taps(seeded(Residual), images)


def test_maps_with_channels_last():
    model, images = seeded(ChannelsLast), noise(2, 3, 16, 16)
    found = auto_taps(model, images)
    assert found.maps == ("first:nhwc", "second:nhwc")
    assert (found.pooled, found.classifier, found.spatial) == ("fc:input", "fc", "second:nhwc")
    out = read(model, found, images)
    assert [m.shape[1:] for m in out.maps] == [(6, 8, 8), (12, 4, 4)]
    torch.testing.assert_close(out.spatial.mean((2, 3)), out.pooled)


@pytest.mark.parametrize(
    ("depth", "places"), [(6, [1, 2, 4, 5]), (12, [2, 5, 8, 11]), (4, [0, 1, 2, 3]), (2, [0, 1])]
)
def test_blocks_of_one_resolution_are_read_at_quarters_of_the_depth(depth, places):
    model, images = seeded(Tokens, depth), noise(2, 3, 16, 16)
    found = auto_taps(model, images)
    assert found.maps == tuple(f"blocks.{place}:tokens" for place in places)
    assert (found.classifier, found.spatial) == ("head", None)  # a class token is no mean
    assert {m.shape[1:] for m in read(model, found, images).maps} == {(8, 4, 4)}


def test_tokens_that_are_averaged():
    model, images = seeded(Tokens, 4, False), noise(2, 3, 16, 16)
    found = auto_taps(model, images)
    assert found.spatial == "norm:tokens"
    out = read(model, found, images)
    torch.testing.assert_close(out.spatial.mean((2, 3)), out.pooled)


def test_logits_of_two_heads_have_no_classifier():
    found = auto_taps(seeded(TwoHeads), noise(1, 3, 8, 8))
    assert (found.classifier, found.pooled, found.spatial) == (None, "b:input", "conv")


def test_a_network_without_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert auto_taps(model, noise(1, 3, 8, 8)) == Taps(maps=("0",))


def test_maps_of_one_position_are_no_maps_but_may_be_what_is_pooled():
    model = seeded(Residual)
    assert auto_taps(model, noise(1, 3, 4, 4)).maps == ("stem", "down1")
    assert auto_taps(model, noise(1, 3, 4, 4)).spatial == "down2"


def test_the_networks_of_the_documentation():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    found = auto_taps(net, noise(1, 1, 8, 8))
    assert found == Taps(("4",), ("4:input",), "7:input", "7")


# ------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    model, images = seeded(Residual).train(training), noise(1, 3, 16, 16)
    model.down1.train(not training)  # a part in another mode stays so
    modes = [m.training for m in model.modules()]
    before, state, stream = snapshot(model), images.clone(), torch.get_rng_state()
    found = [auto_taps(model, images) for _ in range(2)]
    assert found[0] == found[1]
    assert same_state(snapshot(model), before)
    assert torch.equal(images, state)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)


def test_a_network_that_fails_is_left_as_it_was():
    model = seeded(Residual)
    with pytest.raises(RuntimeError):
        auto_taps(model, noise(1, 4, 16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_network_without_logits_is_refused():
    with pytest.raises(ConfigError, match="not logits"):
        auto_taps(nn.Conv2d(3, 5, 3), noise(1, 3, 8, 8))


def test_half_precision():
    model, images = seeded(Residual).bfloat16(), noise(1, 3, 16, 16).bfloat16()
    found = auto_taps(model, images)
    assert (found.classifier, found.maps) == ("fc", ("stem", "down1", "down2"))
