"""Features by module name: right tensors, nothing left behind, clear errors."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TAPS, same_state, snapshot, tiny_net
from torch import nn

from smskd.errors import ConfigError
from smskd.modes import eval_mode
from smskd.taps import MAPS, POOLED, PREACT, Shapes, TappedModel, Taps, probe

ALL = frozenset({MAPS, PREACT, POOLED})


def images(num=5, size=8):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TwoRelus(nn.Module):
    """One activation module used twice, as in many published networks."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.inner = value, nn.Identity()

    def forward(self, x):
        self.inner(x)
        return self.value


def test_outputs_and_inputs_are_those_of_the_modules():
    model = tiny_net().eval()
    with TappedModel(model, TAPS, ALL) as tapped:
        out = tapped(images())
    stem_pre = model.stem[0](images())
    stem = F.relu(stem_pre)
    body_pre = model.body[1](model.body[0](stem))
    pooled = F.relu(body_pre).mean((2, 3))
    for got, expected in [
        (out.maps[0], stem),
        (out.maps[1], F.relu(body_pre)),
        (out.preact[0], stem_pre),
        (out.preact[1], body_pre),
        (out.pooled, pooled),
        (out.logits, model.head(pooled)),
    ]:
        assert torch.equal(got, expected)


def test_only_what_is_asked_for_is_read():
    out = TappedModel(tiny_net(), TAPS, frozenset({POOLED}))(images())
    assert (out.maps, out.preact) == ((), ())
    assert out.pooled is not None


def test_features_carry_gradients_to_the_model():
    model = tiny_net()
    TappedModel(model, TAPS, ALL)(images()).maps[0].sum().backward()
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


def test_pooled_maps_are_flattened():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.pool(x).flatten(1))

    out = TappedModel(Pools(), Taps(pooled="pool"), frozenset({POOLED}))(images())
    assert out.pooled.shape == (5, 3)


@pytest.mark.parametrize("side", ["output", ""])
def test_output_can_be_spelt_out(side):
    tap = f"stem:{side}" if side else "stem"
    out = TappedModel(tiny_net(), Taps(maps=(tap,)), frozenset({MAPS}))(images())
    assert out.maps[0].shape == (5, 4, 8, 8)


def test_unknown_module_names_the_close_ones():
    with pytest.raises(ConfigError, match="no module for tap 'bodi'") as caught:
        TappedModel(tiny_net(), Taps(maps=("bodi",)), frozenset({MAPS}))
    assert "did you mean 'body'" in caught.value.hint


def test_unknown_side_is_refused():
    with pytest.raises(ConfigError, match="tap 'body:inputs' ends in 'inputs'"):
        TappedModel(tiny_net(), Taps(maps=("body:inputs",)), frozenset({MAPS}))


def test_missing_role_says_what_to_name():
    with pytest.raises(ConfigError, match="no tap for maps and pooled") as caught:
        TappedModel(tiny_net(), Taps(), frozenset({MAPS, POOLED}))
    assert "Taps(maps=...)" in caught.value.hint


def test_close_and_errors_leave_no_hook():
    model = tiny_net()
    tapped = TappedModel(model, TAPS, ALL)
    assert num_hooks(model) == 5
    tapped.close()
    tapped.close()
    assert num_hooks(model) == 0
    with pytest.raises(ConfigError):
        TappedModel(model, Taps(maps=("stem", "nowhere")), frozenset({MAPS}))
    with pytest.raises(ConfigError):
        probe(broken := Returns((1, 2)), Taps(maps=("inner",)), {MAPS}, images())
    assert num_hooks(model) == num_hooks(broken) == 0


def test_one_tap_in_two_roles_is_hooked_once():
    model = tiny_net()
    out = TappedModel(model, Taps(maps=("body",), pooled="body"), frozenset({MAPS, POOLED}))(
        images()
    )
    assert num_hooks(model) == 1
    assert torch.equal(out.pooled, out.maps[0].flatten(1))


def test_bf16_is_widened():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = TappedModel(tiny_net(), TAPS, ALL)(images())
    assert {t.dtype for t in (out.logits, *out.maps, *out.preact, out.pooled)} == {torch.float32}


def test_float64_is_kept():
    out = TappedModel(tiny_net().double(), TAPS, ALL)(images().double())
    assert out.logits.dtype == out.maps[0].dtype == torch.float64


def test_probe_finds_sizes():
    assert probe(tiny_net(), TAPS, ALL, images()[:1]) == Shapes(
        4, maps=((4, 8, 8), (8, 4, 4)), preact=((4, 8, 8), (8, 4, 4)), pooled=8
    )


def test_probe_leaves_statistics_hooks_gradients_and_every_mode():
    model = tiny_net()
    model.body[1].eval()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    probe(model, TAPS, ALL, images())
    assert same_state(before, snapshot(model))
    assert [m.training for m in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert num_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error():
    model = tiny_net()
    model.drop.eval()

    def fail():
        with eval_mode(model):
            assert not model.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.training
    assert not model.drop.training


def test_reused_module_gives_its_last_output():
    model = TwoRelus()
    out = TappedModel(model, Taps(maps=("relu",), preact=("relu:input",)), frozenset({MAPS, PREACT}))(images())  # fmt: skip
    second = model.conv2(F.relu(model.conv1(images())))
    assert torch.equal(out.preact[0], second)
    assert torch.equal(out.maps[0], F.relu(second))


@pytest.mark.parametrize("tap", ["conv2", "relu:input"])
def test_value_overwritten_in_place_is_refused_not_misread(tap):
    with pytest.raises(ConfigError, match=f"tap '{tap}' read was changed in place"):
        TappedModel(TwoRelus(inplace=True), Taps(maps=(tap,)), frozenset({MAPS}))(images())


def test_output_of_an_in_place_activation_is_fine():
    model = TwoRelus(inplace=True)
    out = TappedModel(model, Taps(maps=("relu",)), frozenset({MAPS}))(images())
    assert (out.maps[0] >= 0).all()


def test_inference_mode_teacher_is_read():
    model = tiny_net().eval()
    with torch.inference_mode():
        out = TappedModel(model, TAPS, ALL)(images())
    assert out.maps[0].shape == (5, 4, 8, 8)


def test_module_that_does_not_run_is_named_even_after_one_that_did():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.extra, self.head = nn.Identity(), nn.Linear(3, 2)

        def forward(self, x):
            x = x.mean((2, 3))
            return self.head(self.extra(x) if self.training else x)

    tapped = TappedModel(Sometimes(), Taps(pooled="extra"), frozenset({POOLED}))
    tapped(images())
    tapped.model(images())
    tapped.model.eval()
    with pytest.raises(ConfigError, match="module of tap 'extra' did not run"):
        tapped(images())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((torch.zeros(5, 2), torch.zeros(1)), "returns a tuple"),
        ({"logits": torch.zeros(5, 2)}, "returns a dict"),
        (None, "returns nothing"),
        (torch.zeros(5), r"returns a tensor \(5,\)"),
    ],
)
def test_model_that_does_not_return_logits_is_refused(value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        TappedModel(Returns(value), Taps())(images())
    assert "forward returns only the logits" in caught.value.hint


def test_tap_on_a_tuple_is_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(24, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])

    with pytest.raises(ConfigError, match="tap 'rnn' gives a tuple"):
        TappedModel(Recurrent(), Taps(maps=("rnn",)), frozenset({MAPS}))(images())
