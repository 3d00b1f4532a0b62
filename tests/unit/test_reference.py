"""The reference: edge cases of its weights, its gradients, and that it stays frozen."""

import pytest
import torch
from tiny import TAPS, same_state, snapshot, tiny_data, tiny_net

from smskd.errors import ConfigError
from smskd.methods.base import Signals
from smskd.reference import (
    Anchor,
    anchor_roles,
    sample_weights,
    true_class_probability,
    weighted_mean,
)
from smskd.settings import Reference, Weighting
from smskd.taps import MAPS, Outputs, TappedModel

NORMALISATIONS = ("none", "batch_mean", "batch_sum")
WEIGHT_MAPS = ("one_minus_tcp", "tcp", "constant", "exp_minus_tcp", "two_minus_tcp")


def signals_of(student, teacher, images, labels):
    return Signals(student, (teacher,) if teacher else (), labels, torch.arange(len(labels)))


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize("denominator", ["batch", "weights"])
def test_teacher_that_is_certain_of_a_whole_batch_gives_zero(normalise, denominator):
    labels = torch.tensor([0, 2, 1])
    certain = torch.full((3, 3), -200.0).scatter(1, labels.view(-1, 1), 200.0)
    weighting = Weighting("one_minus_tcp", normalise=normalise, denominator=denominator)
    weights = sample_weights(true_class_probability(certain, labels), weighting)
    losses = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = weighted_mean(losses, weights, weighting)
    loss.backward()
    assert weights.tolist() == [0.0] * 3
    assert loss.item() == 0.0
    assert losses.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("map_", WEIGHT_MAPS)
def test_normalised_weights_average_or_sum_to_one(map_):
    tcp = torch.tensor([0.1, 0.5, 0.999])
    assert sample_weights(
        tcp, Weighting(map_, normalise="batch_mean")
    ).mean().item() == pytest.approx(1)
    assert sample_weights(
        tcp, Weighting(map_, normalise="batch_sum")
    ).sum().item() == pytest.approx(1)


def test_directions_of_the_maps():
    sure, unsure = torch.tensor([0.9]), torch.tensor([0.1])
    for map_, falls in zip(WEIGHT_MAPS, (True, False, None, True, True), strict=True):
        weights = sample_weights(sure, Weighting(map_)), sample_weights(unsure, Weighting(map_))
        assert (weights[0] == weights[1]) if falls is None else ((weights[0] < weights[1]) == falls)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert true_class_probability(logits, torch.tensor([0])).item() == 1.0
    assert true_class_probability(logits, torch.tensor([1])).item() == 0.0


def test_tcp_temperature_softens():
    logits, labels = torch.tensor([[3.0, 0.0]]), torch.tensor([0])
    assert true_class_probability(logits, labels, 100.0).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("space", ["logits", "features"])
def test_gradient_reaches_the_student_only(space):
    images, labels = tiny_data(8)
    settings = Reference(space=space)
    student, teacher = tiny_net(1), tiny_net(2)
    anchor = Anchor.freeze(tiny_net(3), TAPS, settings)
    tapped = TappedModel(student, TAPS, anchor_roles(settings))
    teacher_says = Outputs(teacher(images))
    assert teacher_says.logits.requires_grad
    signals = signals_of(tapped(images), teacher_says, images, labels)
    terms, weights = anchor.terms(signals, anchor.network.network(images))
    terms["reference"].backward()
    assert not weights.requires_grad
    assert student.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in anchor.network.network.model.parameters())


def test_student_equal_to_its_reference_costs_nothing():
    images, labels = tiny_data(8)
    student = tiny_net(1).eval()
    anchor = Anchor.freeze(student, TAPS, Reference(weighting=Weighting("constant")))
    terms, _ = anchor.terms(
        signals_of(Outputs(student(images)), None, images, labels), anchor.network.network(images)
    )
    terms["reference"].backward()
    assert terms["reference"].item() == pytest.approx(0.0, abs=1e-6)
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-6


def test_anchor_stays_as_it_was_frozen():
    images, labels = tiny_data(16)
    student = tiny_net(1)
    anchor = Anchor.freeze(student, TAPS, Reference(space="features"))
    before, said = snapshot(anchor.network.network.model), anchor.network.network(images).logits
    assert same_state(before, snapshot(student))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(student(images), labels).backward()
        optimizer.step()
        anchor.network.network(images)
    assert same_state(before, snapshot(anchor.network.network.model))
    assert not same_state(before, snapshot(student))
    assert torch.equal(anchor.network.network(images).logits, said)
    assert not any(m.training for m in anchor.network.network.model.modules())
    assert not any(p.requires_grad for p in anchor.network.network.model.parameters())
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


def test_features_are_read_only_in_feature_space():
    assert anchor_roles(Reference(space="features")) == {MAPS}
    assert anchor_roles(Reference()) == frozenset()


def test_weights_that_need_a_teacher_say_so_without_one():
    anchor = Anchor.freeze(tiny_net(), TAPS, Reference())
    images, labels = tiny_data(4)
    signals = signals_of(Outputs(tiny_net()(images)), None, images, labels)
    with pytest.raises(ConfigError, match="'one_minus_tcp' need a teacher"):
        anchor.terms(signals, anchor.network.network(images))


def test_reference_weight_scales_the_term():
    images, labels = tiny_data(8)
    network = tiny_net(3)
    said = Outputs(tiny_net(2)(images))
    losses = []
    for weight in (1.0, 2.5):
        anchor = Anchor.freeze(network, TAPS, Reference(weight, weighting=Weighting("constant")))
        terms, _ = anchor.terms(
            signals_of(said, None, images, labels), anchor.network.network(images)
        )
        losses.append(terms["reference"].item())
    assert losses[1] == pytest.approx(2.5 * losses[0])
