"""Seeds folded into one network: the same numbers as each alone, and the same files."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import TAPS, same_state, snapshot, tiny_data, tiny_net, trained_teacher
from torch import nn

from smskd.data import ResidentBatches
from smskd.errors import IncompatibleError
from smskd.folded import Folded, why_not_foldable, why_not_together
from smskd.folding import fold, split, unfold, why_not
from smskd.methods.at import AT
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.methods.objective import Part
from smskd.methods.rkd import RKD
from smskd.models import build_model, taps_of
from smskd.settings import Reference, Training
from smskd.stages import Stage, prepare
from smskd.taps import MAPS, POOLED, PREACT, Network, TappedModel
from smskd.train import train, train_group
from smskd.views import Augmentation

ROLES = frozenset({MAPS, PREACT, POOLED})
SEEDS = (0, 1, 2)


def zoo_networks(name, count):
    return [Network(seeded_model(name, seed), taps_of(name)) for seed in range(count)]


def seeded_model(name, seed):
    torch.manual_seed(seed)
    return build_model(name, 10).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn_16_1"])
def test_a_folded_network_says_what_each_says(name):
    networks = zoo_networks(name, 3)
    images = [torch.randn(4, 3, 16, 16) for _ in networks]
    folded = fold([n.model for n in networks])
    with TappedModel(folded, taps_of(name), ROLES) as tapped:
        together = split(tapped(torch.cat(images, dim=1)), 3)
    for network, batch, ours in zip(networks, images, together, strict=True):
        with TappedModel(network.model, network.taps, ROLES) as tapped:
            alone = tapped(batch)
        torch.testing.assert_close(ours.logits, alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.pooled, alone.pooled, rtol=1e-4, atol=1e-5)
        for a, b in zip((*ours.maps, *ours.preact), (*alone.maps, *alone.preact), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_folding_and_unfolding_keeps_every_bit():
    models = [n.model for n in zoo_networks("resnet8", 3)]
    before = [snapshot(model) for model in models]
    folded = fold(models)
    for model in models:
        with torch.no_grad():
            for value in model.state_dict().values():
                value.zero_()
    unfold(folded, models)
    assert all(same_state(snapshot(m), b) for m, b in zip(models, before, strict=True))


def test_why_not_leaves_the_networks_alone_and_accepts_the_zoo():
    networks = zoo_networks("resnet8", 2)
    before = [snapshot(n.model) for n in networks]
    assert why_not(networks, torch.randn(4, 3, 16, 16)) is None
    assert all(same_state(snapshot(n.model), b) for n, b in zip(networks, before, strict=True))


class Shuffling(nn.Module):
    """Rolls its channels, which a folded network would do across networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.conv(images).roll(1, dims=1).mean((2, 3)))


def test_networks_that_mix_channels_are_refused():
    reason = why_not([Network(Shuffling()) for _ in range(2)], torch.randn(4, 3, 8, 8))
    assert "mixes channels" in reason


def test_dropout_and_unknown_layers_are_refused():
    image = tiny_data(1)[0]
    assert "dropout" in why_not_foldable(Network(tiny_net(dropout=0.5), TAPS), 2, image)
    odd = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert "PReLU" in why_not_foldable(Network(odd), 2, image)


def run_of(seed, method, previous=None, epochs=2):
    student = copy.deepcopy(previous) if previous is not None else tiny_net(seed)
    stage = Stage(method, epochs, Reference())
    return prepare(
        Network(student, TAPS), [Network(TEACHER, TAPS)], stage, Training(epochs), tiny_data(1)[0],
        previous=previous, number=2 if previous is not None else 1, seed=seed,
    )  # fmt: skip


TEACHER = trained_teacher()


def batches_of(seed):
    augment = Augmentation(pad=1, flip=True)
    return ResidentBatches(*tiny_data(44), batch_size=20, seed=seed, augment=augment)


METHODS = {
    "kd": KD(),
    "joint": [KD(), FitNet(hint_layer=1)],
    "at+rkd": [Part(AT()), Part(RKD())],
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_training_folded_equals_training_alone(method, later):
    previous = [tiny_net(10 + seed) if later else None for seed in SEEDS]
    alone = [run_of(s, method, p) for s, p in zip(SEEDS, previous, strict=True)]
    together = [run_of(s, method, p) for s, p in zip(SEEDS, previous, strict=True)]
    for seed, run in zip(SEEDS, alone, strict=True):
        train(run, batches_of(seed), lambda run: None)
    train_group(Folded(together), [batches_of(s) for s in SEEDS], lambda run: None)
    for one, other in zip(alone, together, strict=True):
        assert_close(other.student.model.state_dict(), one.student.model.state_dict())
        assert_close(other.objective.state_dict(), one.objective.state_dict())
        mine, theirs = (r.optimizer.state_dict()["state"] for r in (other, one))
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_close(mine[key], theirs[key])
        for ours, row in zip(other.history, one.history, strict=True):
            assert ours.keys() == row.keys()
            for name in row.keys() - {"seconds", "images_per_s"}:
                assert ours[name] == pytest.approx(row[name], rel=2e-3, abs=1e-5), name


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Sums round to a part of their largest terms, and how differs between processors.
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5 * scale, msg=name)


