"""Methods that ask for the networks themselves: other images, classifiers, positions, several teachers."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from tiny import TAPS, snapshot, tiny_data, tiny_net, trained_teacher
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from smskd import Augmentation, Needs, ResidentBatches, Signals, Stage, distill
from smskd.errors import ConfigError, DataError, IncompatibleError
from smskd.methods import METHODS, Method

SEEN: list[Signals] = []


@dataclass(frozen=True)
class Curious(Method):
    """Looks at whatever it is given."""

    name: ClassVar[str] = "curious"
    kind: ClassVar[str] = "response"

    def distill(self, signals, modules):
        SEEN.append(signals)
        return {"zero": 0.0 * signals.student.logits.sum()}


@dataclass(frozen=True)
class LooksAgain(Curious):
    needs: ClassVar[Needs] = Needs.features("network")

    def distill(self, signals, modules):
        again = signals.networks.student(signals.networks.images.flip(3))
        taught = signals.networks.teachers[0](signals.networks.images)
        torch.testing.assert_close(taught.logits, signals.teacher.logits)
        assert not taught.logits.requires_grad
        return {"again": 0.0 * again.logits.sum()}


@dataclass(frozen=True)
class AsksForClassifiers(Curious):
    needs: ClassVar[Needs] = Needs.features("classifier")


@dataclass(frozen=True)
class AsksForPositions(Curious):
    needs: ClassVar[Needs] = Needs(index=True)


def run(method, data=None, teacher=None, **options):
    SEEN.clear()
    student = tiny_net()
    taps = {"student_taps": TAPS, "teacher_taps": TAPS}
    distill(
        student,
        teacher or trained_teacher(),
        [Stage(method, 2)],
        data or tiny_data(),
        **taps | options,
    )
    return student


def test_only_the_loops_own_pass_moves_the_running_statistics():
    plain, again = run(Curious()), run(LooksAgain())
    assert snapshot(plain).keys() == snapshot(again).keys()
    for name, value in snapshot(plain).items():
        assert torch.equal(snapshot(again)[name], value), name


def test_who_asks_for_nothing_gets_no_networks():
    run(Curious())
    assert SEEN[0].networks is None


@pytest.mark.parametrize("looked_up", [False, True])
def test_classifiers_are_those_of_the_networks_also_behind_a_table(looked_up, tmp_path):
    teacher, (images, labels) = trained_teacher(), tiny_data()
    data = ResidentBatches(images, labels, 16, augment=Augmentation(pad=1))
    student = run(AsksForClassifiers(), data, teacher, tables=tmp_path if looked_up else None)
    assert any(tmp_path.iterdir()) == looked_up
    networks = SEEN[0].networks
    assert networks.student_classifier is student.head
    assert networks.teacher_classifiers == (teacher.head,)


def test_positions_that_the_data_do_not_say_are_refused_at_once():
    images, labels = tiny_data()
    with pytest.raises(DataError, match="stage 1 keeps an entry for each training sample"):
        run(AsksForPositions(), DataLoader(TensorDataset(images, labels), 16))
    run(AsksForPositions(), DataLoader(TensorDataset(images, labels, torch.arange(48)), 16))
    with pytest.raises(IncompatibleError, match="expected their number to be known"):
        run(AsksForPositions(), [(images, labels)])


def test_several_teachers_and_their_taps():
    teachers = [trained_teacher(7), trained_teacher(8)]
    run(Curious(), teacher=teachers, teacher_taps=[TAPS, TAPS])
    assert len(SEEN[0].teachers) == 2
    with pytest.raises(ConfigError, match="2 teachers but taps for 1"):
        run(Curious(), teacher=teachers, teacher_taps=[TAPS])


def test_a_peer_is_another_untrained_student():
    student = run(METHODS["dml"](), teacher=None)
    assert student is not None


def test_a_layer_that_cannot_draw_new_weights_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.by * x

    student = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(ConfigError, match="a Scale cannot draw new weights"):
        distill(student, None, [Stage(METHODS["dml"](), 1)], tiny_data())


def test_weights_of_samples_act_on_the_mean():
    run(Curious())
    losses = torch.arange(float(len(SEEN[0].labels)))
    assert SEEN[0].mean(losses) == losses.mean()
    doubled = replace(SEEN[0], weights=torch.full_like(losses, 2.0))
    assert doubled.mean(losses) == 2 * losses.mean()