def test_an_interrupted_fold_goes_on_to_the_same_bits():
    whole = [run_of(s, KD(), epochs=3) for s in SEEDS]
    train_group(Folded(whole), [batches_of(s) for s in SEEDS], lambda run: None)

    class Stopped(Exception):
        pass

    def stop(run):
        if run.epoch == 2 and run is begun[-1]:
            raise Stopped

    begun = [run_of(s, KD(), epochs=3) for s in SEEDS]
    with pytest.raises(Stopped):
        train_group(Folded(begun), [batches_of(s) for s in SEEDS], stop)
    fresh = [run_of(s, KD(), epochs=3) for s in SEEDS]
    for run, old in zip(fresh, begun, strict=True):
        run.student.model.load_state_dict(old.student.model.state_dict())
        run.optimizer.load_state_dict(old.optimizer.state_dict())
        run.epoch, run.history = old.epoch, old.history
    train_group(Folded(fresh), [batches_of(s) for s in SEEDS], lambda run: None)
    for run, expected in zip(fresh, whole, strict=True):
        assert same_state(snapshot(run.student.model), snapshot(expected.student.model))


def test_the_teacher_that_all_share_runs_once_a_step():
    calls = []
    runs = [run_of(s, KD(), epochs=1) for s in SEEDS]
    handle = TEACHER.head.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    train_group(Folded(runs), [batches_of(s) for s in SEEDS], lambda run: None)
    handle.remove()
    assert calls == [60, 60, 12]


@dataclass(frozen=True)
class Rolling(KD):
    name: ClassVar[str] = "rolling"
    draws_random: ClassVar[bool] = True


@dataclass(frozen=True)
class OwnSteps(KD):
    name: ClassVar[str] = "own_steps"

    def descend(self, task, distill, optimizer):
        raise AssertionError


def test_what_cannot_share_an_optimiser_step_is_refused():
    assert "draw random" in why_not_together([run_of(s, Rolling()) for s in SEEDS])
    assert "own_steps" in why_not_together([run_of(s, OwnSteps()) for s in SEEDS])
    ahead = [run_of(s, KD()) for s in SEEDS]
    ahead[1].epoch = 1
    assert "epoch" in why_not_together(ahead)
    with pytest.raises(IncompatibleError, match="only one"):
        Folded([run_of(0, KD())])


def test_one_seed_that_diverges_does_not_touch_the_others():
    alone = [run_of(s, KD(), epochs=1) for s in SEEDS]
    runs = [run_of(s, KD(), epochs=1) for s in SEEDS]
    with torch.no_grad():
        next(runs[1].student.model.parameters()).fill_(torch.nan)
    group = Folded(runs)
    group.begin(0.05)
    from smskd.meter import Meter

    meters = [Meter(1, sharing=3) for _ in runs]
    for step in zip(*(batches_of(s).epoch(1) for s in SEEDS), strict=True):
        group.step(step, 1, meters)
    group.settle()
    train(alone[0], batches_of(0), lambda run: None)
    assert_close(runs[0].student.model.state_dict(), alone[0].student.model.state_dict())


def test_counters_go_on_from_their_own():
    runs = [run_of(s, KD(), epochs=1) for s in SEEDS]
    for i, run in enumerate(runs):
        run.student.model.body[1].num_batches_tracked.fill_(10 * i)
    train_group(Folded(runs), [batches_of(s) for s in SEEDS], lambda run: None)
    counters = [int(run.student.model.body[1].num_batches_tracked) for run in runs]
    assert counters == [3, 13, 23]


def test_students_that_mix_channels_are_refused_where_an_image_is_given():
    runs = [run_of(s, KD()) for s in SEEDS]
    for run in runs:
        run.student.model = Shuffling()
        run.student.taps = Network(Shuffling()).taps
    with pytest.raises(IncompatibleError, match="mixes channels"):
        Folded(runs, tiny_data(1)[0])
